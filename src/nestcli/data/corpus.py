"""The blocks `model.train_ds` and `model.validation_ds`: their keys, checked, and the corpus that each names.

NeMo has three ways to name data, and all are supported: manifests of loose files, tars with manifests (`is_tarred`),
and Lhotse's (`use_lhotse`: cuts, Shar, weighted lists, `input_cfg`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig, OmegaConf

from nestcli.audio.load import CHANNEL_KEY, Channel, parsed_channel
from nestcli.checks import check_plain, read_yaml, short, within
from nestcli.config import require, section
from nestcli.data.manifest import Manifest, joined
from nestcli.data.manifest_scan import expand, read_manifests
from nestcli.data.tarred import read_shar, read_tarred
from nestcli.errors import ConfigError, DataError
from nestcli.files import user_path

TECHNIQUES = ("temperature", "random", "round-robin")
STRATEGIES = ("fixed_order", "synced_randomized", "fully_randomized")
_DEEPEST_GROUP, _MOST_ENTRIES = 8, 10_000  # limits for an input_cfg


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
            raise ValueError("trim_silence: nest does not trim silence. Trim the files beforehand.")
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
            raise ValueError("batch_size is not set. Set it, or batch_duration, or bucket_batch_size.")

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


@dataclass(frozen=True)
class Part:
    """One data set, and its weight if data sets are drawn by weight."""

    manifest: Manifest
    weight: float | None = None


@dataclass(frozen=True, eq=False)
class Corpus:
    """The lines for training or validation, and the data set of each. `weights` belong to the data sets.

    `in_buckets`: each data set is one of NeMo's buckets, and a batch holds lines of one bucket. `left_out` is the
    number of lines that are too short or too long.
    """

    speech: Manifest
    part_of: npt.NDArray[np.int16]
    n_parts: int
    weights: tuple[float, ...] | None
    in_buckets: bool
    left_out: int


def read_corpus(config: DictConfig, key: str) -> Corpus:
    """Open what the block at `key` names. Raises ConfigError and DataError."""
    settings = section(DatasetConfig, config, key)
    block = OmegaConf.select(config, key)
    parts = _lhotse_parts(block, settings, key) if settings.use_lhotse else None
    nested = False
    if parts is None:
        manifests = speech_manifests(config, key)
        tars = _plain(block.get("tarred_audio_filepaths"))
        _check_names(manifests, f"{key}.manifest_filepath")
        _check_names(tars, f"{key}.tarred_audio_filepaths")
        if (settings.is_tarred or settings.use_lhotse) and tars is not None:
            parts, nested = _tarred_parts(manifests, tars, settings.is_concat)
        elif settings.is_tarred:
            raise ConfigError(f"{key}.tarred_audio_filepaths is not set: name the tars, or set is_tarred=false.")
        else:
            parts, nested = _loose_parts(manifests, settings.is_concat, weighted=settings.use_lhotse)
    return _filtered(key, parts, settings, in_buckets=nested and not settings.is_concat and not settings.use_lhotse)


def wants_validation(config: DictConfig) -> bool:
    """Return True unless the configuration has no validation data, or uses none of it."""
    block = config.model.validation_ds
    if block is None or OmegaConf.select(config, "trainer.limit_val_batches") == 0:
        return False
    elsewhere = any(block.get(key) is not None for key in ("input_cfg", "shar_path", "cuts_path"))
    return elsewhere or OmegaConf.is_missing(block, "manifest_filepath") or block.manifest_filepath is not None


def speech_manifests(config: DictConfig, key: str) -> Any:
    """Return what the block at `key` names as manifests of speech. Raises ConfigError if it is not set."""
    none = "; null means no validation" if key == "model.validation_ds" else ""
    why = f"the manifest of the speech, as `nest prepare-data` writes it{none}"
    return _plain(require(config, f"{key}.manifest_filepath", why))


def noise_manifest(config: DictConfig, key: str) -> Manifest | None:
    """Open the noise manifest of the block at `key`, if it names one; lines need no duration, as in NeMo."""
    paths = _plain(OmegaConf.select(config, f"{key}.noise_manifest"))
    _check_names(paths, f"{key}.noise_manifest")
    return read_manifests(expand(paths), require_duration=False) if paths else None


# --- naming


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_names(paths: Any, key: str) -> None:
    """Raise ConfigError if a path is not a text or is empty, as with an unset variable, or if a list is empty."""
    if paths is not None and not isinstance(paths, str | list):
        raise ConfigError(f"{key}: {short(paths)} must be a path or a list of paths.")
    nothing = isinstance(paths, list) and not paths
    blank = isinstance(paths, str) and not all(each.strip(" []") for each in paths.split(","))
    if nothing or blank:
        raise ConfigError(f"{key} is not set: one of its paths is empty. Write the path, or leave it out.")
    if isinstance(paths, list):
        for each in paths[:1] if _is_weighted(paths) else paths:
            _check_names(each, key)


def _is_nested(paths: Any) -> bool:
    return isinstance(paths, list) and any(isinstance(each, list) for each in paths)


def _loose_parts(manifests: Any, is_concat: bool, *, weighted: bool) -> tuple[list[Part], bool]:
    """Return one data set, or one for each element of a list."""
    if weighted and (found := _weighted(manifests)):
        return [Part(read_manifests(expand(path)), weight) for path, weight in found], True
    if _is_nested(manifests) or (is_concat and isinstance(manifests, list)):
        return [Part(read_manifests(expand(each))) for each in manifests], True
    return [Part(read_manifests(expand(manifests)))], False


def _tarred_parts(manifests: Any, tars: Any, is_concat: bool) -> tuple[list[Part], bool]:
    if not (_is_nested(manifests) or (is_concat and isinstance(manifests, list))):
        return [Part(read_tarred(manifests, _flat(tars)))], False
    if not isinstance(tars, list) or len(tars) != len(manifests):
        n_tars = len(tars) if isinstance(tars, list) else 1
        raise ConfigError(
            f"tarred_audio_filepaths names tars of {n_tars} data sets and manifest_filepath manifests of "
            f"{len(manifests)}; give one entry of each for every data set."
        )
    return [Part(read_tarred(_flat(own), _flat(their))) for own, their in zip(manifests, tars, strict=True)], True


def _flat(paths: Any) -> list[str]:
    """Return the paths in nested lists."""
    return [path for each in paths for path in _flat(each)] if isinstance(paths, list) else [str(paths)]


def _weighted(paths: Any) -> list[tuple[str, float]]:
    """Return pairs of path and weight if a list holds such pairs, else an empty list."""
    pairs = [each for each in paths if _is_weighted(each)] if isinstance(paths, list) else []
    if pairs and len(pairs) < len(paths):
        raise ConfigError(f"{paths}: give a weight to all or to none of the data sets, as [[PATH, WEIGHT], ...].")
    return [(path, float(weight)) for path, weight in pairs]


def _is_weighted(each: Any) -> bool:
    return isinstance(each, list) and len(each) == 2 and isinstance(each[1], int | float)


def _lhotse_parts(block: DictConfig, settings: DatasetConfig, key: str) -> list[Part] | None:
    """Return the data sets that Lhotse's own keys name; None if none is set."""
    temperatures = settings.reweight_temperature
    if (entries := _plain(block.get("input_cfg"))) is not None:
        levels = list(temperatures) if isinstance(temperatures, tuple) else temperatures
        return _parts_of_input(entries, levels, itertools.count())
    if (path := _plain(block.get("shar_path"))) is not None:
        for each in path if isinstance(path, list) else [path]:
            if not isinstance(each, dict):
                _check_names(each, f"{key}.shar_path")
        if found := _weighted(path):
            return [Part(read_shar(each), weight) for each, weight in found]
        return [Part(read_shar(each)) for each in (path if isinstance(path, list) else [path])]
    if (path := _plain(block.get("cuts_path"))) is not None:
        _check_names(path, f"{key}.cuts_path")
        return [Part(read_manifests(expand(path)))]
    return None


