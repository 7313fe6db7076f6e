"""The checking of many files: each is decoded once, in processes that may die, and never again in a later run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from nestcli.data.audio import AudioReport, inspect_audio
from nestcli.data.journal import Journal
from nestcli.data.pool import Died, Pool

Progress = Callable[[int, int], None]

_BATCH_BYTES, _BATCH_FILES = 8 << 20, 64  # of one task: enough that handing it over costs nothing beside it
_CRASHED = "decoder_crash"


def check_files(
    paths: Sequence[str], pool: Pool, journal: Journal, progress: Progress = lambda done, total: None
) -> dict[str, AudioReport]:
    """The report of every file, decoded now or in an earlier run if it is still the same file."""
    reports: dict[str, AudioReport] = {}
    todo: list[tuple[str, str]] = []
    for path in paths:
        key = _version(path)
        known = journal.get(key)
        if known is None:
            todo.append((path, key))
        else:
            reports[path] = _from_json(known)
    for number, (path, key, report) in enumerate(_checked(todo, pool), 1):
        reports[path] = report
        if report.reason != _CRASHED:  # of which the file need not be the cause
            journal.add(key, _as_json(report))
        if number % 16 == 0 or number == len(todo):
            journal.flush()
            progress(len(paths) - len(todo) + number, len(paths))
    return reports


def _checked(todo: Sequence[tuple[str, str]], pool: Pool) -> Iterator[tuple[str, str, AudioReport]]:
    batches = list(_batches(todo))
    again: list[tuple[str, str]] = []
    tasks = ([path for path, _ in each] for each in batches)
    for batch, results in zip(batches, pool.in_order(_inspect_all, tasks), strict=True):
        if isinstance(results, Died):
            again.extend(batch)  # one of them is the culprit
        else:
            yield from ((path, key, report) for (path, key), report in zip(batch, results, strict=True))
    for (path, key), result in zip(again, pool.in_order(inspect_audio, (path for path, _ in again)), strict=True):
        if isinstance(result, Died):
            result = AudioReport(reason=_CRASHED, detail=f"decoding it crashes: {result.detail}")
        yield path, key, result


def _inspect_all(paths: Sequence[str]) -> list[AudioReport]:
    return [inspect_audio(path) for path in paths]


def _batches(todo: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for path, key in todo:
        batch.append((path, key))
        size += _size(path)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116  (str paths, perhaps with bytes that are not UTF-8)
    except (OSError, ValueError):
        return 0


def _version(path: str) -> str:
    """A name for a file as it is now."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return f"{path}\0gone"
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"


def _as_json(report: AudioReport) -> dict[str, Any]:
    """What differs from an empty report; infinities, which JSON does not have, as text."""
    empty = asdict(AudioReport())
    changed = {key: value for key, value in asdict(report).items() if value != empty[key]}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in changed.items()
    }


def _from_json(known: dict[str, Any]) -> AudioReport:
    numbers: dict[str, Any] = {
        key: float(known[key]) for key in ("duration", "peak", "rms_db", "clipped") if key in known
    }
    return AudioReport(**{**known, **numbers})
