"""Model blocks, weights, KV cache, sampling (torch, numpy); knows no socket, no message and none of our folders."""