def _parts_of_input(
    entries: Any, temperatures: list[float] | float | None, count: Iterator[int], depth: int = 0
) -> list[Part]:
    """Return the data sets of an `input_cfg`; the weight of a group multiplies the weights inside. Source: NeMo.

    `count` counts the entries of all levels: groups may be files, which may name each other.
    """
    if depth > _DEEPEST_GROUP:
        which = f"{entries}: " if isinstance(entries, str) else ""
        raise ConfigError(
            f"input_cfg: {which}more than {_DEEPEST_GROUP} groups are inside of each other. Does a file name itself?"
        )
    if isinstance(entries, str):
        path = Path(user_path(entries))
        entries = read_yaml(path)
        check_plain(entries, str(path))
    if not isinstance(entries, list) or not entries or not all(isinstance(each, dict) for each in entries):
        raise ConfigError(
            "input_cfg must be a list of data sets; give [{type: nemo, manifest_filepath: ..., weight: ...}]."
        )
    here, below = (
        (temperatures[:1], temperatures[1:]) if isinstance(temperatures, list) else ([temperatures], temperatures)
    )
    weights = _entry_weights(entries, here[0] if here else None)
    found = []
    for entry, weight in zip(entries, weights, strict=True):
        if next(count) >= _MOST_ENTRIES:
            raise ConfigError(f"input_cfg: there are more than {_MOST_ENTRIES:,} entries. Refused.")
        inner = _parts_of_entry(entry, below, count, depth)
        total = sum(1.0 if part.weight is None else part.weight for part in inner)
        found += [Part(part.manifest, weight * (1.0 if part.weight is None else part.weight) / total) for part in inner]
    return found


