"""The keys of `model.train_ds` and `model.validation_ds`, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nestcli.audio.load import Channel, parsed_channel
from nestcli.bounds import within

TECHNIQUES = ("temperature", "random", "round-robin")
STRATEGIES = ("fixed_order", "synced_randomized", "fully_randomized")


@dataclass(frozen=True)
class DatasetConfig:
    """The keys of the block except its paths. Durations in seconds; names and meanings are NeMo's."""

    sample_rate: int
    shuffle: bool
    num_workers: int
    pin_memory: bool
    max_duration: float | None
    min_duration: float | None
    batch_size: int | None = None
    drop_last: bool = False
    max_failed_share: float = 0.1
    read_timeout: float | None = 50.0  # s
    trim_silence: bool = False
    channel_selector: int | str | tuple[int, ...] | None = None
    # several data sets
    is_concat: bool = False
    concat_sampling_technique: str = "temperature"
    concat_sampling_temperature: float = 5.0
    concat_sampling_scale: float = 1.0
    concat_sampling_probabilities: tuple[float, ...] | None = None
    concat_sampling_seed: int | None = None
    concat_shuffle: bool = True
    # tars, and one data set per bucket
    is_tarred: bool = False
    shuffle_n: int | None = None
    bucketing_strategy: str = "synced_randomized"
    bucketing_batch_size: int | tuple[int, ...] | None = None
    bucketing_weights: tuple[int, ...] | None = None
    # Lhotse
    use_lhotse: bool = False
    use_bucketing: bool | None = None
    batch_duration: float | None = None
    quadratic_duration: float | None = None
    num_buckets: int | None = None
    bucket_duration_bins: tuple[float, ...] | None = None
    bucket_batch_size: tuple[int, ...] | None = None
    shuffle_buffer_size: int | None = None
    reweight_temperature: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.batch_size is None and not self.use_lhotse:
            raise ValueError("batch_size: null is not a number of utterances, give at least 1.")
        within(self, 1000, 1 << 20, "sample_rate")
        within(self, 1, 10**6, "batch_size", "bucketing_batch_size", "bucket_batch_size")
        within(self, 0, 10**9, "shuffle_n")  # 0: the lines of a shard keep their order
        within(self, 1, 10**9, "shuffle_buffer_size")
        within(self, 1, 10_000, "num_buckets", "bucketing_weights")
        within(self, 0, 4096, "num_workers")
        within(self, 0, 1e7, "batch_duration", "read_timeout", "bucket_duration_bins", above=True)
        if self.min_duration != -1:  # Lhotse's value for no limit
            within(self, 0, 1e7, "min_duration")
        if self.max_duration != math.inf:  # the same
            within(self, 0, 1e7, "max_duration", above=True)
        within(self, 1e-3, 1e7, "quadratic_duration")
        within(self, 0.05, 1e6, "concat_sampling_temperature")
        within(self, 0, 1e6, "concat_sampling_scale", above=True)
        within(self, 0, 1, "max_failed_share", "concat_sampling_probabilities")
        within(self, 0, (1 << 63) - 1, "concat_sampling_seed")
        within(self, 0, 100, "reweight_temperature")
        if self.max_duration is not None and (self.min_duration or 0) > self.max_duration:
            raise ValueError(f"min_duration: {self.min_duration} is above max_duration={self.max_duration}.")
        if self.trim_silence:
            raise ValueError("trim_silence: silence is not trimmed here: trim the files beforehand.")
        try:
            self.channel  # noqa: B018  # the property checks it
        except ValueError as error:
            raise ValueError(f"channel_selector: {str(error).partition(' is ')[2]}.") from None
        self._check_concat()
        self._check_buckets()

    def _check_concat(self) -> None:
        if self.concat_sampling_technique not in TECHNIQUES:
            raise ValueError(
                f"concat_sampling_technique: {self.concat_sampling_technique!r} is not one of {', '.join(TECHNIQUES)}."
            )
        shares = self.concat_sampling_probabilities
        if shares is not None and abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"concat_sampling_probabilities: {list(shares)} do not add up to 1.")

    def _check_buckets(self) -> None:
        if self.bucketing_strategy not in STRATEGIES:
            raise ValueError(f"bucketing_strategy: {self.bucketing_strategy!r} is not one of {', '.join(STRATEGIES)}.")
        bins, sizes = self.bucket_duration_bins, self.bucket_batch_size
        if bins is not None and list(bins) != sorted(bins):
            raise ValueError(f"bucket_duration_bins: {list(bins)} must be seconds in rising order.")
        if sizes is not None and (bins is None or len(bins) != len(sizes)):
            raise ValueError(
                f"bucket_batch_size: {list(sizes)} must be one size from 1 on for each of bucket_duration_bins "
                f"({0 if bins is None else len(bins)})."
            )
        by_bins = self.use_lhotse and sizes is not None
        if self.batch_size is None and self.batch_duration is None and not by_bins:
            raise ValueError("batch_size: give it, or batch_duration, or bucket_batch_size.")

    @property
    def channel(self) -> Channel | None:
        """Return the channel for utterances whose line chooses none. Raises ValueError."""
        return None if self.channel_field else parsed_channel(self.channel_selector)

    @property
    def channel_field(self) -> str | None:
        """Return the field of each line that holds its channel: with use_lhotse, any word but "average", as in NeMo."""
        word = self.channel_selector
        return word if self.use_lhotse and isinstance(word, str) and word != "average" else None

    @property
    def buckets(self) -> bool:
        """Return True if batches come from buckets of similar length. Unlike in NeMo, naming buckets is enough."""
        named = self.num_buckets or self.bucket_duration_bins or self.bucket_batch_size
        wanted = bool(named) if self.use_bucketing is None else self.use_bucketing
        return self.use_lhotse and wanted
