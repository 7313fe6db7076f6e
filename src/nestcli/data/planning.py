"""The plan of batches that a configuration asks for: plain, in NeMo's buckets, or dynamic as Lhotse has them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nestcli.data.batch_plan import BatchPlan, Limits, Sequence, bucketed, duration_bins
from nestcli.data.corpus import Corpus
from nestcli.data.dataset_config import DatasetConfig
from nestcli.data.order import Mixing, Order, temperature_shares
from nestcli.errors import ConfigError, DataError

N_BUCKETS = 30  # Lhotse's and NeMo's
_SHUFFLE_WINDOW = {False: 2048, True: 10_000}  # NeMo's for tars, Lhotse's
_SEQUENCES: dict[str, Sequence] = {
    "fixed_order": "buckets",
    "synced_randomized": "shuffled buckets",
    "fully_randomized": "random",
}


def plan_batches(corpus: Corpus, settings: DatasetConfig, key: str, *, seed: int, together: int = 1) -> BatchPlan:
    """The batches of every epoch; `together` of them are a step. Raises ConfigError and DataError."""
    limits, bucket_of = _buckets(corpus, settings, key)
    order = _order(corpus, settings, key, seed)
    sequence: Sequence
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
        together=together,
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
    """How data sets take turns; None where all lines of all data sets come once in an epoch."""
    n_parts = corpus.n_parts
    if n_parts == 1 or (corpus.weights is None and not settings.is_concat):
        return None
    sizes = np.bincount(corpus.part_of, minlength=n_parts)
    if not sizes.all():
        raise DataError(
            f"{key}: data set {int(np.argmin(sizes)) + 1} of {n_parts} has no utterance between min_duration and "
            "max_duration. Take it out, or change these."
        )
    if corpus.weights is not None:
        return Mixing(tuple(np.array(corpus.weights) / np.sum(corpus.weights)), int(sizes.sum()))
    length = int(sizes.sum() * settings.concat_sampling_scale)
    return Mixing(_shares(sizes.tolist(), settings, key), length, settings.concat_sampling_seed or 0)


def _shares(sizes: list[int], settings: DatasetConfig, key: str) -> tuple[float, ...] | None:
    """The chance of each data set; None for turns. Source: NeMo `ConcatDataset`."""
    if settings.concat_sampling_technique == "round-robin":
        return None
    if settings.concat_sampling_technique == "temperature":
        return temperature_shares(sizes, settings.concat_sampling_temperature)
    shares = settings.concat_sampling_probabilities or (1 / len(sizes),) * len(sizes)
    if len(shares) != len(sizes):
        raise ConfigError(
            f"{key}.concat_sampling_probabilities: {len(shares)} numbers for {len(sizes)} data sets; give one each."
        )
    return shares


def _buckets(corpus: Corpus, settings: DatasetConfig, key: str) -> tuple[tuple[Limits, ...], npt.NDArray[np.int16]]:
    """What limits the batches of every bucket, and the bucket of every line."""
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
    """Batch sizes of NeMo's buckets, the shortest first: one for all, one each, or n, n-1, … times a number."""
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
