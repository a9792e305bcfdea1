"""Text in, text out: tokenizer, stop strings, retrieval options, over a pipeline of stages. Imports no torch."""
