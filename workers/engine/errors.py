"""The engine's errors of its own; knows no file format and no model."""


class CheckpointError(ValueError):
    """A model directory that cannot be used. Its one line names the file, what is wrong with it and what to do."""


class RankLost(RuntimeError):
    """The ranks of a span do not compute together any more: one is gone, or a step broke on one of them."""
