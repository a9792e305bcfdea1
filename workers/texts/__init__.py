"""Indexes of texts by their words, which SQLite ranks: no model, no faiss."""
