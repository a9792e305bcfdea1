"""A pipeline stage: the leader's schedule, the layers' computation, and sampling with retrieval at the last stage."""
