"""Write noisy copies of a corpus to disk, with a manifest that records exactly what was mixed, where and how loud."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nestcli.augment.noisy_copy import CopyOptions, write_copy
from nestcli.data.manifest import write_manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import DataError, RunFailedError
from nestcli.files import refuse_links
from nestcli.jobs.cores import available_cores
from nestcli.jobs.journal import Journal, file_version, open_journal
from nestcli.jobs.patience import PATIENCE, file_size, seconds_for
from nestcli.jobs.pool import Died, local_pool

_LINES = 16  # manifest lines per task


@dataclass(frozen=True, slots=True)
class AugmentOptions:
    """Options of an augmentation: every utterance gets `copies` noisy copies, each with its own random draws.

    `jobs` None means one process per core. A file that does not respond within
    `patience` seconds is skipped.
    """

    copy: CopyOptions
    copies: int = 1
    jobs: int | None = None
    patience: float = PATIENCE

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise DataError(f"{self.copies} copies are not possible; give 1 or more")
        if self.jobs is not None and self.jobs < 1:
            raise DataError(f"{self.jobs} processes are not possible; give --jobs 1 or more")
        if not self.patience > 0:
            raise DataError(f"{self.patience:g} s is too short for any file; give --patience more than 0")


@dataclass(frozen=True, slots=True)
class AugmentSummary:
    """Summary of the output; `rejected` counts copies that could not be made, `noise_rejected` noise files."""

    manifest: str | None
    written: int
    rejected: int
    noise_rejected: int
    hours: float
    modes: dict[str, int]
    reasons: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Task:
    """Lines from `first` up to but excluding `end`, in one of the copies."""

    speech: str
    noise: str | None
    folder: str
    copy: int
    first: int
    end: int
    options: CopyOptions
    versions: tuple[str, ...]  # the manifests' versions: a changed manifest gives different audio


def augment(
    speech: str,
    noise: str | None,
    out: str | os.PathLike[str],
    options: AugmentOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AugmentSummary:
    """Write noisy audio to `out`/audio, and afterwards `out`/manifest.json and rejected.jsonl.

    Every draw depends only on (seed, copy, line), so neither processes nor interruptions change the result. After an
    interruption the same call continues where it stopped. Raises DataError, and RunFailedError if nothing can be
    written.
    """
    folder = Path(out).absolute()
    target = folder / "manifest.json"
    for path in (speech, noise):
        if path is not None and target.exists() and Path(path).exists() and target.samefile(path):
            raise DataError(f"--out {out} would replace {path}, which is an input; give another folder")
    lines = read_manifests(speech)
    n_lines, longest = len(lines), float(lines.durations.max())
    del lines
    if noise is not None:
        read_manifests(noise, require_duration=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise DataError(f"{folder} cannot be created: {problem.strerror}; give another --out") from None
    for name in ("audio", "preview"):
        refuse_links(folder / name, DataError)
    versions = tuple(file_version(path) for path in (speech, noise) if path is not None)
    tasks = [
        _Task(speech, noise, str(folder), copy, first, min(first + _LINES, n_lines), options.copy, versions)
        for copy in range(options.copies)
        for first in range(0, n_lines, _LINES)
    ]
    with open_journal(folder) as journal:
        _make_all(
            tasks, journal, options.jobs or available_cores(), target, progress, partial(_limit, options, longest)
        )
        return _write_manifests(tasks, journal, folder, target)


def _make_all(
    tasks: list[_Task],
    journal: Journal,
    jobs: int,
    target: Path,
    progress: Callable[[int, int], None],
    limit: Callable[[_Task], float],
) -> None:
    """Run every task that is not in the journal yet, and add its result."""
    todo = [task for task in tasks if _made_before(journal, task) is None]
    if todo:
        for torn in (target.parent / "audio").rglob(".*.tmp"):  # left by a killed run
            torn.unlink(missing_ok=True)
    total = sum(task.end - task.first for task in tasks)
    done = total - sum(task.end - task.first for task in todo)
    with local_pool(jobs) as pool:
        for task, result in zip(todo, pool.in_order(_make_copies, todo, limit), strict=True):
            journal.add(repr(task), _one_by_one(task, limit) if isinstance(result, Died) else result)
            journal.flush()
            done += task.end - task.first
            progress(done, total)


def _write_manifests(tasks: list[_Task], journal: Journal, folder: Path, target: Path) -> AugmentSummary:
    """Write the journal's results as manifests; memory holds the rows of one task at a time."""
    modes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    noise: set[str] = set()
    microseconds = 0

    def written() -> Iterator[dict[str, Any]]:
        nonlocal microseconds
        for task in tasks:
            for row in _made(journal, task)["written"]:
                modes[row["augmentation"]["mode"]] += 1
                microseconds += round(row["duration"] * 1e6)
                yield row

    def rejected() -> Iterator[dict[str, Any]]:
        for task in tasks:
            made = _made(journal, task)
            reasons.update(row["reason"] for row in made["rejected"])
            yield from made["rejected"]
            for row in made["noise"]:
                if row["audio_filepath"] not in noise:
                    noise.add(row["audio_filepath"])
                    yield row

    write_manifest(folder / "rejected.jsonl", rejected())
    n_written = sum(task.end - task.first for task in tasks) - sum(reasons.values())
    if n_written:
        write_manifest(target, written())
    return AugmentSummary(
        manifest=str(target) if n_written else None,
        written=n_written,
        rejected=sum(reasons.values()),
        noise_rejected=len(noise),
        hours=round(microseconds / 3.6e9, 6),
        modes=dict(modes),
        reasons=dict(reasons),
    )


