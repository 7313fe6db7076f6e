"""Opening manifests: paths and ranges are expanded, every line is checked once, and a few numbers per line are kept."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import re
import stat
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from nestcli.audio.load import CHANNEL_KEY
from nestcli.data.manifest import JSON, MAX_LINE, MAX_SECONDS, Manifest, Row, Source, ToRow, joined, parse, to_row
from nestcli.errors import DataError
from nestcli.files import is_remote, user_path
from nestcli.jobs.cores import available_cores
from nestcli.jobs.pool import Died, local_pool
from nestcli.storage.file_kinds import HEAD, no_manifest

NO_SHARD = -1
_PIECE = 1 << 25  # bytes of a manifest that one process scans at a time: about 200,000 lines
_MAX_UNPACKED = 1 << 32  # bytes kept of one .gz
_MAX_EXPANSION = 100  # by gunzip; lines of manifests and cuts grow by a factor of 10 to 30
_ALWAYS_UNPACKED = 1 << 24  # bytes
# `_OP_0..7_CL_` is NeMo's spelling of `{0..7}` for command lines; NeMo also accepts the other brackets.
_RANGE = re.compile(r"(?:_OP_|[{(\[<])([0-9]+)\.\.([0-9]+)(?:_CL_|[})\]>])")
_MOST_SHARDS = 1_000_000
_MOST_RANGES, _MOST_DIGITS = 8, 18  # ranges in a path, digits in a number


class Scan:
    """The growing columns of one manifest: each line's position in the file, its times, its shard."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.positions, self.sizes, self.lines = array("q"), array("i"), array("i")
        self.durations, self.offsets, self.shards = array("d"), array("d"), array("i")
        self.unpacked = bytearray()

    @property
    def columns(self) -> tuple[array[Any], ...]:
        return self.positions, self.sizes, self.lines, self.durations, self.offsets, self.shards

    def add(self, line: int, position: int, size: int, duration: float, offset: float, shard: int) -> None:
        self.positions.append(position)
        self.sizes.append(size)
        self.lines.append(line)
        self.durations.append(duration)
        self.offsets.append(offset)
        self.shards.append(shard)


def read_manifests(paths: str | Sequence[str], *, require_duration: bool = True) -> Manifest:
    """Open NeMo manifests and Lhotse cuts, plain or .gz; a string may name several, separated by commas.

    Checks every line. Raises DataError naming file and line.
    """
    names = split_paths(paths) if isinstance(paths, str) else [os.fspath(path) for path in paths]
    if not names:
        raise DataError("no manifest is given; name a file of JSON lines, as `nest prepare-data` writes")
    return joined([of_scan(scan(user_path(name), require_duration=require_duration)) for name in names])


def of_scan(found: Scan) -> Manifest:
    """Convert a scan to a manifest, without shards."""
    count = len(found.lines)
    return Manifest(
        durations=np.frombuffer(found.durations),
        offsets=np.frombuffer(found.offsets),
        sources=(found.source,),
        source_of=np.zeros(count, np.int32),
        positions=np.frombuffer(found.positions, np.int64),
        sizes=np.frombuffer(found.sizes, np.int32),
        lines=np.frombuffer(found.lines, np.int32),
        shard_of=np.full(count, -1, np.int32),
    )


def split_paths(paths: str) -> list[str]:
    """Split a string of names at its commas, unless a file of the whole name exists."""
    if os.path.isfile(user_path(paths)):  # noqa: PTH113  (pathlib raises for a name that is too long, as many joined ones are)
        return [paths]
    return [name.strip() for name in paths.split(",") if name.strip()]


def expand(paths: str | Sequence[str]) -> list[str]:
    """Expand the ranges in paths: `audio__OP_0..2_CL_.tar` names three files. Raises DataError."""
    names = split_paths(paths) if isinstance(paths, str) else [str(path) for path in paths]
    expanded: list[str] = []
    for each in names:
        expanded += _expanded(each)
        if len(expanded) > max(_MOST_SHARDS, len(names)):
            raise DataError(f"{names[0][:200]}, ...: the ranges name more than {_MOST_SHARDS:,} files. Give fewer.")
    return expanded


def _expanded(path: str) -> list[str]:
    elsewhere = is_remote(path)
    path = user_path(path)
    found = _RANGE.search(path)
    if found is None or (not elsewhere and os.path.exists(path)):  # noqa: PTH110  (pathlib raises for long names)
        return [path if elsewhere else str(Path(path))]
    _check_ranges(path)
    first, last = found.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    before, after = path[: found.start()], path[found.end() :]
    return [name for number in numbers for name in _expanded(f"{before}{number:0{width}}{after}")]


