"""The sampler: the batches that each process takes, in order, and the plan that a configuration asks for.

The batches of a run form one sequence over all epochs. Each of `ranks` processes takes every `ranks`-th batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from nestcli.data.batch_plan import (
    BatchPlan,
    Items,
    Limits,
    Mixing,
    Order,
    StepOrder,
    bucketed,
    duration_bins,
    temperature_shares,
)
from nestcli.data.corpus import Corpus, DatasetConfig
from nestcli.errors import ConfigError, DataError

N_BUCKETS = 30  # Lhotse's and NeMo's
_SHUFFLE_WINDOW = {False: 2048, True: 10_000}  # NeMo's for tars, and Lhotse's
_SEQUENCES: dict[str, StepOrder] = {
    "fixed_order": "buckets",
    "synced_randomized": "shuffled buckets",
    "fully_randomized": "random",
}


@dataclass(frozen=True)
class Place:
    """One batch of a run: its items in an epoch. `counts` is False for a filler: all processes need equally many."""

    epoch: int
    items: Items
    counts: bool = True


@dataclass(frozen=True)
class Position:
    """The position of a run in its data: `consumed` batches by all processes; the next is `number` of `epoch`."""

    consumed: int
    epoch: int
    number: int


class ResumableSampler(Sampler[Place]):
    """The `length` places of one of `ranks` processes over a whole run, from the current position on.

    `used` returns how many of them are already used; by default, the process's share of the position.

    The run is one long sequence over all its epochs, because Lightning loses counts that restart with each epoch when
    it resumes. It also means that no process misses the last batch of an epoch. `at` returns the position after a
    number of consumed batches, for the checkpoint.
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
        self._began: list[Position] = []  # the starts of the epochs that training has not finished

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
        """Return the position after `consumed` batches of the run; they must have been drawn already."""
        while len(self._began) > 1 and self._began[1].consumed <= consumed:
            del self._began[0]
        began = self._began[0] if self._began else self.start()
        return Position(consumed, began.epoch, consumed - began.consumed + began.number)


