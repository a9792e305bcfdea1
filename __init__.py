"""The face: what a user imports."""
