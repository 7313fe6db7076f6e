"""Buckets of similar duration: where they end, and how much of the batches is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nestcli.data.batch_plan import bucketed, duration_bins

Durations = npt.NDArray[np.float64]  # seconds

_PER_BUCKET = 20  # utterances at least, on average, where the number of buckets is left open


def default_buckets(utterances: int, wanted: int = 30) -> int:
    """As many buckets as wanted, fewer where a bucket would hold hardly any utterance."""
    return max(1, min(wanted, utterances // _PER_BUCKET))


def estimate_bins(durations: Durations, buckets: int) -> list[float]:
    """Upper ends in seconds, included, of buckets that hold about the same time in all; the last one holds the longest.

    The inner ends are `duration_bins`. There may be fewer buckets than asked for.
    """
    ends = [*duration_bins(durations, buckets), float(durations.max())]
    return sorted({_up(end) for end in ends})


def _up(seconds: float) -> float:
    """To milliseconds, never down: the longest utterance has to fit."""
    rounded = round(seconds, 3)
    return rounded if rounded >= seconds else round(seconds + 0.001, 3)


def padding_of_plain(durations: Durations, batch_size: int, seed: int = 0) -> float:
    """The share of padding in batches of utterances in random order."""
    order = np.random.default_rng(seed).permutation(durations)
    return _padding(_batches(order, batch_size))


def padding_of_buckets(durations: Durations, bins: Sequence[float], sizes: Sequence[int], seed: int = 0) -> float:
    """The share of padding in batches of one bucket each, in random order within it."""
    rng, buckets = np.random.default_rng(seed), bucketed(durations, list(bins), upper_inclusive=True)
    batches = []
    for bucket, size in enumerate(sizes):
        batches += _batches(rng.permutation(durations[buckets == bucket]), size)
    return _padding(batches)


def _batches(durations: Durations, size: int) -> list[Durations]:
    return [durations[first : first + size] for first in range(0, len(durations), size)]


def _padding(batches: Sequence[Durations]) -> float:
    padded = sum(len(batch) * float(batch.max()) for batch in batches)
    return 1 - sum(float(batch.sum()) for batch in batches) / padded
