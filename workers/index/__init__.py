"""A FAISS index on disk, what it is built from, and what serves it: everything of ralmq that knows faiss lives here."""