def _made(journal: Journal, task: _Task) -> dict[str, Any]:
    result: dict[str, Any] | None = journal.get(repr(task))
    if result is None:
        raise RunFailedError(f"{task.folder}: the disk lost written data. Run the same command again to continue.")
    return result


def _made_before(journal: Journal, task: _Task) -> dict[str, Any] | None:
    """Return the result in the journal if its audio still exists, else None."""
    result: dict[str, Any] | None = journal.get(repr(task))
    if result is None:
        return None
    files = zip(result["written"], result["sizes"], strict=True)
    return result if all(size == file_size(row["audio_filepath"]) != 0 for row, size in files) else None


def _limit(options: AugmentOptions, longest: float, task: _Task) -> float:
    """Return the time limit of a task in seconds; lines are up to `longest` s, and each is mixed with other lines."""
    a_line = 1.0 + seconds_for(0, longest) * (1 + options.copy.mixing.max_num_speakers)
    return options.patience + a_line * (task.end - task.first)


def _one_by_one(task: _Task, limit: Callable[[_Task], float]) -> dict[str, list[Any]]:
    """Repeat a task whose process died, each line in a task of its own, so that a crash rejects only one line."""
    found: dict[str, list[Any]] = {key: [] for key in ("written", "sizes", "rejected", "noise")}
    with local_pool(1) as pool:
        singles = [replace(task, first=line, end=line + 1) for line in range(task.first, task.end)]
        for single, result in zip(singles, pool.in_order(_make_copies, singles, limit), strict=True):
            if isinstance(result, Died):
                entry = read_manifests(task.speech).entry(single.first)
                reason = "timed_out" if result.timed_out else "crashed"
                row = {"audio_filepath": entry.audio_filepath, "reason": reason, "detail": result.detail}
                found["rejected"].append({**row, "line": entry.line})
                continue
            for key, more in result.items():
                found[key] += more
    return found


def _make_copies(task: _Task) -> dict[str, list[Any]]:
    """Write the copies of a task; runs in a process of the pool."""
    audio = Path(task.folder) / "audio"
    lines = range(task.first, task.end)
    draws = repr(
        (task.options, task.versions)
    )  # other draws get other file names: nothing of another run is overwritten
    made = [write_copy(task.speech, task.noise, line, task.copy, audio, task.options, draws) for line in lines]
    return {
        "written": [each.row for each in made if each.size is not None],
        "sizes": [each.size for each in made if each.size is not None],
        "rejected": [each.row for each in made if each.size is None],
        "noise": [row for each in made for row in each.noise],
    }
