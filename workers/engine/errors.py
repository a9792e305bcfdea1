"""The engine's one error of its own; knows no file format and no model."""


class CheckpointError(ValueError):
    """A model directory that cannot be used. Its one line names the file, what is wrong with it and what to do."""
