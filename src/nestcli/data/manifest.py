"""Manifests: lists of utterances in NeMo's JSON lines or Lhotse's cuts.

A manifest of millions of lines stays on the disk. `Manifest` holds 36 bytes a line (where it stands, how long
the audio is and where it starts), and reads the rest of a line when it is asked for an entry.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import stat
import weakref
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from nestcli.data.cuts import cut_to_row, looks_like_cut
from nestcli.errors import DataError
from nestcli.files import write_text

MAX_LINE = 1 << 20  # bytes
MAX_SECONDS = 1e6
_MAX_UNPACKED = 1 << 32  # bytes kept of one .gz
_KEY_ORDER = ("audio_filepath", "duration", "offset", "speaker", "text", "lang", "reason", "detail")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Entry:
    """One utterance: `duration` s of a file from `offset` s on, and the line (from 1) that says so."""

    audio_filepath: str
    duration: float
    offset: float
    speaker: str | None
    text: str | None
    lang: str | None
    line: int
    manifest: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """The lines of one or more manifests, in their order; may be pickled to other processes.

    `durations` and `offsets` are in seconds, float64, one a line. A duration that the line does not state is
    NaN, where `read_manifests` was told to let that pass.
    """

    durations: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.float64]
    sources: tuple[_Source, ...] = field(repr=False)
    source_of: npt.NDArray[np.int32] = field(repr=False)
    positions: npt.NDArray[np.int64] = field(repr=False)  # in bytes
    sizes: npt.NDArray[np.int32] = field(repr=False)  # in bytes
    lines: npt.NDArray[np.int32] = field(repr=False)

    def __len__(self) -> int:
        return len(self.durations)

    def select(self, indices: npt.ArrayLike) -> Manifest:
        """The lines at `indices` (or where a mask is true), in that order."""
        chosen = np.asarray(indices)
        if not chosen.size:  # numpy makes an empty list one of floats
            chosen = chosen.astype(np.intp)
        columns = ("durations", "offsets", "source_of", "positions", "sizes", "lines")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def row(self, index: int) -> dict[str, Any]:
        """Everything that a line says, its path as it stands there; raises DataError if the file changed."""
        source = self.sources[self.source_of[index]]
        try:
            return _parse(source.read(int(self.positions[index]), int(self.sizes[index])))[0]
        except (OSError, ValueError) as error:
            where = f"{source.path}, line {self.lines[index]}"
            raise DataError(f"{where}: {error}. Did the file change since it was opened? Start again.") from None

    def entry(self, index: int) -> Entry:
        """Read one line; a relative path is looked for beside its manifest first."""
        source, row = self.sources[self.source_of[index]], self.row(index)
        speaker, text, lang = (_text(row.get(key)) for key in ("speaker", "text", "lang"))
        return Entry(
            audio_filepath=_resolve(row["audio_filepath"], source.folder),
            duration=float(self.durations[index]),
            offset=float(self.offsets[index]),
            speaker=speaker,
            text=text,
            lang=lang,
            line=int(self.lines[index]),
            manifest=source.path,
        )


def read_manifests(paths: str | Sequence[str], *, require_duration: bool = True) -> Manifest:
    """Open NeMo manifests and Lhotse cuts, plain or .gz; a string may name several, joined by commas.

    Every line is checked. Raises DataError naming file and line.
    """
    names = _split(paths) if isinstance(paths, str) else [os.fspath(path) for path in paths]
    if not names:
        raise DataError("no manifest is given; name a file of JSON lines, as `nest prepare-data` writes")
    scans = [_scan(name, require_duration) for name in names]
    return Manifest(
        durations=np.concatenate([np.frombuffer(scan.durations) for scan in scans]),
        offsets=np.concatenate([np.frombuffer(scan.offsets) for scan in scans]),
        sources=tuple(scan.source for scan in scans),
        source_of=np.repeat(np.arange(len(scans), dtype=np.int32), [len(scan.lines) for scan in scans]),
        positions=np.concatenate([np.frombuffer(scan.positions, np.int64) for scan in scans]),
        sizes=np.concatenate([np.frombuffer(scan.sizes, np.int32) for scan in scans]),
        lines=np.concatenate([np.frombuffer(scan.lines, np.int32) for scan in scans]),
    )


def write_manifest(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines: a file of that name is either complete or not there at all."""
    write_text(path, (_dump(row) + "\n" for row in rows), DataError)


