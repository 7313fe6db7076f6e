"""The scan of one manifest: every line is checked once, and what is kept of it are a few numbers."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import stat
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from json.decoder import JSONDecoder
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from nestcli.audio.channel import KEY as CHANNEL
from nestcli.audio.channel import parsed_channel
from nestcli.data.lhotse_cuts import cut_to_row, looks_like_cut
from nestcli.errors import DataError
from nestcli.files import user_path
from nestcli.jobs.cores import available_cores
from nestcli.jobs.pool import Died, local_pool
from nestcli.storage import addresses
from nestcli.storage.file_kinds import HEAD, no_manifest, why_no_json

MAX_LINE = 1 << 20  # bytes
MAX_SECONDS = 1e6
_OTHER_NAMES = ("audio_filename", "audio_file")  # of the path, which NeMo 3.0.0 reads too, in this order
NO_SHARD = -1
_RANGE = 1 << 25  # bytes of a manifest that one process scans at a time: some 200,000 lines
_MAX_UNPACKED = 1 << 32  # bytes kept of one .gz
_MAX_EXPANSION = 100  # of gzip; lines of manifests and cuts shrink to a tenth, or a thirtieth
_ALWAYS_UNPACKED = 1 << 24  # bytes
_MOST_OPEN = 256  # manifests that a process keeps open; a system allows 1,024 files, and a corpus may have more
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_open: set[int] = set()  # descriptors of manifests

Row = dict[str, Any]
ToRow = Callable[[Row], Row]


class Source:
    """The bytes of a manifest: a file, read in place, or the unpacked lines of a .gz, held in memory.

    Lines of a .gz cannot be read in place. What is kept of them is a NeMo row each, some 200 bytes, rather
    than a temporary file: nothing to clean up, no question where there is room, and forked workers share it.
    """

    def __init__(self, path: str, to_row: ToRow) -> None:
        self.path = path
        self.to_row = to_row
        local = addresses.local_copy(path, keep=True) if addresses.is_remote(path) else path
        self.absolute = str(Path(local).absolute())  # workers may stand in another folder
        self.folder = path.rpartition("/")[0] if addresses.is_remote(path) else str(Path(self.absolute).parent)
        self.unpacked: npt.NDArray[np.uint8] | None = None
        self._descriptor: int | None = None

    def read(self, position: int, size: int) -> bytes:
        if self.unpacked is not None:
            return self.unpacked[position : position + size].tobytes()
        if self._descriptor is not None:
            return os.pread(self._descriptor, size, position)  # no file position that forks or threads could share
        descriptor = os.open(self.absolute, os.O_RDONLY | os.O_CLOEXEC)
        if len(_open) < _MOST_OPEN:
            self._descriptor = descriptor
            _open.add(descriptor)
            weakref.finalize(self, _close, descriptor)
            return os.pread(descriptor, size, position)
        try:
            return os.pread(descriptor, size, position)
        finally:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


def _close(descriptor: int) -> None:
    _open.discard(descriptor)
    os.close(descriptor)


class Scan:
    """The columns of one manifest while they grow: a line's place in the file, its times, its shard."""

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


def to_row(record: Row) -> Row:
    """What a line says, as a row of a NeMo manifest; raises ValueError for what is no utterance."""
    if "audio_filepath" in record:
        if record.get("audio_filename", record["audio_filepath"]) != record["audio_filepath"]:
            raise ValueError(
                '"audio_filepath" and "audio_filename" name different files, and NeMo reads the latter; keep one'
            )
        return record
    for name in _OTHER_NAMES:
        if name in record:
            return {"audio_filepath": record.pop(name), **record}
    if looks_like_cut(record):
        return cut_to_row(record)
    if "sources" in record:
        raise ValueError("this is a Lhotse recording; write cuts, as CutSet.from_manifests makes them")
    raise ValueError(
        'there is no "audio_filepath" (nor "audio_filename", "audio_file"); every line must name its audio'
    )


def scan(path: str, *, require_duration: bool = True, to_row: ToRow = to_row) -> Scan:
    """Read and check every line of one manifest. Raises DataError naming file and line."""
    if not addresses.is_remote(path):
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
        raise DataError(what or f"{path} is no gzip file, though its name ends with .gz. Rename it.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Write it again.") from None
    if not found.lines:
        size = Path(found.source.absolute).stat().st_size
        empty = "no lines: it is empty" if size == 0 else "no lines"
        raise DataError(f"{path} has {empty}. A manifest has one JSON object a line for each utterance.")
    return found


def _no_manifest(source: Source, line: int, *, packed: bool | None = None) -> str:
    """What the file is in place of a manifest, if its first line is the bad one; empty otherwise."""
    packed = source.path.endswith(".gz") if packed is None else packed
    try:
        with gzip.open(source.absolute, "rb") if packed else Path(source.absolute).open("rb") as file:
            head = file.read(HEAD)
    except (OSError, EOFError, zlib.error):
        return ""
    blank = len(head) - len(head.lstrip())
    return no_manifest(source.path, head, packed=packed) if line == 1 + head[:blank].count(b"\n") else ""


class _TwiceError(ValueError):
    """A key stands twice in an object: which one counts would depend on who reads it."""


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(f"{_short(next(key for key in keys if keys.count(key) > 1))} stands twice in one object")
    return row