def _entry_weights(entries: Sequence[dict[str, Any]], temperature: float | None) -> list[float]:
    """Return the shares of one level of an input_cfg: weights raised to the temperature, or equal shares."""
    if all(entry.get("weight") is None for entry in entries):
        return [1 / len(entries)] * len(entries)
    raised = []
    for entry in entries:
        weight = entry.get("weight")
        if not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(
                f"input_cfg: the weight of {entry} must be above 0. Give a weight to all entries or to none."
            )
        raised.append(float(weight) ** (1.0 if temperature is None else temperature))
    return [weight / sum(raised) for weight in raised]


def _parts_of_entry(
    entry: dict[str, Any], temperatures: list[float] | float | None, count: Iterator[int], depth: int
) -> list[Part]:
    kind = entry.get("type")
    keys = {"nemo": "manifest_filepath", "nemo_tarred": "tarred_audio_filepaths", "lhotse": "cuts_path",
            "lhotse_shar": "shar_path", "group": "input_cfg"}  # fmt: skip
    if kind not in keys:
        raise ConfigError(f"input_cfg: the type {kind!r} is not one of {', '.join(keys)}.")
    if CHANNEL_KEY in entry:
        raise ConfigError(
            f"input_cfg: {CHANNEL_KEY} is not a key of an entry. Set it beside input_cfg, or in the lines."
        )
    if keys[kind] not in entry or (kind == "nemo_tarred" and "manifest_filepath" not in entry):
        raise ConfigError(f"input_cfg: an entry of type {kind} lacks {keys[kind]}: {entry}.")
    if kind == "group":
        return _parts_of_input(entry["input_cfg"], temperatures, count, depth + 1)
    if kind == "lhotse_shar":
        return [Part(read_shar(entry["shar_path"]))]
    if kind == "nemo_tarred":
        return [Part(read_tarred(_flat(entry["manifest_filepath"]), _flat(entry["tarred_audio_filepaths"])))]
    return [Part(read_manifests(expand(entry[keys[kind]])))]


# --- filtering


def _filtered(key: str, parts: Sequence[Part], settings: DatasetConfig, *, in_buckets: bool) -> Corpus:
    """Join all parts, without lines that are too short or too long."""
    repeats = settings.bucketing_weights if in_buckets and settings.bucketing_weights else (1,) * len(parts)
    if len(repeats) != len(parts):
        raise ConfigError(f"{key}.bucketing_weights: {len(repeats)} weights for {len(parts)} buckets.")
    speech = joined([part.manifest for part, times in zip(parts, repeats, strict=True) for _ in range(times)])
    sizes = [len(part.manifest) * times for part, times in zip(parts, repeats, strict=True)]
    part_of = np.repeat(np.arange(len(parts), dtype=np.int16), sizes)
    longest = np.inf if settings.max_duration is None else settings.max_duration
    if settings.bucket_batch_size and settings.buckets and settings.bucket_duration_bins:
        longest = min(longest, settings.bucket_duration_bins[-1])
    shortest = settings.min_duration or 0.0
    kept = np.flatnonzero((speech.durations >= shortest) & (speech.durations <= longest))
    if len(kept) == 0:
        raise DataError(
            f"{key}: none of the {len(speech)} utterances lasts between {shortest:g} and {longest:g} s "
            f"(theirs: {speech.durations.min():.2f} to {speech.durations.max():.2f} s). "
            f"Change {key}.min_duration or {key}.max_duration."
        )
    weights = tuple(part.weight for part in parts)
    named = all(weight is not None for weight in weights) and len(parts) > 1
    return Corpus(
        speech=speech if len(kept) == len(speech) else speech.select(kept),
        part_of=part_of[kept],
        n_parts=len(parts),
        weights=tuple(weight or 0.0 for weight in weights) if named else None,
        in_buckets=in_buckets and len(parts) > 1,
        left_out=len(speech) - len(kept),
    )
