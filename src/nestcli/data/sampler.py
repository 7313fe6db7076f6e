"""Which batches a process takes, and in what order: places in epochs, counted over a whole run.

The batches of a run are one sequence; of `ranks` processes each takes every `ranks`-th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from nestcli.data.batch_plan import BatchPlan
from nestcli.data.order import Items
from nestcli.errors import DataError


@dataclass(frozen=True)
class Place:
    """One batch of a run: its items in an epoch. A batch that does not count keeps processes in step."""

    epoch: int
    items: Items
    counts: bool = True


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `consumed` batches of all processes, the next is `number` of `epoch`."""

    consumed: int
    epoch: int
    number: int


class ResumableSampler(Sampler[Place]):
    """Places of a whole run, from where training stands: those of one of `ranks` processes, which are `length`.

    `used` is how many of these are behind; by default, its share of the position's.

    The run is one long sequence over all its epochs, because counts that start anew with each epoch are what
    Lightning loses when it resumes. So there is no last batch of an epoch that some process would have to go without.
    `at` tells where a number of consumed batches leads to, for the checkpoint.
    """

    def __init__(
        self,
        plan: BatchPlan,
        length: int,
        start: Callable[[], Position],
        *,
        ranks: int = 1,
        rank: int = 0,
        used: Callable[[], int] | None = None,
    ) -> None:
        self.plan, self.length, self.start, self.ranks, self.rank, self.used = plan, length, start, ranks, rank, used
        self._began: list[Position] = []  # where each epoch began that training has not left behind

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Place]:
        position = self.start()
        epoch, first = position.epoch, position.number
        self._began = [Position(position.consumed - first, epoch, 0)]
        consumed = position.consumed
        used = consumed // self.ranks if self.used is None else self.used()
        end = consumed + (self.length - used) * self.ranks
        while consumed < end:
            batches = self.plan.batches(epoch, consumed - first)
            if not len(batches):
                raise DataError(f"epoch {epoch} has no batch; lower batch_size, or give more data")
            mine = first + (self.rank - (consumed - position.consumed)) % self.ranks
            for number in range(mine, min(len(batches), first + end - consumed), self.ranks):
                yield Place(epoch, batches[number])
            consumed += len(batches) - first
            epoch, first = epoch + 1, 0
            self._began.append(Position(consumed, epoch, 0))

    def at(self, consumed: int) -> Position:
        """The position after `consumed` batches of the run, which is at or behind the one that was drawn last."""
        while len(self._began) > 1 and self._began[1].consumed <= consumed:
            del self._began[0]
        began = self._began[0] if self._began else self.start()
        return Position(consumed, began.epoch, consumed - began.consumed + began.number)


class OnePass(Sampler[Place]):
    """One process's share of the batches of one epoch; what is missing for the last round does not count."""

    def __init__(self, plan: BatchPlan, *, ranks: int = 1, rank: int = 0) -> None:
        self.plan, self.ranks, self.rank = plan, ranks, rank

    def __len__(self) -> int:
        return -(-len(self.plan.batches(0)) // self.ranks)

    def __iter__(self) -> Iterator[Place]:
        batches = self.plan.batches(0)
        for number in range(self.rank, len(self) * self.ranks, self.ranks):
            own = number < len(batches)
            yield Place(0, batches[number]) if own else Place(0, batches.items[:1], counts=False)
