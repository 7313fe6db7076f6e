"""Cut accepted recordings into pieces of limited length, and convert them to files of one channel and rate.

Each recording is decoded once, in blocks, so that memory holds at most a block or a piece of it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile as sf

from nestcli.audio.load import Samples, resampled, stream_audio
from nestcli.errors import DataError, RunFailedError
from nestcli.files import atomic_file
from nestcli.jobs.journal import REMEDY, Journal, file_version
from nestcli.jobs.patience import PATIENCE, file_size, seconds_for
from nestcli.jobs.patience import REMEDY as REMEDY_OF_PATIENCE
from nestcli.jobs.pool import Died, Pool

# The last piece has at least this share of the longest allowed piece; the others have at least three times this share
# of an even division.
_LEAST = 0.25
_HOP, _WINDOW = 0.01, 0.2  # s: levels are compared every 10 ms, over 200 ms


_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class ShapeOptions:
    """Options of cutting and converting.

    `segment` is the longest piece in seconds; None leaves recordings whole. `folder` receives converted files; None
    converts nothing.
    """

    segment: float | None = None
    folder: str | None = None
    sample_rate: int = 16000
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class ShapeTask:
    """A recording or a part of one, in seconds; `name` is the path of its files below the folder, without extension."""

    path: str
    offset: float
    duration: float
    name: str
    options: ShapeOptions


@dataclass(frozen=True, slots=True)
class Piece:
    """An utterance that was cut, in seconds of its file; `size` is the file's size in bytes if it was converted."""

    path: str
    offset: float
    duration: float
    size: int | None = None


def shape(
    tasks: Sequence[ShapeTask],
    pool: Pool,
    journal: Journal,
    progress: Callable[[int, int], None],
    patience: float = PATIENCE,
) -> Iterator[list[Piece] | str]:
    """Yield the pieces of every task, or an error message. Pieces from an earlier run that still exist are reused."""
    todo = [number for number, task in enumerate(tasks) if _made_before(journal, task) is None]
    results = pool.in_order(
        _shape_one,
        (tasks[number] for number in todo),
        lambda task: patience + seconds_for(file_size(task.path), task.offset + task.duration),
    )
    for number, result in _filled(len(tasks), todo, results):
        if result is None:  # read from the journal again: a list of all pieces would be as long as the corpus
            yield _made_before(journal, tasks[number]) or "it changed during the run; run the same command again"
            continue
        if isinstance(result, Died):
            yield f"{result.detail}; {REMEDY_OF_PATIENCE}" if result.timed_out else f"its process died: {result.detail}"
            continue
        version, outcome = result
        if isinstance(outcome, list):
            journal.add(version, [[piece.path, piece.offset, piece.duration, piece.size] for piece in outcome])
            journal.flush()
        progress(number + 1, len(tasks))
        yield outcome


def _filled(count: int, numbers: Sequence[int], results: Iterator[_Result]) -> Iterator[tuple[int, _Result | None]]:
    """Yield each number below `count`, with the next result if it is one of `numbers` (sorted), else with None."""
    wanted = deque(numbers)
    for number in range(count):
        if wanted and wanted[0] == number:
            wanted.popleft()
            yield number, next(results)
        else:
            yield number, None


def _version(task: ShapeTask) -> str:
    return f"{task!r}\0{file_version(task.path)}"


def _made_before(journal: Journal, task: ShapeTask) -> list[Piece] | None:
    known = journal.get(_version(task))
    try:
        pieces = None if known is None else [Piece(*each) for each in known]
    except TypeError:  # not an entry that nest wrote
        return None
    if pieces is None or not all(_is_of(piece, task) for piece in pieces):
        return None
    return pieces


def _is_of(piece: Piece, task: ShapeTask) -> bool:
    """Return True if a piece is a part of the task's recording, or an unchanged file in the task's folder."""
    if task.options.folder is None:
        return piece.path == task.path and piece.size is None
    ours = str(piece.path).startswith(f"{task.options.folder}/") and ".." not in Path(piece.path).parts
    return ours and piece.size == file_size(piece.path) != 0


# --- one recording


