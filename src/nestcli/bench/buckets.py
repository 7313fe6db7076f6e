"""Buckets of utterances of similar duration: their limits, and the share of padding in their batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nestcli.data.batch_plan import bucketed, duration_bins

Durations = npt.NDArray[np.float64]  # seconds

_PER_BUCKET = 20  # minimum mean number of utterances in a bucket


def default_buckets(utterances: int, wanted: int = 30) -> int:
    """Return the number of buckets: `wanted`, or fewer if buckets would contain too few utterances."""
    return max(1, min(wanted, utterances // _PER_BUCKET))


def estimate_bins(durations: Durations, buckets: int) -> list[float]:
    """Return the upper limits of buckets with about equal total duration, in seconds; a limit belongs to its bucket.

    The inner limits are `duration_bins`, the last one is the longest duration. There may be fewer buckets than asked.
    """
    ends = [*duration_bins(durations, buckets), float(durations.max())]
    return sorted({_up(end) for end in ends})


def _up(seconds: float) -> float:
    """Round up to milliseconds: the longest utterance must fit."""
    rounded = round(seconds, 3)
    return rounded if rounded >= seconds else round(seconds + 0.001, 3)


def padding_of_plain(durations: Durations, batch_size: int, seed: int = 0) -> float:
    """Return the share of padding in batches of utterances in random order."""
    order = np.random.default_rng(seed).permutation(durations)
    return _padding(_batches(order, batch_size))


def padding_of_buckets(durations: Durations, bins: Sequence[float], sizes: Sequence[int], seed: int = 0) -> float:
    """Return the share of padding in batches from one bucket each, in random order within it."""
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
