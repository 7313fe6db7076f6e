"""Noisy copies of a corpus on disk, with a manifest that says exactly what was mixed where and how loud."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from nestcli.data.audio import Samples
from nestcli.data.augmentation import AugmentationConfig, Mixture, mix_into
from nestcli.data.cores import available_cores
from nestcli.data.journal import open_journal
from nestcli.data.manifest import Manifest, read_manifests, write_manifest
from nestcli.data.noise import Clip, NoisePool
from nestcli.data.pool import Died, local_pool
from nestcli.data.reading import read_audio
from nestcli.data.shape import file_name
from nestcli.errors import DataError
from nestcli.files import atomic_file

_LINES = 16  # of a task
_OTHER_SPEAKERS = 50  # draws for an utterance of somebody else
_QUIET_DB = -70.0  # dBFS; below it 16 bits would change what was mixed, and 24 are written


@dataclass(frozen=True, slots=True)
class AugmentOptions:
    """What to mix and how often: every utterance `copies` times, each time with other draws."""

    mixing: AugmentationConfig
    one_stretch: bool = False  # SpeakerNoiseAugmentation instead of MultiSpeakerNoiseAugmentation
    copies: int = 1
    seed: int = 0
    sample_rate: int = 16000
    jobs: int | None = None


@dataclass(frozen=True, slots=True)
class AugmentSummary:
    """What was written."""

    manifest: str | None
    written: int
    rejected: int
    hours: float
    modes: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Task:
    speech: str
    noise: str | None
    folder: str
    copy: int
    lines: list[int]
    options: AugmentOptions
    versions: tuple[str, ...]  # of the manifests: others make other audio


def augment(
    speech: str,
    noise: str | None,
    out: str | os.PathLike[str],
    options: AugmentOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AugmentSummary:
    """Write noisy audio to `out`/audio, and `out`/manifest.json and rejected.jsonl.

    Every draw depends on (seed, copy, line) alone. A run that was interrupted goes on where it was. Raises DataError.
    """
    if options.copies < 1:
        raise DataError(f"{options.copies} copies are none; give 1 or more")
    n_lines = len(read_manifests(speech))
    if noise is not None:
        read_manifests(noise)
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = replace(options, jobs=None)  # what draws do not depend on
    versions = tuple(_version(path) for path in (speech, noise) if path is not None)
    tasks = [
        _Task(speech, noise, str(folder), copy, list(range(first, min(first + _LINES, n_lines))), drawn, versions)
        for copy in range(options.copies)
        for first in range(0, n_lines, _LINES)
    ]
    rows: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    with open_journal(folder) as journal, local_pool(options.jobs or available_cores()) as pool:
        known = [_made_before(journal.get(repr(task))) for task in tasks]
        fresh = pool.in_order(_augment_lines, (task for task, done in zip(tasks, known, strict=True) if done is None))
        for task, done in zip(tasks, known, strict=True):
            result = done if done is not None else next(fresh)
            if isinstance(result, Died):
                raise DataError(f"lines {task.lines[0] + 1} to {task.lines[-1] + 1} of {speech}: {result.detail}")
            if done is None:
                journal.add(repr(task), result)
                journal.flush()
            rows += result[0]
            rejected += result[1]
            progress(len(rows) + len(rejected), n_lines * options.copies)
    write_manifest(folder / "rejected.jsonl", rejected)
    if rows:
        write_manifest(folder / "manifest.json", rows)
    return AugmentSummary(
        manifest=str(folder / "manifest.json") if rows else None,
        written=len(rows),
        rejected=len(rejected),
        hours=round(math.fsum(row["duration"] for row in rows) / 3600, 6),
        modes=dict(Counter(row["augmentation"]["mode"] for row in rows)),
    )


def _version(path: str) -> str:
    try:
        status = Path(path).stat()
    except OSError:  # several, or a remote one
        return path
    return f"{status.st_size}/{status.st_mtime_ns}"


def _made_before(result: list[list[dict[str, Any]]] | None) -> list[list[dict[str, Any]]] | None:
    """What an earlier run wrote, if all of it is still there."""
    return result if result is not None and all(Path(row["audio_filepath"]).is_file() for row in result[0]) else None


# --- in a process of the pool


@lru_cache(maxsize=4)
def _opened(path: str) -> Manifest:
    return read_manifests(path)


def _augment_lines(task: _Task) -> list[list[dict[str, Any]]]:
    """The rows written, and those of what could not be read."""
    written, rejected = [], []
    for line in task.lines:
        try:
            written.append(_augment_line(line, task))
        except DataError as error:
            path = _opened(task.speech).entry(line).audio_filepath
            rejected.append({"audio_filepath": path, "reason": "unreadable", "detail": str(error)})
    return [written, rejected]


@dataclass
class _Sources:
    """Where the sounds of an utterance's mixture come from."""

    lines: list[int]
    clip: Clip | None = None