class OnePass(Sampler[Place]):
    """One process's share of the batches of one epoch; batches that fill up the last round do not count."""

    def __init__(self, plan: BatchPlan, *, ranks: int = 1, rank: int = 0) -> None:
        self.plan, self.ranks, self.rank = plan, ranks, rank

    def __len__(self) -> int:
        return -(-len(self.plan.batches(0)) // self.ranks)

    def __iter__(self) -> Iterator[Place]:
        batches = self.plan.batches(0)
        for number in range(self.rank, len(self) * self.ranks, self.ranks):
            own = number < len(batches)
            yield Place(0, batches[number]) if own else Place(0, batches.items[:1], counts=False)


# ---- the plan that a configuration asks for ----


def plan_batches(
    corpus: Corpus, settings: DatasetConfig, key: str, *, seed: int, batches_per_step: int = 1
) -> BatchPlan:
    """Return the plan that a data set's settings ask for: plain, in NeMo's buckets, or dynamic as in Lhotse.

    A step takes `batches_per_step` batches. Raises ConfigError and DataError.
    """
    limits, bucket_of = _buckets(corpus, settings, key)
    order = _order(corpus, settings, key, seed)
    sequence: StepOrder
    if corpus.in_buckets:
        sequence = _SEQUENCES[settings.bucketing_strategy]
    elif len(limits) == 1:
        sequence = "buckets"
    else:
        sequence = "random" if order.shuffle == "lines" else "filled"
    return BatchPlan(
        order=order,
        durations=corpus.speech.durations,
        limits=limits,
        bucket_of=bucket_of,
        drop_last=settings.drop_last,
        sequence=sequence,
        batches_per_step=batches_per_step,
    )


def _order(corpus: Corpus, settings: DatasetConfig, key: str, seed: int) -> Order:
    shuffles = settings.concat_shuffle if settings.is_concat else settings.shuffle
    in_shards = bool((corpus.speech.shard_of >= 0).any())
    window = settings.shuffle_buffer_size if settings.use_lhotse else settings.shuffle_n
    return Order(
        part_of=corpus.part_of,
        shard_of=corpus.speech.shard_of,
        shuffle=None if not shuffles else "shards" if in_shards else "lines",
        window=_SHUFFLE_WINDOW[settings.use_lhotse] if window is None else window,
        seed=seed,
        mixing=_mixing(corpus, settings, key),
    )


def _mixing(corpus: Corpus, settings: DatasetConfig, key: str) -> Mixing | None:
    """Return the turns of the data sets; None if all lines of all data sets come once in an epoch."""
    n_parts = corpus.n_parts
    if n_parts == 1 or (corpus.weights is None and not settings.is_concat):
        return None
    sizes = np.bincount(corpus.part_of, minlength=n_parts)
    if not sizes.all():
        raise DataError(
            f"{key}: data set {int(np.argmin(sizes)) + 1} of {n_parts} has no utterance between min_duration and "
            "max_duration. Remove it, or change these limits."
        )
    if corpus.weights is not None:
        return Mixing(tuple(np.array(corpus.weights) / np.sum(corpus.weights)), int(sizes.sum()))
    length = int(sizes.sum() * settings.concat_sampling_scale)
    return Mixing(_shares(sizes.tolist(), settings, key), length, settings.concat_sampling_seed or 0)


def _shares(sizes: list[int], settings: DatasetConfig, key: str) -> tuple[float, ...] | None:
    """Return the probability of each data set; None for turns. Source: NeMo `ConcatDataset`."""
    if settings.concat_sampling_technique == "round-robin":
        return None
    if settings.concat_sampling_technique == "temperature":
        return temperature_shares(sizes, settings.concat_sampling_temperature)
    shares = settings.concat_sampling_probabilities or (1 / len(sizes),) * len(sizes)
    if len(shares) != len(sizes):
        raise ConfigError(
            f"{key}.concat_sampling_probabilities: {len(shares)} numbers for {len(sizes)} data sets; give one for each."
        )
    return shares


def _buckets(corpus: Corpus, settings: DatasetConfig, key: str) -> tuple[tuple[Limits, ...], npt.NDArray[np.int16]]:
    """Return the limits of each bucket's batches, and the bucket of each line."""
    durations = corpus.speech.durations
    one = np.zeros(len(durations), np.int16)
    if corpus.in_buckets:
        return _nemo_limits(corpus.n_parts, settings, key), corpus.part_of
    if not settings.use_lhotse:
        return (Limits(settings.batch_size),), one
    dynamic = Limits(settings.batch_size, settings.batch_duration, settings.quadratic_duration)
    if not settings.buckets:
        return (dynamic,), one
    bins = settings.bucket_duration_bins
    if settings.bucket_batch_size is not None:
        assert bins is not None
        limits = tuple(Limits(size) for size in settings.bucket_batch_size)
        return limits, bucketed(durations, bins[:-1], upper_inclusive=True)
    if bins is None:
        bins = tuple(duration_bins(durations, settings.num_buckets or N_BUCKETS))
    return (dynamic,) * (len(bins) + 1), bucketed(durations, bins, upper_inclusive=False)


def _nemo_limits(n_buckets: int, settings: DatasetConfig, key: str) -> tuple[Limits, ...]:
    """Return the batch sizes of NeMo's buckets, shortest first: one for all, one each, or n, n-1, … times a number."""
    sizes = settings.bucketing_batch_size
    if sizes is None:
        return (Limits(settings.batch_size),) * n_buckets
    if isinstance(sizes, int):
        n_counted = sum(settings.bucketing_weights or (1,) * n_buckets)
        sizes = tuple((n_counted - bucket) * sizes for bucket in range(n_buckets))
    if len(sizes) != n_buckets or min(sizes) < 1:
        raise ConfigError(
            f"{key}.bucketing_batch_size: {list(sizes)} must be one size from 1 on for each of {n_buckets}."
        )
    return tuple(Limits(size) for size in sizes)
