"""What becomes of an accepted recording on request: pieces of a limited length, and files of one channel and rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import soundfile as sf

from nestcli.data.audio import Samples, load_audio
from nestcli.data.journal import Journal
from nestcli.data.pool import Died, Pool
from nestcli.errors import DataError
from nestcli.files import atomic_file

_LEAST = 0.25  # of the longest piece: what the last one has at least; the others have three times that share of a mean
_HOP, _WINDOW = 0.01, 0.2  # s: levels are compared every 10 ms, over 200 ms


@dataclass(frozen=True, slots=True)
class ShapeOptions:
    """`segment` is in seconds, None leaves recordings whole; `folder` is for converted files, None makes none."""

    segment: float | None = None
    folder: str | None = None
    sample_rate: int = 16000
    channel: int | None = None


@dataclass(frozen=True, slots=True)
class ShapeTask:
    """A recording or a part of one, in seconds; `name` is that of its files, below the folder and without ending."""

    path: str
    offset: float
    duration: float
    name: str
    options: ShapeOptions


@dataclass(frozen=True, slots=True)
class Piece:
    """An utterance that came out, in seconds of its file."""

    path: str
    offset: float
    duration: float


def shape(
    tasks: Sequence[ShapeTask], pool: Pool, journal: Journal, progress: Callable[[int, int], None]
) -> list[list[Piece] | str]:
    """The pieces of every task, or what is wrong with it. What an earlier run made, and is still there, stays."""
    keys = [repr(task) for task in tasks]
    found: list[list[Piece] | str | None] = [_made_before(journal.get(key)) for key in keys]
    todo = [number for number, pieces in enumerate(found) if pieces is None]
    for done, (number, result) in enumerate(
        zip(todo, pool.in_order(_shape_one, (tasks[number] for number in todo)), strict=True), 1
    ):
        found[number] = f"its process died: {result.detail}" if isinstance(result, Died) else result
        if isinstance(result, list):
            journal.add(keys[number], [[piece.path, piece.offset, piece.duration] for piece in result])
        journal.flush()
        progress(len(tasks) - len(todo) + done, len(tasks))
    return [each if each is not None else [] for each in found]


def file_name(key: str, path: str) -> str:
    """A name below the folder of converted files: as the input calls it, and no other input's."""
    parts = [part for part in Path(key).with_suffix("").parts if part not in ("/", "..", ".")]
    readable = "/".join(_plain(part) for part in parts[-3:])
    return f"{readable}-{blake2b(path.encode('utf-8', 'surrogateescape'), digest_size=5).hexdigest()}"


def _plain(part: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in part)
    return kept.lstrip(".-")[:80] or "_"


def _made_before(known: list[tuple[str, float, float]] | None) -> list[Piece] | None:
    pieces = None if known is None else [Piece(*each) for each in known]
    if pieces is None or not all(Path(piece.path).is_file() for piece in pieces):
        return None
    return pieces


def _shape_one(task: ShapeTask) -> list[Piece] | str:
    options = task.options
    pieces: list[Piece] = []
    start, end = task.offset, task.offset + task.duration
    try:
        while end - start > 1e-6:
            stop, samples = _next_piece(task, start, end)
            if options.folder is None:
                pieces.append(Piece(task.path, round(start, 6), round(stop - start, 6)))
            else:
                number = "" if options.segment is None else f"-{len(pieces):04d}"
                path = Path(options.folder) / f"{task.name}{number}.flac"
                _write(path, samples, options.sample_rate)
                pieces.append(Piece(str(path), 0.0, len(samples) * 1_000_000 // options.sample_rate / 1e6))
            start = stop
    except (DataError, OSError) as error:
        return str(error)
    return pieces


def _next_piece(task: ShapeTask, start: float, end: float) -> tuple[float, Samples]:
    """Where the piece from `start` on ends, in seconds, and its samples."""
    options = task.options
    left = end - start
    n_pieces = 1 if options.segment is None else math.ceil(left / options.segment - 1e-9)
    if n_pieces == 1 and options.folder is None:
        return end, np.zeros(0, np.float32)
    longest = left
    if options.segment is not None and n_pieces > 1:  # what is left is long enough to be of use
        longest = min(options.segment, left - _LEAST * options.segment)
    samples = load_audio(
        task.path, sample_rate=options.sample_rate, offset=start, duration=longest, channel=options.channel
    )
    if n_pieces == 1:
        return end, samples
    first = min(int(_LEAST * 3 * left / n_pieces * options.sample_rate), len(samples) - 1)
    cut = first + _quietest(samples[first:], options.sample_rate)
    return start + cut / options.sample_rate, samples[:cut]


def _quietest(samples: Samples, rate: int) -> int:
    """The middle of the quietest 200 ms, as a number of samples, at least 1."""
    hop = max(1, int(_HOP * rate))
    levels = np.add.reduceat(np.square(samples, dtype=np.float64), np.arange(0, len(samples), hop))
    width = min(len(levels), round(_WINDOW / _HOP))
    smooth = np.convolve(levels, np.ones(width), mode="valid")
    return max(1, (int(np.argmin(smooth)) * hop) + width * hop // 2)


def _write(path: Path, samples: Samples, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        sf.write(part, samples, rate, format="FLAC", subtype="PCM_16")