def _check_ranges(path: str) -> None:
    """Refuse ranges that name no files, or impossibly many, before the names are made."""
    ranges, total = _RANGE.findall(path), 1
    for first, last in ranges:
        if max(len(first), len(last)) > _MOST_DIGITS or int(first) > int(last):
            written = f"{first[:20]}..{last[:20]}"
            raise DataError(f"{path[:200]}: the range {written} names no files; write it as _OP_0..7_CL_")
        total *= int(last) - int(first) + 1
    if total > _MOST_SHARDS or len(ranges) > _MOST_RANGES:
        raise DataError(f"{path[:200]}: its ranges name more than {_MOST_SHARDS:,} files. Give fewer.")


def scan(path: str, *, require_duration: bool = True, to_row: ToRow = to_row) -> Scan:
    """Read and check every line of one manifest. Raises DataError naming file and line."""
    if not is_remote(path):
        _check_file(path)
    found = Scan(Source(path, to_row))
    try:
        if path.endswith(".gz"):
            _check_expansion(path, Path(found.source.absolute))
            with gzip.open(found.source.absolute, "rb") as file:
                _scan_lines(cast(IO[bytes], file), found, require_duration, packed=True)
            found.source.unpacked = np.frombuffer(found.unpacked, np.uint8)
        else:
            _scan_ranges(found, require_duration)
    except _BadLineError as bad:
        raise DataError(_no_manifest(found.source, bad.line) or f"{path}, line {bad.line}: {bad.why}") from None
    except gzip.BadGzipFile:
        what = _no_manifest(found.source, 1, packed=False)
        raise DataError(what or f"{path} is not a gzip file, though its name ends with .gz. Rename it.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Write it again.") from None
    if not found.lines:
        size = Path(found.source.absolute).stat().st_size
        empty = "no lines: it is empty" if size == 0 else "no lines"
        raise DataError(f"{path} has {empty}. A manifest has one JSON object per line for each utterance.")
    return found


def _no_manifest(source: Source, line: int, *, packed: bool | None = None) -> str:
    """Say what kind of file this is instead of a manifest; return "" if the bad line is not the first."""
    packed = source.path.endswith(".gz") if packed is None else packed
    try:
        with gzip.open(source.absolute, "rb") if packed else Path(source.absolute).open("rb") as file:
            head = file.read(HEAD)
    except (OSError, EOFError, zlib.error):
        return ""
    blank = len(head) - len(head.lstrip())
    return no_manifest(source.path, head, packed=packed) if line == 1 + head[:blank].count(b"\n") else ""


class _BadLineError(Exception):
    def __init__(self, line: int, why: str) -> None:
        super().__init__(line, why)
        self.line, self.why = line, why


# --- ranges of a large file, each scanned in its own process


def _scan_ranges(found: Scan, require_duration: bool) -> None:
    bounds = _line_starts(found.source.absolute, _PIECE)
    tasks = [_Range(found.source, require_duration, *pair) for pair in itertools.pairwise(bounds)]
    if len(tasks) < 2 or (cores := available_cores()) < 2:
        _gather(found, map(_scan_range, tasks))
        return
    with local_pool(min(len(tasks), cores)) as pool:
        _gather(found, pool.in_order(_scan_range, tasks))


@dataclass(frozen=True, slots=True)
class _Range:
    """The bytes from `start` to `end` of a manifest; both are at the start of a line."""

    source: Source
    require_duration: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Part:
    """The content of a range: the columns of a Scan, and the number of its lines, including empty ones."""

    columns: tuple[array[Any], ...]
    n_lines: int


def _line_starts(path: str, step: int) -> list[int]:
    """Return starts of lines, about `step` bytes apart: the first is 0, the last is the end of the file."""
    size = Path(path).stat().st_size
    bounds = [0]
    with Path(path).open("rb") as file:
        while (wanted := bounds[-1] + step) < size:
            file.seek(wanted)
            rest = file.readline(MAX_LINE + 1)
            bounds.append(min(file.tell(), size))
            if len(rest) > MAX_LINE:  # the scan of this range reports it; a file of terabytes may be a single line
                break
    return bounds if bounds[-1] == size else [*bounds, size]


def _scan_range(task: _Range) -> _Part | _BadLineError:
    part = Scan(task.source)
    try:
        with Path(task.source.absolute).open("rb") as file:
            file.seek(task.start)
            n_lines = _scan_lines(file, part, task.require_duration, packed=False, end=task.end)
    except _BadLineError as bad:
        return bad
    return _Part(part.columns, n_lines)


