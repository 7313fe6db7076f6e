"""Buckets of similar duration: where they end, and how much of the batches is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Durations = npt.NDArray[np.float64]  # seconds

_PER_BUCKET = 20  # utterances at least, on average, where the number of buckets is left open


def default_buckets(utterances: int, wanted: int = 30) -> int:
    """As many buckets as wanted, fewer where a bucket would hold hardly any utterance."""
    return max(1, min(wanted, utterances // _PER_BUCKET))


def estimate_bins(durations: Durations, buckets: int) -> list[float]:
    """Upper ends in seconds, included, of buckets that hold about the same time in all; the last one holds the longest.

    An end is the duration at which the utterances before it, from the shortest on, exceed their share of the total
    (as with `estimate_duration_buckets` of Lhotse, whose list lacks the last end and may name one twice).
    There may be fewer buckets than asked for.
    """
    ordered = np.sort(durations)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    share = sums[-1] / buckets
    ends, first = [], 0
    while (end := int(np.searchsorted(sums, sums[first] + share, side="right"))) < len(ordered):
        ends.append(float(ordered[end]))
        first = end
    return sorted({*(_up(end) for end in ends), _up(float(ordered[-1]))})


def _up(seconds: float) -> float:
    """To milliseconds, never down: the longest utterance has to fit."""
    rounded = round(seconds, 3)
    return rounded if rounded >= seconds else round(seconds + 0.001, 3)


def bucket_of(durations: Durations, bins: Sequence[float]) -> npt.NDArray[np.int64]:
    """The bucket of each utterance, ends included, as Lhotse's samplers assign them."""
    return np.searchsorted(np.asarray(bins), durations, side="left").astype(np.int64)


def padding_of_plain(durations: Durations, batch_size: int, seed: int = 0) -> float:
    """The share of padding in batches of utterances in random order."""
    order = np.random.default_rng(seed).permutation(durations)
    return _padding(_batches(order, batch_size))


def padding_of_buckets(durations: Durations, bins: Sequence[float], sizes: Sequence[int], seed: int = 0) -> float:
    """The share of padding in batches of one bucket each, in random order within it."""
    rng, buckets = np.random.default_rng(seed), bucket_of(durations, bins)
    batches = []
    for bucket, size in enumerate(sizes):
        batches += _batches(rng.permutation(durations[buckets == bucket]), size)
    return _padding(batches)


def _batches(durations: Durations, size: int) -> list[Durations]:
    return [durations[first : first + size] for first in range(0, len(durations), size)]


def _padding(batches: Sequence[Durations]) -> float:
    padded = sum(len(batch) * float(batch.max()) for batch in batches)
    return 1 - sum(float(batch.sum()) for batch in batches) / padded