def _dump(row: Mapping[str, Any]) -> str:
    order = [*(key for key in _KEY_ORDER if key in row), *sorted(row.keys() - set(_KEY_ORDER))]
    ordered = {key: row[key] for key in order}
    line = json.dumps(ordered, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, or a file name that is not UTF-8
        return json.dumps(ordered)
    return line


# --- scanning


class _Source:
    """The bytes of a manifest: a file, read in place, or the unpacked lines of a .gz, held in memory.

    Lines of a .gz cannot be read in place. What is kept of them is a NeMo row each, some 200 bytes, rather
    than a temporary file: nothing to clean up, no question where there is room, and forked workers share it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.absolute = str(Path(path).absolute())  # workers may stand in another folder
        self.folder = str(Path(self.absolute).parent)
        self.unpacked: npt.NDArray[np.uint8] | None = None
        self._descriptor: int | None = None

    def read(self, position: int, size: int) -> bytes:
        if self.unpacked is not None:
            return self.unpacked[position : position + size].tobytes()
        if self._descriptor is None:
            self._descriptor = os.open(self.absolute, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
        return os.pread(self._descriptor, size, position)  # no file position that forks or threads could share

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}


class _Scan:
    """The columns of one manifest while they grow."""

    def __init__(self, path: str) -> None:
        self.source = _Source(path)
        self.positions, self.sizes, self.lines = array("q"), array("i"), array("i")
        self.durations, self.offsets = array("d"), array("d")
        self.unpacked = bytearray()

    def add(self, line: int, position: int, size: int, duration: float, offset: float) -> None:
        self.positions.append(position)
        self.sizes.append(size)
        self.lines.append(line)
        self.durations.append(duration)
        self.offsets.append(offset)


def _scan(path: str, require_duration: bool) -> _Scan:
    """Read and check every line of one manifest."""
    _check_file(path)
    scan = _Scan(path)
    try:
        if path.endswith(".gz"):
            with gzip.open(path, "rb") as file:
                _scan_lines(cast(IO[bytes], file), scan, require_duration, packed=True)
            scan.source.unpacked = np.frombuffer(scan.unpacked, np.uint8)
        else:
            with Path(path).open("rb") as file:
                _scan_lines(file, scan, require_duration, packed=False)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. Write it again.") from None
    if not scan.lines:
        raise DataError(f"{path} has no lines. A manifest has one JSON object a line for each utterance.")
    return scan


def _scan_lines(file: IO[bytes], scan: _Scan, require_duration: bool, *, packed: bool) -> None:
    position = number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        start, size = position, len(line)
        position += size
        if line.isspace():
            continue
        try:
            row, duration, offset = _parse(line)
            if require_duration and math.isnan(duration):
                raise ValueError('there is no "duration"; `nest prepare-data` measures it')
        except ValueError as error:
            raise DataError(f"{scan.source.path}, line {number}: {error}") from None
        if packed:
            start, size = _keep(row, scan)
        scan.add(number, start, size, duration, offset)


def _keep(row: dict[str, Any], scan: _Scan) -> tuple[int, int]:
    """Append a row to what is held in memory of a .gz; its place there."""
    kept = json.dumps(row, ensure_ascii=True).encode()
    start = len(scan.unpacked)
    if start + len(kept) > _MAX_UNPACKED:
        raise DataError(f"{scan.source.path} holds more than {_MAX_UNPACKED >> 30} GiB. Unpack it with gunzip.")
    scan.unpacked += kept
    return start, len(kept)


def _parse(line: bytes) -> tuple[dict[str, Any], float, float]:
    """The row, duration and offset of one line; raises ValueError saying what is wrong and what to do."""
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE >> 20} MiB; is this a manifest?")
    try:
        record = json.loads(str(line.removeprefix(_BYTE_ORDER_MARK), "utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(_why_no_json(line, error)) from None
    if not isinstance(record, dict):
        raise ValueError(f"{_short(record)} is no JSON object; a manifest has one {{...}} a line")
    row = _row(record)
    path = row["audio_filepath"]
    if not isinstance(path, str) or not path:
        raise ValueError(f'"audio_filepath" is {_short(path)}; it must name one file')
    if path.startswith(("pipe:", "|")) or path.endswith("|") or "://" in path or "\0" in path:
        raise ValueError(f'"audio_filepath" is {_short(path)}, a command or an address; only files are read')
    return row, _seconds(row, "duration", math.nan), _seconds(row, "offset", 0.0)


def _row(record: dict[str, Any]) -> dict[str, Any]:
    if "audio_filepath" in record:
        return record
    if "audio_filename" in record:  # NeMo takes this name too
        return {"audio_filepath": record.pop("audio_filename"), **record}
    if looks_like_cut(record):
        return cut_to_row(record)
    if "sources" in record:
        raise ValueError("this is a Lhotse recording; write cuts, as CutSet.from_manifests makes them")
    raise ValueError('there is no "audio_filepath"; every line must name its audio file')


def _seconds(row: dict[str, Any], key: str, default: float) -> float:
    value = row.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise ValueError(f'"{key}" is {_short(value)}; it must be a number of seconds from 0 to {MAX_SECONDS:g}')
    return float(value)


def _why_no_json(line: bytes, error: Exception) -> str:
    if line.startswith(b"{") and not line.endswith(b"\n"):
        return "the line is cut off: the file was not written to its end. Write it again"
    if isinstance(error, json.JSONDecodeError):
        return f"this is not JSON ({error.msg} at column {error.colno}); a manifest has one {{...}} a line"
    return f"this is not JSON ({str(error)[:80]})"


def _check_file(path: str) -> None:
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise DataError(f"manifest {path} is a folder, a pipe or a device; name a file of JSON lines")


def _split(paths: str) -> list[str]:
    if Path(paths).is_file():  # its name may have a comma
        return [paths]
    return [name.strip() for name in paths.split(",") if name.strip()]


def _resolve(path: str, folder: str) -> str:
    beside = os.path.join(folder, path)  # noqa: PTH118  (an absolute path replaces the folder)
    return beside if os.path.exists(beside) else os.path.expanduser(path)  # noqa: PTH110, PTH111


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