def _gather(found: Scan, parts: Iterable[_Part | _BadLineError | Died]) -> None:
    n_lines = 0
    for part in parts:
        if isinstance(part, Died):
            raise DataError(f"{found.source.path} could not be read: {part.detail}")
        if isinstance(part, _BadLineError):
            raise _BadLineError(n_lines + part.line, part.why)
        for column, more in zip(found.columns, part.columns, strict=True):
            column.extend(more)
        if n_lines:
            first = len(found.lines) - len(part.columns[2])
            np.frombuffer(found.lines, np.int32)[first:] += n_lines
        n_lines += part.n_lines


# --- lines


def _scan_lines(file: IO[bytes], found: Scan, require_duration: bool, *, packed: bool, end: float = math.inf) -> int:
    """Read lines from the current position of the file to `end`; return their number.

    Most lines are plain and take a few µs; any other goes through `parse`, which has the messages.
    """
    json_value: Callable[[str, int], tuple[Any, int]] = JSON.scan_once  # type: ignore[attr-defined]
    position, number = file.tell(), 0
    while position < end and (line := file.readline(MAX_LINE + 1)):
        number += 1
        start, size = position, len(line)
        position += size
        if not packed:
            try:
                text = line.decode()
                row, length = json_value(text, 0)
                path, duration, offset = row["audio_filepath"], row["duration"], row.get("offset", 0.0)
                if (
                    text[length:] == "\n"
                    and type(path) is str
                    and type(duration) is float
                    and type(offset) is float
                    and 0 <= duration <= MAX_SECONDS
                    and 0 <= offset <= MAX_SECONDS
                    and path
                    and "audio_filename" not in row
                    and not (":" in path or "|" in path or "\0" in path)
                    and CHANNEL_KEY not in row
                ):
                    found.add(number, start, size, duration, offset, _shard(row))
                    continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StopIteration):
                pass
        if line.isspace():
            continue
        try:
            row, duration, offset = parse(line, found.source.to_row)
            if require_duration and math.isnan(duration):
                raise ValueError('there is no "duration"; `nest prepare-data` measures it')
        except ValueError as error:
            raise _BadLineError(number, str(error)) from None
        if packed:
            start, size = _keep(row, found)
        found.add(number, start, size, duration, offset, _shard(row))
    return number


def _shard(row: Row) -> int:
    """Return the `shard_id` of a row of tarred data; NO_SHARD if it has no valid one."""
    shard = row.get("shard_id", NO_SHARD)
    return shard if type(shard) is int and 0 <= shard < 1 << 31 else NO_SHARD


def _check_expansion(path: str, file: Path) -> None:
    """Refuse a .gz that unpacks to far more than a manifest would, before the much slower check of its lines."""
    limit, size = max(_ALWAYS_UNPACKED, _MAX_EXPANSION * file.stat().st_size), 0
    with gzip.open(file, "rb") as packed:
        while piece := packed.read(1 << 20):
            size += len(piece)
            if size > limit:
                raise DataError(
                    f"{path} unpacks to more than {limit:,} bytes, which is too large for a manifest. Refused."
                )


def _keep(row: Row, found: Scan) -> tuple[int, int]:
    """Append a row to the unpacked lines of a .gz; return its position and size there."""
    kept = json.dumps(row, ensure_ascii=True).encode()
    start = len(found.unpacked)
    if start + len(kept) > _MAX_UNPACKED:
        raise DataError(f"{found.source.path} unpacks to more than {_MAX_UNPACKED >> 30} GiB. Unpack it with gunzip.")
    found.unpacked += kept
    return start, len(kept)


def check_there(paths: str | Sequence[str]) -> None:
    """Raise DataError if one of these paths, with commas and ranges, is not a file; remote ones are not looked at."""
    for path in expand(paths):
        if not is_remote(path):
            _check_file(path)


def _check_file(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {path}: {getattr(error, 'strerror', None) or error}{_prepared(path)}") from None
    if stat.S_ISDIR(mode):
        remedy = _prepared(path) or ". Of a folder of audio `nest prepare-data FOLDER --out DIR` makes one"
        raise DataError(f"manifest {path} is a folder; name a file of JSON lines{remedy}")
    if not stat.S_ISREG(mode):
        raise DataError(f"manifest {path} is a pipe or a device; name a file of JSON lines")


def _prepared(path: str) -> str:
    """Return a hint that names a manifest of `nest prepare-data` near a wrong path; "" if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)  # noqa: PTH112, PTH120  (pathlib raises for some)
    there = os.path.join(folder, "train_manifest.json")  # noqa: PTH118
    return f". Did you mean {there}?" if os.path.isfile(there) else ""  # noqa: PTH113
