"""Model blocks, weights, KV cache and sampling on torch and numpy; knows no socket, no message and nothing else of ours."""
