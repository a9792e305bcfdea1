"""Who does: the worker base, what serves it, and the built-in workers. Importing this imports no torch, no faiss."""
