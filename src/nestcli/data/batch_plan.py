"""The plan of batches: which items form a batch, and the order of the batches, for a whole epoch at once.

Everything follows from (seed, epoch), so a run can start at any place of any epoch. The plan knows nothing about
processes: the loader deals the batches out one by one.

An item is a line of the corpus. A small data set may be drawn from several times in an epoch; its repeated items get
new numbers: `item % n_lines` is the line, `item // n_lines` is how often the line was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Items = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]
StepOrder = Literal["filled", "random", "buckets", "shuffled buckets"]


@dataclass(frozen=True)
class Mixing:
    """Order in which data sets take turns: at random with probabilities `shares`, or, if None, one after the other.

    `length` is the number of items in an epoch. Source: NeMo `ConcatDataset`.
    """

    shares: tuple[float, ...] | None
    length: int
    seed: int = 0

    def parts(self, n_parts: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """Return the data set of each position in an epoch."""
        if self.shares is None:
            return np.arange(self.length) % n_parts
        rng = np.random.default_rng((seed, epoch, 1 + self.seed))
        return rng.choice(n_parts, size=self.length, p=self.shares)


def temperature_shares(sizes: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Return shares proportional to size^(1/temperature): 1 keeps the proportions, high values make them equal."""
    weights = np.power(np.array(sizes) / np.sum(sizes), 1 / temperature)
    return tuple((weights / weights.sum()).tolist())


