"""A span that several ranks compute together, each with its part of every matrix. Knows no process."""

from collections.abc import Sequence

from torch import Tensor

from .errors import RankLost
from .parallel import Gathered, Group, Looked, Order, Summed
from .span import Span
from .step import Row


class RankSpan(Span):
    """One rank's part of a span, loaded with `shard`. Rank 0 is used as any span; the others serve it.

    Two sums over the ranks in each layer, one for the embedding, one gathering of logits for each use of the head.
    """

    _group: Group | None = None
    _broken = "this rank has not joined the others"

    def join(self, group: Group) -> None:
        """From now on it computes with the others."""
        self._group = group
        for block in self._blocks:
            block.attention.out = Summed(block.attention.out, group)
            block.mlp = Summed(block.mlp, group)
        if self.embedding is not None:
            self.embedding = Looked(self.embedding, group, self.config.vocab)
        if self.output is not None:
            self.output = Gathered(self.output, group, self.config.vocab)

    def _run(self, rows: Sequence[Row], x: Tensor, ffn_input: bool) -> tuple[Tensor, Tensor]:
        group = self._joined
        if group.rank:
            return super()._run(rows, x, ffn_input)
        try:
            group.tell(Order.STEP, rows, x)
            return super()._run(rows, x, ffn_input)
        except Exception as error:  # the others are within a step that this rank has left
            raise self._lost(error) from error

    def _head(self, hidden: Tensor) -> Tensor:
        group = self._joined
        if group.rank:
            return super()._head(hidden)
        try:
            group.tell(Order.HEAD, (), hidden)
            return super()._head(hidden)
        except Exception as error:
            raise self._lost(error) from error

    @property
    def _joined(self) -> Group:
        if self._group is None:
            raise RankLost(self._broken)
        return self._group

    def _lost(self, error: Exception) -> RankLost:
        """No step may follow: what the others do is not known."""
        said = str(error) if isinstance(error, RankLost) else f"a step broke: {type(error).__name__}: {error}"
        self._group, self._broken = None, said
        return RankLost(said)

    def serve(self) -> None:
        """Does what rank 0 does, until that has it `end`.

        Raises:
            RankLost: rank 0 or another one is gone.
        """
        group = self._joined
        while (told := group.hear()).order is not Order.END:
            assert told.x is not None
            if told.order is Order.STEP:
                self.forward(told.rows, told.x)
            else:
                self.head(told.x)

    def end(self) -> None:
        """Rank 0: the others serve no more."""
        self._joined.tell(Order.END)