_JSON = JSONDecoder(object_pairs_hook=_once)


class _BadLineError(Exception):
    def __init__(self, line: int, why: str) -> None:
        super().__init__(line, why)
        self.line, self.why = line, why


# --- ranges of a large file, each scanned in a process of its own


def _scan_ranges(found: Scan, require_duration: bool) -> None:
    bounds = _line_starts(found.source.absolute, _RANGE)
    tasks = [_Range(found.source, require_duration, *pair) for pair in itertools.pairwise(bounds)]
    workers = min(len(tasks), available_cores())
    if workers < 2:
        parts: Iterable[_Part | _BadLineError | Died] = map(_scan_range, tasks)
        _gather(found, parts)
        return
    with local_pool(workers) as pool:
        _gather(found, pool.in_order(_scan_range, tasks))


@dataclass(frozen=True, slots=True)
class _Range:
    """The bytes from `start` to `end` of a manifest; both are starts of lines."""

    source: Source
    require_duration: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Part:
    """What a range held: the columns of a Scan, and the number of all its lines, empty ones among them."""

    columns: tuple[array[Any], ...]
    n_lines: int


def _line_starts(path: str, step: int) -> list[int]:
    """Places in a file, about `step` bytes apart, at which lines start: the first is 0, the last is its end."""
    size = Path(path).stat().st_size
    bounds = [0]
    with Path(path).open("rb") as file:
        while (wanted := bounds[-1] + step) < size:
            file.seek(wanted)
            rest = file.readline(MAX_LINE + 1)
            bounds.append(min(file.tell(), size))
            if len(rest) > MAX_LINE:  # who scans up to here says so; a file of terabytes may be nothing but this line
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
    """Read lines from where the file stands to `end`; how many there were.

    Most lines are plain and pass in a few µs; any other goes through `parse`, which has the messages.
    """
    json_value: Callable[[str, int], tuple[Any, int]] = _JSON.scan_once  # type: ignore[attr-defined]
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
                    and CHANNEL not in row
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
    """The `shard_id` of a row of tarred data; NO_SHARD where it says nothing usable."""
    shard = row.get("shard_id", NO_SHARD)
    return shard if type(shard) is int and 0 <= shard < 1 << 31 else NO_SHARD


def _check_expansion(path: str, file: Path) -> None:
    """Refuse a .gz that grows as no manifest does, before its lines are looked at, which takes far longer."""
    limit, size = max(_ALWAYS_UNPACKED, _MAX_EXPANSION * file.stat().st_size), 0
    with gzip.open(file, "rb") as packed:
        while piece := packed.read(1 << 20):
            size += len(piece)
            if size > limit:
                raise DataError(f"{path}: unpacked it has more than {limit:,} bytes, as no manifest has. Refused.")


def _keep(row: Row, found: Scan) -> tuple[int, int]:
    """Append a row to what is held in memory of a .gz; its place there."""
    kept = json.dumps(row, ensure_ascii=True).encode()
    start = len(found.unpacked)
    if start + len(kept) > _MAX_UNPACKED:
        raise DataError(f"{found.source.path} holds more than {_MAX_UNPACKED >> 30} GiB. Unpack it with gunzip.")
    found.unpacked += kept
    return start, len(kept)


def parse(line: bytes, to_row: ToRow) -> tuple[Row, float, float]:
    """The row, duration and offset of one line; raises ValueError saying what is wrong and what to do."""
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE >> 20} MiB; is this a manifest?")
    try:
        record = _JSON.decode(str(line.removeprefix(_BYTE_ORDER_MARK), "utf-8"))
    except _TwiceError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(why_no_json(line, error)) from None
    if not isinstance(record, dict):
        raise ValueError(f"{_short(record)} is no JSON object; a manifest has one {{...}} a line")
    row = to_row(record)
    return row, *check_row(row)


def check_row(row: Row) -> tuple[float, float]:
    """The duration and the offset of a row in seconds; raises ValueError for values that no utterance has."""
    check_path(row["audio_filepath"])
    parsed_channel(row.get(CHANNEL))
    return _seconds(row, "duration", math.nan), _seconds(row, "offset", 0.0)


def check_path(path: object) -> None:
    if not isinstance(path, str) or not path:
        raise ValueError(f'"audio_filepath" is {_short(path)}; it must name one file')
    if path.startswith("file:"):
        path = user_path(path)
    if "\0" in path:
        raise ValueError(f'"audio_filepath" is {_short(path)}, with a zero byte, as no file has in its name')
    if path.startswith(("pipe:", "|")) or path.endswith("|"):
        raise ValueError(f'"audio_filepath" is {_short(path)}, a command; only files are read')
    if "://" in path:
        addresses.check_remote(path)


def _seconds(row: Row, key: str, default: float) -> float:
    value = row.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(f'"{key}" is {_short(value)}; it must be a number of seconds from 0 to {MAX_SECONDS:g}')
    return float(value)


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
    """What `nest prepare-data` has written where a manifest was looked for."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)  # noqa: PTH112, PTH120  (pathlib raises for some)
    there = os.path.join(folder, "train_manifest.json")  # noqa: PTH118
    return f". Did you mean {there}?" if os.path.isfile(there) else ""  # noqa: PTH113


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
