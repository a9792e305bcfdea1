"""What travels: messages, their frames, tensors, limits and errors. Knows no socket, no torch, no faiss."""
