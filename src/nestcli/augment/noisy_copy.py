"""Mix one noisy copy of an utterance, write it, and describe it so that it can be reproduced."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile as sf

from nestcli.audio.load import CHANNEL_KEY, Samples, reason_of
from nestcli.data.manifest import Entry, Manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.mixing import AugmentationConfig, Mixture, Segment, mix_into
from nestcli.data.utterance_audio import Clip, NoisePool, read_audio
from nestcli.errors import DataError, RunFailedError
from nestcli.files import atomic_file, file_name

_Row = dict[str, Any]

_TRIES = 50  # draws for an utterance of another speaker before all speakers are looked up
_UNREADABLE = 20  # consecutive unreadable utterances, after which silence is used
_QUIET_DB = -70.0  # dBFS; below it, 16 bits would change what was mixed, so 24 bits are written


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """Settings of the mixture, seed of the draws, and sample rate of the written files in Hz."""

    mixing: AugmentationConfig
    one_stretch: bool = False  # mix as SpeakerNoiseAugmentation, instead of as MultiSpeakerNoiseAugmentation
    seed: int = 0
    sample_rate: int = 16000


@dataclass(frozen=True, slots=True)
class CopyResult:
    """Result of one copy.

    `row` describes the written copy, or the rejected utterance; `size` is the size of the file in bytes, None if
    rejected; `noise` lists rejected noise files.
    """

    row: _Row
    size: int | None
    noise: list[_Row]


def write_copy(
    speech: str, noise: str | None, line: int, copy: int, folder: Path, options: CopyOptions, draws: str = ""
) -> CopyResult:
    """Write a noisy copy of a manifest's line below `folder`; every draw depends on (seed, copy, line).

    `draws` goes into the file's name, to distinguish this copy from those of other runs. Speech that cannot be read is
    rejected. Raises RunFailedError if nothing can be written, DataError if no noise can be read.
    """
    manifest = _opened(speech)
    entry = manifest.entry(line)
    try:
        clean = _finite(read_audio(entry, sample_rate=options.sample_rate), entry)
    except _RejectedError as error:
        return CopyResult(_rejection(entry, error.reason, str(error)), size=None, noise=[])
    except DataError as error:
        return CopyResult(_rejection(entry, reason_of(error), str(error)), size=None, noise=[])
    rng = random.Random(f"{options.seed}/augment/{copy}/{line}")  # noqa: S311  (no secrets)
    others = _Others(speech, line, options.sample_rate, rng)
    sources = _Sources(clean, others, others.draw(options.mixing.max_num_speakers))
    pool = None if noise is None else _pool(noise, options.sample_rate)

    def noise_of(_: int, count: int) -> Samples:
        if pool is None:
            return np.zeros(0, np.float32)
        sources.clip = pool.draw(len(clean), rng, count)
        return sources.clip.samples

    added, noisy, mixture = mix_into(sources, options.mixing, rng, noise_of, one_stretch=options.one_stretch)
    noisy, scale = _within_full_scale(noisy, 1.0 if mixture is None else mixture.scale)
    own = manifest.row(line)
    path = folder / f"{file_name(own['audio_filepath'], repr((entry.name, line, draws)))}-{copy}.flac"
    size = _write(path, noisy, min(_level_db(clean), _level_db(added)) + 20 * math.log10(scale), options.sample_rate)
    row = {
        **{key: value for key, value in own.items() if key not in ("offset", "shard_id", CHANNEL_KEY)},
        "audio_filepath": str(path),
        "duration": len(noisy) * 1_000_000 // options.sample_rate / 1e6,
        "clean_filepath": entry.audio_filepath,
        "clean_offset": entry.offset,
        "clean_duration": entry.duration,
        **({} if entry.channel is None else {"clean_channel": entry.channel}),
        **({} if entry.shard is None else {"clean_shard": entry.shard}),
        "augmentation": {**_described(mixture, clean, added, sources, noise), "scale": scale},
    }
    return CopyResult(row, size, noise=[] if pool is None else _unreadable(pool))


@lru_cache(maxsize=4)
def _opened(path: str) -> Manifest:
    return read_manifests(path)


@lru_cache(maxsize=1)
def _pool(path: str, sample_rate: int) -> NoisePool:
    return NoisePool(read_manifests(path, require_duration=False), sample_rate)


# --- what cannot be used


def _unreadable(pool: NoisePool) -> list[_Row]:
    return [
        {"audio_filepath": each.audio, "reason": each.reason, "detail": each.why, "kind": "noise"}
        for each in pool.take_skipped()
    ]


class _RejectedError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _finite(clean: Samples, entry: Entry) -> Samples:
    if not np.isfinite(clean).all():
        raise _RejectedError("not_finite", f"{entry.name}: some samples are NaN or infinite")
    return clean


def _rejection(entry: Entry, reason: str, detail: str) -> _Row:
    return {"audio_filepath": entry.audio_filepath, "reason": reason, "detail": detail, "line": entry.line}


# --- where sounds come from


@dataclass
class _Sources(Sequence[Samples]):
    """The utterance, followed by those of other speakers, which are read on first access."""

    clean: Samples
    others: _Others
    lines: list[int]
    clip: Clip | None = None
    _read: dict[int, Samples] = field(default_factory=dict)

    def __len__(self) -> int:
        return 1 + len(self.lines)

    def __getitem__(self, place: Any) -> Any:
        if place == 0:
            return self.clean
        if place not in self._read:
            self.lines[place - 1], self._read[place] = self.others.readable(self.lines[place - 1])
        return self._read[place]


@dataclass(frozen=True)
class _Others:
    """Utterances of the manifest by speakers other than that of `line`, as far as speakers are known."""

    path: str
    line: int
    sample_rate: int
    rng: random.Random

    def draw(self, count: int) -> list[int]:
        """Return up to `count` different lines."""
        speech = _opened(self.path)
        speaker = speech.entry(self.line).speaker
        found: list[int] = []
        for _ in range(_TRIES if len(speech) > 1 else 0):
            if len(found) == count:
                break
            other = self.rng.randrange(len(speech))
            is_new = other != self.line and other not in found
            if is_new and (speaker is None or speech.entry(other).speaker != speaker):
                found.append(other)
        if not found and speaker is not None:  # random draws fail if this speaker has nearly all lines
            foreign = np.flatnonzero(_speakers(self.path) != _speakers(self.path)[self.line])
            found = [int(foreign[place]) for place in self.rng.sample(range(len(foreign)), min(count, len(foreign)))]
        return found

    def readable(self, line: int) -> tuple[int, Samples]:
        """Return a line and its audio; another line if it cannot be read, or no samples if many cannot."""
        for _ in range(_UNREADABLE):
            try:
                return line, read_audio(_opened(self.path).entry(line), sample_rate=self.sample_rate)
            except DataError:
                line = (self.draw(1) or [line])[0]
        return line, np.zeros(0, np.float32)


@lru_cache(maxsize=1)
def _speakers(path: str) -> npt.NDArray[np.int64]:
    """Return a number for the speaker of every line."""
    manifest = _opened(path)
    numbers: dict[str | None, int] = {}
    return np.array([numbers.setdefault(manifest.entry(line).speaker, len(numbers)) for line in range(len(manifest))])


# --- what was done


def _described(mixture: Mixture | None, clean: Samples, added: Samples, sources: _Sources, noise: str | None) -> _Row:
    """Describe a mixture for the manifest: times in seconds, positions also in samples at the written rate."""
    if mixture is None or mixture.gain == 0:
        return {"mode": "none", "segments": [], "speakers": []}
    segments = [_segment(segment, sources, noise) for segment in mixture.segments]
    return {
        "mode": mixture.mode,
        "ratio_db": round(mixture.ratio_db, 4),
        "span_ratio_db": _span_ratio_db(mixture, clean, added),
        "gain": mixture.gain,
        "segments": segments,
        "speakers": sorted({piece["speaker"] for piece in segments if "speaker" in piece}),
    }


def _segment(segment: Segment, sources: _Sources, noise: str | None) -> _Row:
    rate = sources.others.sample_rate
    source: _Row = {"source": "white noise"}
    first = segment.source_start
    if segment.source is not None:
        other = _opened(sources.others.path).entry(sources.lines[segment.source - 1])
        source = _source(other)
        first += int(other.offset * rate)
        if other.speaker is not None:
            source["speaker"] = other.speaker
    elif sources.clip is not None and sources.clip.line is not None and noise is not None:
        source = _source(_opened(noise).entry(sources.clip.line))
        first += int(sources.clip.offset * rate)  # rounded down, as the reader does
    return {
        "start": round(segment.start / rate, 6),
        "duration": round(segment.length / rate, 6),
        **source,
        "source_offset": round(first / rate, 6),
        "start_sample": segment.start,
        "samples": segment.length,
        "source_sample": first,
    }


def _source(entry: Entry) -> _Row:
    chosen_there = {} if entry.channel is None else {"source_channel": entry.channel}
    return {"source": entry.audio_filepath, **chosen_there}


def _span_ratio_db(mixture: Mixture, clean: Samples, added: Samples) -> float | None:
    """Return the ratio of speech to noise in dB over the mixed parts only; None if one of them is silent there."""
    speech = noise = 0.0
    for segment in mixture.segments:
        place = slice(segment.start, segment.start + segment.length)
        speech += float(np.square(clean[place], dtype=np.float64).sum())
        noise += float(np.square(added[place], dtype=np.float64).sum())
    return round(10 * math.log10(speech / noise), 4) if speech > 0 and noise > 0 else None


# --- what is written


def _within_full_scale(noisy: Samples, scale: float) -> tuple[Samples, float]:
    """Scale the audio down if it would clip in the file; return it and the total factor since mixing."""
    peak = float(max(noisy.max(), -noisy.min()))
    return (noisy, scale) if peak <= 1 else (noisy / np.float32(peak), scale / peak)


def _write(path: Path, noisy: Samples, quietest_db: float, rate: int) -> int:
    """Write FLAC in 16 bits, or in 24 if rounding would change the faintest part; return the size in bytes.

    Raises RunFailedError: if one file cannot be written, others cannot either.
    """
    kind = "PCM_24" if quietest_db < _QUIET_DB else "PCM_16"
    full = 1 << (23 if kind == "PCM_24" else 15)
    whole = np.clip(np.rint(noisy.astype(np.float64) * full), -full, full - 1)  # libsndfile would map 1.0 to full - 1
    samples = whole.astype(np.int32) << 8 if kind == "PCM_24" else whole.astype(np.int16)
    flac = io.BytesIO()  # not directly into the file: soundfile does not report a full disk
    sf.write(flac, samples, rate, format="FLAC", subtype=kind)
    with atomic_file(
        path, RunFailedError, "Is the disk full? Run the same command again to continue.", sync=False
    ) as part:
        return part.write(flac.getvalue())


def _level_db(samples: Samples) -> float:
    """Return the RMS level in dBFS; 0 for silence, as rounding cannot change it."""
    energy = float(np.square(samples, dtype=np.float64).mean()) if len(samples) else 0.0
    return 10 * math.log10(energy) if energy > 0 else 0.0
