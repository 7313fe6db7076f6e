"""Noisy copies of a corpus on disk, with a manifest that says exactly what was mixed where and how loud."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestcli.data.cores import available_cores
from nestcli.data.journal import Journal, open_journal
from nestcli.data.manifest import read_manifests, write_manifest
from nestcli.data.noisy_copy import CopyOptions, write_copy
from nestcli.data.pool import Died, local_pool
from nestcli.errors import DataError

_LINES = 16  # of a task
_Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class AugmentOptions:
    """Every utterance `copies` times, each time with other draws; by default in one process a core."""

    copy: CopyOptions
    copies: int = 1
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise DataError(f"{self.copies} copies are none; give 1 or more")
        if self.jobs is not None and self.jobs < 1:
            raise DataError(f"{self.jobs} processes cannot work; give --jobs 1 or more")


@dataclass(frozen=True, slots=True)
class AugmentSummary:
    """What was written. `rejected` counts copies that could not be made, `noise_rejected` files of noise."""

    manifest: str | None
    written: int
    rejected: int
    noise_rejected: int
    hours: float
    modes: dict[str, int]
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Task:
    speech: str
    noise: str | None
    folder: str
    copy: int
    lines: list[int]
    options: CopyOptions
    versions: tuple[str, ...]  # of the manifests: others make other audio


def augment(
    speech: str,
    noise: str | None,
    out: str | os.PathLike[str],
    options: AugmentOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AugmentSummary:
    """Write noisy audio to `out`/audio, and when that is done `out`/manifest.json and rejected.jsonl.

    Every draw depends on (seed, copy, line) alone, so neither processes nor interruptions change the result. A run that
    was interrupted goes on where it was. Raises DataError.
    """
    folder = Path(out).absolute()
    target = folder / "manifest.json"
    for path in (speech, noise):
        if path is not None and target.exists() and Path(path).exists() and target.samefile(path):
            raise DataError(f"--out {out} would replace {path}, which is to be read; give another folder")
    n_lines = len(read_manifests(speech))
    if noise is not None:
        read_manifests(noise)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"{folder} cannot be made: {problem.strerror}; give another --out") from None
    versions = tuple(_version(path) for path in (speech, noise) if path is not None)
    tasks = [
        _Task(
            speech, noise, str(folder), copy, list(range(first, min(first + _LINES, n_lines))), options.copy, versions
        )
        for copy in range(options.copies)
        for first in range(0, n_lines, _LINES)
    ]
    written: _Rows = []
    rejected: _Rows = []
    unreadable: dict[str, dict[str, Any]] = {}
    with open_journal(folder) as journal:
        for rows, bad, bad_noise in _results(tasks, journal, options.jobs or available_cores(), target):
            written += rows
            rejected += bad
            for row in bad_noise:
                unreadable.setdefault(row["audio_filepath"], row)
            progress(len(written) + len(rejected), n_lines * options.copies)
        write_manifest(folder / "rejected.jsonl", [*rejected, *unreadable.values()])
        if written:
            write_manifest(target, written)
    return AugmentSummary(
        manifest=str(target) if written else None,
        written=len(written),
        rejected=len(rejected),
        noise_rejected=len(unreadable),
        hours=round(math.fsum(row["duration"] for row in written) / 3600, 6),
        modes=dict(Counter(row["augmentation"]["mode"] for row in written)),
        reasons=dict(Counter(row["reason"] for row in rejected)),
    )


def _version(path: str) -> str:
    try:
        status = Path(path).stat()
    except OSError:  # several, or a remote one
        return path
    return f"{status.st_size}/{status.st_mtime_ns}"


def _results(tasks: list[_Task], journal: Journal, jobs: int, target: Path) -> Iterator[list[_Rows]]:
    """Of every task what was written, what was rejected, and noise that was; from an earlier run where it is there."""
    known = [_made_before(journal.get(repr(task))) for task in tasks]
    if None in known:
        target.unlink(missing_ok=True)  # it would tell of audio that is about to be replaced
    todo = (task for task, done in zip(tasks, known, strict=True) if done is None)
    with local_pool(jobs) as pool:
        fresh = pool.in_order(_make_copies, todo)
        for task, done in zip(tasks, known, strict=True):
            result = done if done is not None else next(fresh)
            if isinstance(result, Died):
                result = _one_by_one(task)
            if done is None:
                journal.add(repr(task), result)
                journal.flush()
            yield result


def _made_before(result: list[_Rows] | None) -> list[_Rows] | None:
    """The result in a journal, if its audio is still there."""
    if result is None or not all(Path(row["audio_filepath"]).is_file() for row in result[0]):
        return None
    return result


def _one_by_one(task: _Task) -> list[_Rows]:
    """The lines of a task whose process died, each in a task of its own: a crash is charged to one line."""
    found: list[_Rows] = [[], [], []]
    with local_pool(1) as pool:
        singles = [replace(task, lines=[line]) for line in task.lines]
        for single, result in zip(singles, pool.in_order(_make_copies, singles), strict=True):
            if isinstance(result, Died):
                entry = read_manifests(task.speech).entry(single.lines[0])
                row = {"audio_filepath": entry.audio_filepath, "reason": "crashed", "detail": result.detail}
                result = [[], [{**row, "line": entry.line}], []]
            found = [rows + more for rows, more in zip(found, result, strict=True)]
    return found


def _make_copies(task: _Task) -> list[_Rows]:
    """In a process of the pool."""
    audio = Path(task.folder) / "audio"
    made = [write_copy(task.speech, task.noise, line, task.copy, audio, task.options) for line in task.lines]
    return [
        [each.row for each in made if not each.rejected],
        [each.row for each in made if each.rejected],
        [row for each in made for row in each.noise],
    ]