@dataclass(frozen=True, eq=False)
class Order:
    """The items of each epoch, in their order.

    `part_of` and `shard_of` are the data set and the tar of each line, -1 for a loose file. Lines in shards are
    shuffled shard by shard, and then by at most `window` places, so that few shards are read at the same time.
    """

    part_of: npt.NDArray[np.int16]
    shard_of: npt.NDArray[np.int32]
    shuffle: Literal["lines", "shards"] | None
    window: int
    seed: int
    mixing: Mixing | None = None

    def items(self, epoch: int) -> Items:
        """Return the items of an epoch in their order."""
        if self.mixing is None:
            return self._shuffled(np.arange(len(self.part_of)), (self.seed, epoch))
        n_parts = int(self.part_of.max()) + 1
        parts = self.mixing.parts(n_parts, self.seed, epoch)
        items = np.empty(len(parts), np.int64)
        for part in range(n_parts):
            places = np.flatnonzero(parts == part)
            items[places] = self._passes(part, len(places), epoch)
        return items

    def _passes(self, part: int, count: int, epoch: int) -> Items:
        """Return `count` items of one data set, in as many passes through it as needed."""
        lines = np.flatnonzero(self.part_of == part)
        n_passes = -(-count // len(lines))
        passes = [
            self._shuffled(lines, (self.seed, epoch, part, number)) + number * len(self.part_of)
            for number in range(n_passes)
        ]
        return np.concatenate([np.empty(0, np.int64), *passes])[:count]

    def _shuffled(self, lines: Items, key: tuple[int, ...]) -> Items:
        if self.shuffle is None:
            return lines
        rng = np.random.default_rng(key)
        if self.shuffle == "lines":
            return rng.permutation(lines)
        shards = self.shard_of[lines]
        place_of_shard = rng.permutation(int(shards.max()) + 2)  # the last place is for loose files
        near = lines[np.argsort(place_of_shard[shards], kind="stable")]
        return near[np.argsort(np.arange(len(near)) + rng.uniform(0, self.window, len(near)), kind="stable")]


@dataclass(frozen=True)
class Limits:
    """The size of a batch: at most `size` items, and at most `duration` s with its padding.

    With `quadratic`, long items weigh more: d + d²/quadratic. Source: Lhotse `TimeConstraint`.
    """

    size: int | None
    duration: float | None = None
    quadratic: float | None = None

    def ends(self, durations: Seconds, *, drop_last: bool = False) -> list[int]:
        """Return the end index of each batch in a sequence of items; `drop_last` omits an incomplete last batch."""
        size = self.size or len(durations)
        if self.duration is None:
            ends = list(range(size, len(durations) + 1, size)) if size else []
            return ends if drop_last or len(durations) % size == 0 else [*ends, len(durations)]
        weighed = durations if self.quadratic is None else durations + durations**2 / self.quadratic
        ends, longest, count = [], 0.0, 0
        for place, duration in enumerate(weighed.tolist()):
            longer = duration if duration > longest else longest
            if count and (count == size or (count + 1) * longer > self.duration):
                ends.append(place)
                longest, count = duration, 1
            else:
                longest, count = longer, count + 1
        return [*ends, len(durations)] if count else ends


@dataclass(frozen=True)
class Batches:
    """The batches of one epoch in their order."""

    items: Items
    starts: Integers
    chosen: Integers  # number of each batch among all that were formed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> Items:
        batch = self.chosen[number]
        return self.items[self.starts[batch] : self.starts[batch + 1]]


@dataclass(frozen=True)
class _Formed:
    """All batches of an epoch, bucket after bucket: their items, the places of the items in the epoch's order, the
    start of each batch (and the end of the last), and the bucket of each batch."""

    items: Items
    places: Integers
    starts: Integers
    buckets: Integers


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of every epoch: a batch holds items of one bucket, and so do all batches of a step.

    `durations` are in seconds, one per line; `bucket_of` is the bucket of each line. A step is the `batches_per_step`
    batches that all processes of a run use for one step of the optimizer. `sequence` orders the steps: "filled" as
    they fill up, "random", "buckets" bucket after bucket, "shuffled buckets" the same with the buckets shuffled.
    `drop_last` drops a smaller last batch where there is only one bucket.
    """

    order: Order
    durations: Seconds
    limits: tuple[Limits, ...]  # of every bucket
    bucket_of: npt.NDArray[np.int16]
    drop_last: bool = False
    sequence: StepOrder = "filled"
    batches_per_step: int = 1
    _epochs: dict[tuple[int, int], Batches] = field(default_factory=dict, repr=False)

    def batches(self, epoch: int, before: int = 0) -> Batches:
        """Return the batches of an epoch; the newest epoch is kept.

        `before` is the number of batches that the run used before the epoch: the first ones complete an unfinished
        step.
        """
        key = (epoch, -before % self._bucket_run)
        if key not in self._epochs:
            made = self._batches(*key)
            self._epochs.clear()
            self._epochs[key] = made
        return self._epochs[key]

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that determines the batches: durations, order, batch limits, steps within one bucket."""
        order = self.order
        digest = blake2b(digest_size=16)
        for column in (self.durations, self.bucket_of, order.part_of, order.shard_of):
            digest.update(column.tobytes())
        settings = (self.limits, self.drop_last, self.sequence, self._bucket_run)
        digest.update(repr((settings, order.shuffle, order.window, order.seed, order.mixing)).encode())
        return digest.hexdigest()

    def largest(self, epoch: int = 0) -> int:
        """Return the number of the epoch's batch with the most audio, padding included."""
        batches = self.batches(epoch)
        lengths = self.durations[batches.items % len(self.durations)]
        room = np.maximum.reduceat(lengths, batches.starts[:-1]) * np.diff(batches.starts)
        return int(room[batches.chosen].argmax())

    def padding_waste(self, epoch: int = 0) -> float:
        """Return the share of padding in the audio of an epoch's batches."""
        formed = self._formed(epoch)
        sizes = np.diff(formed.starts)
        if not len(sizes):
            return 0.0
        lengths = self.durations[formed.items % len(self.durations)]
        longest = np.maximum.reduceat(lengths, formed.starts[:-1])
        return 1 - float(lengths.sum() / (longest * sizes).sum())

    def largest_batch(self, shortest: float = 0.0) -> float:
        """Return an upper bound for the seconds of a batch, padding included.

        Items shorter than `shortest` count as `shortest`: training repeats their audio to that length.
        """
        mixing, bounds = self.order.mixing, []
        for bucket, limits in enumerate(self.limits):
            own = self.durations if len(self.limits) == 1 else self.durations[self.bucket_of == bucket]
            if not len(own):
                continue
            longest = max(float(own.max()), shortest)
            count = len(own) if mixing is None else mixing.length
            by_size = longest * (count if limits.size is None else min(limits.size, count))
            if limits.duration is None:
                bounds.append(by_size)
                continue
            short = np.sort(own[own < shortest])  # a batch is filled by the durations before the repetition
            least = np.arange(1, len(short) + 1) if mixing is None else np.full(len(short), count)
            repeated = shortest * float(np.minimum(limits.duration / np.maximum(short, 1e-6), least).max(initial=0.0))
            bounds.append(min(by_size, max(limits.duration, longest, repeated)))
        return max(bounds, default=0.0)

    # ---- forming ----

    @property
    def _bucket_run(self) -> int:
        """Number of consecutive batches that must share a bucket: those of a step, or 1 if there is one bucket."""
        return self.batches_per_step if len(self.limits) > 1 else 1

    def _batches(self, epoch: int, lead: int) -> Batches:
        formed = self._formed(epoch)
        steps, rest = self._steps(formed.buckets)
        steps = steps[self._in_sequence(steps, formed, epoch)].reshape(-1)
        if len(rest) < lead:  # split a step to complete the unfinished one of the last epoch
            whole = max(0, len(steps) - self._bucket_run)
            steps, rest = steps[:whole], np.append(rest, steps[whole:])
        return Batches(formed.items, formed.starts, np.concatenate([rest[:lead], steps, rest[lead:]]))

    def _formed(self, epoch: int) -> _Formed:
        items = self.order.items(epoch)
        places = np.arange(len(items))
        bounds = [0, len(items)]
        if len(self.limits) > 1:
            buckets = self.bucket_of[items % len(self.durations)]
            places = np.argsort(buckets, kind="stable")
            bounds = np.searchsorted(buckets[places], np.arange(len(self.limits) + 1)).tolist()
            items = items[places]
        lengths = self.durations[items % len(self.durations)]
        starts, bucket_of_batch = [0], []
        for bucket, (limits, (first, last)) in enumerate(zip(self.limits, pairwise(bounds), strict=True)):
            ends = limits.ends(lengths[first:last], drop_last=self.drop_last and len(self.limits) == 1)
            starts.extend(first + end for end in ends)
            bucket_of_batch.extend([bucket] * len(ends))
        return _Formed(items[: starts[-1]], places, np.array(starts), np.array(bucket_of_batch, np.int64))

    def _steps(self, bucket_of_batch: Integers) -> tuple[Integers, Integers]:
        """Return batch numbers as (steps, batches_per_step), with one bucket per step, and the batches left over."""
        batches = np.arange(len(bucket_of_batch))
        counts = np.bincount(bucket_of_batch, minlength=len(self.limits))
        place_in_bucket = batches - (np.cumsum(counts) - counts)[bucket_of_batch]
        whole = place_in_bucket < (counts // self._bucket_run * self._bucket_run)[bucket_of_batch]
        return batches[whole].reshape(-1, self._bucket_run), batches[~whole]

    def _in_sequence(self, steps: Integers, formed: _Formed, epoch: int) -> Integers:
        """Return the order of the steps."""
        rng = np.random.default_rng((self.order.seed, epoch, 7))
        first = steps[:, 0]
        if self.sequence == "random":
            return rng.permutation(len(steps))
        if self.sequence == "filled":
            return np.argsort(formed.places[formed.starts[1:] - 1][first], kind="stable")
        if self.sequence == "shuffled buckets":
            return np.argsort(rng.permutation(len(self.limits))[formed.buckets[first]], kind="stable")
        return np.arange(len(steps))


def duration_bins(durations: Seconds, n_buckets: int) -> list[float]:
    """Return the inner bounds of `n_buckets` buckets that hold about the same number of seconds each.

    There may be fewer buckets if many items have the same length. Source: Lhotse `estimate_duration_buckets`.
    """
    lengths = np.sort(durations)
    share = lengths.sum() / n_buckets
    bins: list[float] = []
    total = 0.0
    for length in lengths.tolist():
        if total > share:
            bins.append(length)
            total = 0.0
        total += length
    return bins


def bucketed(
    durations: Seconds, bins: tuple[float, ...] | list[float], *, upper_inclusive: bool
) -> npt.NDArray[np.int16]:
    """Return the bucket of each duration; len(bins) for durations beyond the last bound."""
    return np.searchsorted(np.array(bins), durations, side="left" if upper_inclusive else "right").astype(np.int16)