def _augment_line(line: int, task: _Task) -> dict[str, Any]:
    options, speech = task.options, _opened(task.speech)
    rng = random.Random(f"{options.seed}/augment/{task.copy}/{line}")  # noqa: S311  (no secrets)
    entry = speech.entry(line)
    clean = read_audio(entry, sample_rate=options.sample_rate)
    others = _readable(_others(line, entry.speaker, speech, options.mixing.max_num_speakers, rng), speech, options)
    sources = _Sources([line, *(other for other, _ in others)])
    pool = None if task.noise is None else NoisePool(_opened(task.noise), options.sample_rate)

    def noise_of(_: int, count: int) -> Samples:
        if pool is None:
            return np.zeros(0, np.float32)
        sources.clip = pool.draw(len(clean), rng, count)
        return sources.clip.samples

    _, noisy, mixture = mix_into(
        [clean, *(sound for _, sound in others)], options.mixing, rng, noise_of, one_stretch=options.one_stretch
    )
    row = speech.row(line)
    # other draws make other files: none of another run's is written over
    name = f"{file_name(row['audio_filepath'], repr((entry.name, line, task.options, task.versions)))}-{task.copy}.flac"
    path = Path(task.folder) / "audio" / name
    _write(path, noisy, clean, options.sample_rate)
    placed = {"clean_offset": entry.offset, "clean_duration": entry.duration} if entry.offset else {}
    kept = {key: value for key, value in row.items() if key not in ("offset", "shard_id")}
    return {
        **kept,
        "audio_filepath": str(path),
        "duration": len(noisy) * 1_000_000 // options.sample_rate / 1e6,
        "clean_filepath": entry.audio_filepath,
        **placed,
        "augmentation": _record(mixture, clean, noisy, sources, task),
    }


def _others(line: int, speaker: str | None, speech: Manifest, count: int, rng: random.Random) -> list[int]:
    """Lines of other speakers, as far as speakers are known."""
    found: list[int] = []
    for _ in range(_OTHER_SPEAKERS):
        if len(found) == count or len(speech) == 1:
            break
        other = rng.randrange(len(speech))
        if other == line or other in found or (speaker is not None and speech.entry(other).speaker == speaker):
            continue
        found.append(other)
    return found


def _readable(lines: Sequence[int], speech: Manifest, options: AugmentOptions) -> list[tuple[int, Samples]]:
    """Those lines that can be read, and their sounds."""
    found = []
    for line in lines:
        try:
            found.append((line, read_audio(speech.entry(line), sample_rate=options.sample_rate)))
        except DataError:
            continue
    return found


def _record(mixture: Mixture | None, clean: Samples, noisy: Samples, sources: _Sources, task: _Task) -> dict[str, Any]:
    """What was done to an utterance, in a manifest's words; times in seconds, places also in samples."""
    if mixture is None or mixture.gain == 0:
        return {"mode": "none"}
    rate = task.options.sample_rate
    speech = _opened(task.speech)
    segments = []
    for segment in mixture.segments:
        piece: dict[str, Any] = {
            "start": round(segment.start / rate, 6),
            "duration": round(segment.length / rate, 6),
            "start_sample": segment.start,
            "samples": segment.length,
        }
        if segment.source is None:
            assert sources.clip is not None
            line, first = sources.clip.line, sources.clip.offset
            noise = None if line is None or task.noise is None else _opened(task.noise).entry(line).audio_filepath
            piece.update(source=noise or "white noise", source_offset=round(first + segment.source_start / rate, 6))
        else:
            other = speech.entry(sources.lines[segment.source])
            offset = round(other.offset + segment.source_start / rate, 6)
            piece.update(source=other.audio_filepath, source_offset=offset)
            if other.speaker is not None:
                piece["speaker"] = other.speaker
        segments.append(piece)
    return {
        "mode": mixture.mode,
        "ratio_db": round(mixture.ratio_db, 4),
        "span_ratio_db": _span_ratio_db(mixture, clean, noisy),
        "gain": mixture.gain,
        "scale": mixture.scale,
        "segments": segments,
        "speakers": sorted({piece["speaker"] for piece in segments if "speaker" in piece}),
    }


def _span_ratio_db(mixture: Mixture, clean: Samples, noisy: Samples) -> float | None:
    """The ratio of speech to what was mixed in, over the mixed parts alone."""
    speech = noise = 0.0
    for segment in mixture.segments:
        place = slice(segment.start, segment.start + segment.length)
        added = noisy[place] / np.float32(mixture.scale) - clean[place]
        speech += float(np.square(clean[place], dtype=np.float64).sum())
        noise += float(np.square(added, dtype=np.float64).sum())
    return round(10 * math.log10(speech / noise), 4) if speech > 0 and noise > 0 else None


def _write(path: Path, noisy: Samples, clean: Samples, rate: int) -> None:
    quietest = min(_level_db(clean), _level_db(noisy - clean) if len(noisy) == len(clean) else 0.0)
    with atomic_file(path, DataError) as part:
        sf.write(part, noisy, rate, format="FLAC", subtype="PCM_24" if quietest < _QUIET_DB else "PCM_16")


def _level_db(samples: Samples) -> float:
    energy = float(np.square(samples, dtype=np.float64).mean()) if len(samples) else 0.0
    return 10 * math.log10(energy) if energy > 0 else 0.0
