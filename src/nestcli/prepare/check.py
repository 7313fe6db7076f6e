"""Check many files: decode each one once, in processes that may die, and keep the reports for later runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from nestcli.audio.inspect import AudioReport, inspect_audio
from nestcli.jobs.journal import Journal, file_version
from nestcli.jobs.patience import PATIENCE, REMEDY, file_size, seconds_for
from nestcli.jobs.pool import Died, Pool
from nestcli.storage import allowed_folders

File = tuple[str, int | None]  # a path, and the channel to check; None for the average of all channels
Progress = Callable[[int, int], None]

_BATCH_BYTES, _BATCH_FILES = 8 << 20, 64  # of one task: large enough that the overhead of a task does not matter
_CRASHED, _TIMED_OUT = "decoder_crash", "timed_out"


def check_files(
    files: Sequence[File],
    pool: Pool,
    journal: Journal,
    progress: Progress = lambda done, total: None,
    patience: float = PATIENCE,
) -> dict[File, AudioReport]:
    """Return the report of every file; reuse the report of an earlier run if the file has not changed since.

    A file that takes longer than `patience` seconds, plus an allowance for its size, is reported as timed_out.
    """
    reports: dict[File, AudioReport] = {}
    todo: list[File] = []
    for file in files:
        why = allowed_folders.outside(file[0])
        known = None if why else _from_json(journal.get(_version(file)))
        if why:  # not stored in the journal, because the next run may allow other folders
            reports[file] = AudioReport(reason=allowed_folders.REASON, detail=why)
        elif known is None:
            todo.append(file)
        else:
            reports[file] = known
    for number, (file, version, report) in enumerate(_checked(todo, pool, patience), 1):
        reports[file] = report
        if report.reason not in (_CRASHED, _TIMED_OUT):  # the file is not always the cause of these
            journal.add(version, _as_json(report))
        if number % 16 == 0 or number == len(todo):
            journal.flush()
            progress(len(files) - len(todo) + number, len(files))
    return reports


def _checked(todo: Sequence[File], pool: Pool, patience: float) -> Iterator[tuple[File, str, AudioReport]]:
    """Yield every file, the version of it that was decoded, and its report."""
    sent: deque[list[File]] = deque()
    again: list[File] = []

    def limit(batch: Sequence[File]) -> float:
        return sum(seconds_for(file_size(path)) for path, _ in batch) + patience

    for results in pool.in_order(_inspect_all, _noting(_batches(todo), sent), limit):
        batch = sent.popleft()
        if isinstance(results, Died):
            again.extend(batch)  # one file is the cause: check them one by one to find it
        else:
            yield from ((file, *result) for file, result in zip(batch, results, strict=True))
    for file, result in zip(again, pool.in_order(_inspect, again, lambda file: limit([file])), strict=True):
        if isinstance(result, Died) and result.timed_out:
            yield file, "", AudioReport(reason=_TIMED_OUT, detail=f"{result.detail}; {REMEDY}")
        elif isinstance(result, Died):
            yield file, "", AudioReport(reason=_CRASHED, detail=f"decoding it crashes: {result.detail}")
        else:
            yield file, *result


def _noting(batches: Iterable[list[File]], sent: deque[list[File]]) -> Iterator[list[File]]:
    """Yield the batches, and keep the unfinished ones in `sent`: a list of all would be as long as the corpus."""
    for batch in batches:
        sent.append(batch)
        yield batch


def _inspect_all(files: Sequence[File]) -> list[tuple[str, AudioReport]]:
    return [_inspect(file) for file in files]


def _inspect(file: File) -> tuple[str, AudioReport]:
    version = _version(file)  # before reading, so that a file that changes meanwhile is checked again next time
    return version, inspect_audio(*file)


def _version(file: File) -> str:
    path, channel = file
    return file_version(path) if channel is None else f"{file_version(path)}\0channel {channel}"


def _batches(files: Iterable[File]) -> Iterator[list[File]]:
    batch: list[File] = []
    size = 0
    for file in files:
        batch.append(file)
        size += file_size(file[0])
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _as_json(report: AudioReport) -> dict[str, Any]:
    """Return the fields that differ from an empty report; infinities are text, as JSON cannot represent them."""
    empty = asdict(AudioReport())
    changed = {key: value for key, value in asdict(report).items() if value != empty[key]}
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in changed.items()
    }


def _from_json(known: Any) -> AudioReport | None:
    """Return the report that a journal entry holds, or None if it is not a valid report."""
    if not isinstance(known, dict):
        return None
    try:
        numbers: dict[str, Any] = {
            key: float(known[key]) for key in ("duration", "peak", "rms_db", "clipped") if key in known
        }
        return AudioReport(**{**known, **numbers})
    except (TypeError, ValueError):
        return None
