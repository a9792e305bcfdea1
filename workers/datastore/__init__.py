"""Datastores: texts scored by a model over the cluster, for an index or an evaluation. Knows no torch, no faiss."""
