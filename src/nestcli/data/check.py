"""The checking of many files: each is decoded once, in processes that may die, and never again in a later run."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from nestcli.data import jail
from nestcli.data.inspection import AudioReport, inspect_audio
from nestcli.data.journal import Journal, file_version
from nestcli.data.pool import Died, Pool

Progress = Callable[[int, int], None]

_BATCH_BYTES, _BATCH_FILES = 8 << 20, 64  # of one task: enough that handing it over costs nothing beside it
_CRASHED = "decoder_crash"


def check_files(
    paths: Sequence[str], pool: Pool, journal: Journal, progress: Progress = lambda done, total: None
) -> dict[str, AudioReport]:
    """The report of every file, decoded now or in an earlier run if it is still the same file."""
    reports: dict[str, AudioReport] = {}
    todo: list[str] = []
    for path in paths:
        why = jail.outside(path)
        known = None if why else _from_json(journal.get(file_version(path)))
        if why:  # not in the journal: the next run may be in another jail
            reports[path] = AudioReport(reason=jail.REASON, detail=why)
        elif known is None:
            todo.append(path)
        else:
            reports[path] = known
    for number, (path, version, report) in enumerate(_checked(todo, pool), 1):
        reports[path] = report
        if report.reason != _CRASHED:  # of which the file need not be the cause
            journal.add(version, _as_json(report))
        if number % 16 == 0 or number == len(todo):
            journal.flush()
            progress(len(paths) - len(todo) + number, len(paths))
    return reports


def _checked(todo: Sequence[str], pool: Pool) -> Iterator[tuple[str, str, AudioReport]]:
    """Every path, the version of the file that was decoded, and its report."""
    sent: deque[list[str]] = deque()
    again: list[str] = []
    for results in pool.in_order(_inspect_all, _noting(_batches(todo), sent)):
        batch = sent.popleft()
        if isinstance(results, Died):
            again.extend(batch)  # one of them is the culprit
        else:
            yield from ((path, *result) for path, result in zip(batch, results, strict=True))
    for path, result in zip(again, pool.in_order(_inspect, again), strict=True):
        if isinstance(result, Died):
            yield path, "", AudioReport(reason=_CRASHED, detail=f"decoding it crashes: {result.detail}")
        else:
            yield path, *result


def _noting(batches: Iterable[list[str]], sent: deque[list[str]]) -> Iterator[list[str]]:
    """Pass batches on, and keep those under way: a list of all would be as large as the corpus's."""
    for batch in batches:
        sent.append(batch)
        yield batch


def _inspect_all(paths: Sequence[str]) -> list[tuple[str, AudioReport]]:
    return [_inspect(path) for path in paths]


def _inspect(path: str) -> tuple[str, AudioReport]:
    version = file_version(path)  # before it is read: what changes meanwhile is looked at again
    return version, inspect_audio(path)


def _batches(paths: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for path in paths:
        batch.append(path)
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


def _as_json(report: AudioReport) -> dict[str, Any]:
    """What differs from an empty report; infinities, which JSON does not have, as text."""
    empty = asdict(AudioReport())
    changed = {key: value for key, value in asdict(report).items() if value != empty[key]}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in changed.items()
    }


def _from_json(known: Any) -> AudioReport | None:
    """The report that a journal holds; None for what is no report of ours."""
    if not isinstance(known, dict):
        return None
    try:
        numbers: dict[str, Any] = {
            key: float(known[key]) for key in ("duration", "peak", "rms_db", "clipped") if key in known
        }
        return AudioReport(**{**known, **numbers})
    except (TypeError, ValueError):
        return None
