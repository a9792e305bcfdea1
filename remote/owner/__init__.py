"""What a worker does for the callers whose modules and tensors it holds. Knows no socket."""
