"""What goes wrong because of some members of a group: each error names their ranks. Knows no message."""

from collections.abc import Iterable

from ...schema.errors import DeadlineExceeded, WorkerLost


class RankMissing(DeadlineExceeded):
    """Members did not come, or did not take part in a call, in time. `ranks` says which."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class RankLost(WorkerLost):
    """Members died, or left while others still counted on them. `ranks` says which."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


def named(ranks: Iterable[int]) -> str:
    """As in a message: `rank 2`, `ranks 1 and 3`."""
    texts = [str(rank) for rank in sorted(ranks)]
    if len(texts) == 1:
        return f"rank {texts[0]}"
    return f"ranks {', '.join(texts[:-1])} and {texts[-1]}"
