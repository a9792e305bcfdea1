"""Language models of Hugging Face over several workers: used and trained from here. Knows no torch module."""