def _shape_one(task: ShapeTask) -> tuple[str, list[Piece] | str]:
    """Return the version of the file that was read, and the pieces or an error message."""
    version = _version(task)
    options = task.options
    try:
        with stream_audio(task.path, offset=task.offset, duration=task.duration, channel=options.channel) as (
            rate,
            blocks,
        ):
            if options.folder is None:
                return version, _marked(task, rate, blocks)
            blocks = resampled(blocks, rate, options.sample_rate)
            if options.segment is None:
                return version, [_written(task, "", blocks)]
            pieces = _cut(blocks, task.duration, options.segment, options.sample_rate)
            return version, [_written(task, f"-{number:04d}", [piece]) for number, piece in enumerate(pieces)]
    except (DataError, OSError) as error:
        return version, str(error)


def _marked(task: ShapeTask, rate: int, blocks: Iterable[Samples]) -> list[Piece]:
    """Return the pieces as parts of the same file, in whole microseconds."""
    assert task.options.segment is not None
    pieces: list[Piece] = []
    start, samples = task.offset, 0
    for piece in _cut(blocks, task.duration, task.options.segment, rate):
        samples += len(piece)
        stop = math.floor(task.offset * 1e6 + samples * 1_000_000 / rate) / 1e6
        pieces.append(Piece(task.path, start, round(stop - start, 6)))
        start = stop
    return pieces


def _written(task: ShapeTask, number: str, blocks: Iterable[Samples]) -> Piece:
    """Write the blocks to a file. Raises RunFailedError: if one file cannot be written, others cannot either."""
    rate, frames = task.options.sample_rate, 0
    path = Path(task.options.folder or "") / f"{task.name}{number}.flac"
    # Write through a Python file: given a descriptor, libsndfile silently loses the last page when the disk is full.
    with atomic_file(path, RunFailedError, REMEDY, sync=False) as part:
        with sf.SoundFile(part, "w", rate, 1, subtype="PCM_16", format="FLAC") as sound:
            for block in blocks:
                _write(sound, block, path)
                frames += len(block)
        part.flush()
        size = os.fstat(part.fileno()).st_size
    return Piece(str(path), 0.0, frames * 1_000_000 // rate / 1e6, size)


def _write(sound: sf.SoundFile, block: Samples, path: Path) -> None:
    try:
        sound.write(block)
    except (sf.LibsndfileError, AssertionError):  # soundfile asserts that everything was written
        raise RunFailedError(f"{path} cannot be written. {REMEDY}") from None


# --- cutting


def _cut(blocks: Iterable[Samples], duration: float, segment: float, rate: int) -> Iterator[Samples]:
    """Cut a recording of about `duration` s into pieces of at most `segment` s.

    Each piece ends in the middle of the quietest 200 ms between three quarters of its even share and the limit.
    """
    longest = max(1, int(segment * rate))
    left = round(duration * rate)
    waiting: deque[Samples] = deque()
    held = 0
    for block in blocks:
        waiting.append(block)
        held += len(block)
        while left > longest and held >= longest:
            samples = np.concatenate(waiting)
            stop = _end_of_piece(samples, left, longest, rate)
            yield samples[:stop]
            waiting = deque([samples[stop:]])
            held, left = held - stop, left - stop
    rest = np.concatenate(waiting) if waiting else np.zeros(0, np.float32)
    while len(rest) > longest:
        stop = _end_of_piece(rest, len(rest), longest, rate)
        yield rest[:stop]
        rest = rest[stop:]
    if len(rest):
        yield rest


def _end_of_piece(samples: Samples, left: int, longest: int, rate: int) -> int:
    """Return the end of the first piece of `left` remaining samples; `samples` holds at least `longest` of them."""
    first = int(3 * _LEAST * left / math.ceil(left / longest))
    last = min(longest, int(left - _LEAST * longest))  # leaves a remainder that is long enough to use
    return min(longest, first + _quietest(samples[first:last], rate))


def _quietest(samples: Samples, rate: int) -> int:
    """Return the middle of the quietest 200 ms, in samples, at least 1."""
    if not len(samples):
        return 1
    hop = max(1, int(_HOP * rate))
    levels = np.add.reduceat(np.square(samples, dtype=np.float64), np.arange(0, len(samples), hop))
    width = min(len(levels), round(_WINDOW / _HOP))
    smooth = np.convolve(levels, np.ones(width), mode="valid")
    return max(1, int(np.argmin(smooth)) * hop + width * hop // 2)
