"""Manifests: lists of utterances in NeMo's JSON lines or Lhotse's cuts, read line by line.

A manifest of millions of lines stays on disk. `Manifest` holds 40 bytes per line (its position, the duration and
offset of the audio, its shard) and reads the rest of a line on request. `manifest_scan` opens manifests.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from json.decoder import JSONDecoder
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestcli.audio.load import CHANNEL_KEY, Channel, parsed_channel
from nestcli.data.lhotse_cuts import cut_to_row, looks_like_cut
from nestcli.errors import DataError, NestError
from nestcli.files import is_remote, user_path, write_text
from nestcli.jobs import activity
from nestcli.storage import addresses
from nestcli.storage.file_kinds import why_no_json

MAX_LINE = 1 << 20  # bytes
MAX_SECONDS = 1e6
_OTHER_NAMES = ("audio_filename", "audio_file")  # other keys for the path, which NeMo 3.0.0 reads in this order
_MOST_OPEN = 256  # manifests that a process keeps open: systems allow 1,024 files, and a corpus may have more
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_open: set[int] = set()  # descriptors of open manifests

Row = dict[str, Any]
ToRow = Callable[[Row], Row]
_KEY_ORDER = ("audio_filepath", "duration", "offset", CHANNEL_KEY, "speaker", "text", "lang", "reason", "detail")


class Source:
    """The bytes of a manifest: a file, read in place, or the unpacked lines of a .gz, held in memory.

    The lines of a .gz cannot be read in place. They stay in memory as NeMo rows of about 200 bytes: unlike a temporary
    file, they need no cleanup and no disk space, and forked workers share them.
    """

    def __init__(self, path: str, to_row: ToRow) -> None:
        self.path = path
        self.to_row = to_row
        local = addresses.local_copy(path, keep=True) if is_remote(path) else path
        self.absolute = str(Path(local).absolute())  # worker processes may have a different current folder
        self.folder = path.rpartition("/")[0] if is_remote(path) else str(Path(self.absolute).parent)
        self.unpacked: npt.NDArray[np.uint8] | None = None
        self._descriptor: int | None = None

    def read(self, position: int, size: int) -> bytes:
        if self.unpacked is not None:
            return self.unpacked[position : position + size].tobytes()
        if self._descriptor is not None:
            return os.pread(
                self._descriptor, size, position
            )  # positioned read: forks and threads share no file position
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One utterance: `duration` s of a file, starting at `offset` s, and its line in the manifest (from 1).

    With `shard`, the file is a member of that tar. `channel` is the choice of the line, if it makes one.
    """

    audio_filepath: str
    duration: float
    offset: float
    speaker: str | None
    text: str | None
    lang: str | None
    line: int
    manifest: str
    shard: str | None = None
    channel: Channel | None = None

    @property
    def name(self) -> str:
        """Return the name of the audio for messages."""
        return self.audio_filepath if self.shard is None else f"{self.shard}: {self.audio_filepath}"


@dataclass(frozen=True, eq=False)
class Manifest:
    """The lines of one or more manifests, in their order; may be pickled to other processes.

    `durations` and `offsets` are in seconds, float64, one per line. A missing duration is NaN, if
    `read_manifests` was told to accept it. `shard_of` tells the tar in `shards` that holds a line's
    audio, -1 for a loose file.
    """

    durations: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.float64]
    sources: tuple[Source, ...] = field(repr=False)
    source_of: npt.NDArray[np.int32] = field(repr=False)
    positions: npt.NDArray[np.int64] = field(repr=False)  # in bytes
    sizes: npt.NDArray[np.int32] = field(repr=False)  # in bytes
    lines: npt.NDArray[np.int32] = field(repr=False)
    shard_of: npt.NDArray[np.int32] = field(repr=False)
    shards: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.durations)

    def select(self, indices: npt.ArrayLike) -> Manifest:
        """Return the lines at `indices` (or where a mask is true), in that order."""
        chosen = np.asarray(indices)
        if not chosen.size:  # numpy turns an empty list into floats
            chosen = chosen.astype(np.intp)
        return replace(self, **{name: getattr(self, name)[chosen] for name in _COLUMNS})

    def row(self, index: int) -> dict[str, Any]:
        """Read a line as a NeMo row, with its path as written there. Raises DataError if the file has changed."""
        source = self.sources[self.source_of[index]]
        try:
            return parse(source.read(int(self.positions[index]), int(self.sizes[index])), source.to_row)[0]
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.where(index)}: {error}. Did the file change since it was opened? Start again."
            ) from None

    def where(self, index: int) -> str:
        """Return the file and line number for messages."""
        return f"{self.sources[self.source_of[index]].path}, line {self.lines[index]}"

    def entry(self, index: int) -> Entry:
        """Read one line. A relative path is relative to the manifest's folder if it exists there, or to the shard."""
        source, row, shard = self.sources[self.source_of[index]], self.row(index), int(self.shard_of[index])
        speaker, text, lang = (_text(row.get(key)) for key in ("speaker", "text", "lang"))
        path = row["audio_filepath"]
        return Entry(
            audio_filepath=path if shard >= 0 else _resolve(path, source.folder),
            duration=float(self.durations[index]),
            offset=float(self.offsets[index]),
            speaker=speaker,
            text=text,
            lang=lang,
            line=int(self.lines[index]),
            manifest=source.path,
            shard=self.shards[shard] if shard >= 0 else None,
            channel=parsed_channel(row.get(CHANNEL_KEY)),
        )

    @contextmanager
    def reading(self, index: int) -> Iterator[Entry]:
        """Yield a line's entry. A loader process notes that it reads this line until the block ends."""
        page = activity.own
        if page is not None:
            page.begin(self, index)  # before `entry`, which looks for a relative path and can hang too
        try:
            yield self.entry(index)
        finally:
            if page is not None:
                page.end()


_COLUMNS = ("durations", "offsets", "source_of", "positions", "sizes", "lines", "shard_of")


def joined(manifests: Sequence[Manifest]) -> Manifest:
    """Join manifests into one."""
    if len(manifests) == 1:
        return manifests[0]
    columns = {name: np.concatenate([getattr(each, name) for each in manifests]) for name in _COLUMNS}
    sources: list[Source] = []
    shards: list[str] = []
    first_of: dict[int, int] = {}  # key: identity of a tuple of tars, which the manifests of a data set share
    start = 0
    for each in manifests:
        part = slice(start, start := start + len(each))
        columns["source_of"][part] += len(sources)
        sources.extend(each.sources)
        if id(each.shards) not in first_of:
            first_of[id(each.shards)] = len(shards)
            shards.extend(each.shards)
        columns["shard_of"][part][each.shard_of >= 0] += first_of[id(each.shards)]
    return Manifest(**columns, sources=tuple(sources), shards=tuple(shards))


def write_manifest(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    error: type[NestError] = DataError,
    remedy: str = "",
) -> None:
    """Write rows as JSON lines; the file appears only when it is complete.

    Write errors are raised as `error`, with `remedy` at the end of the message.
    """
    write_text(path, (_dump(row) + "\n" for row in rows), error, remedy)


def _dump(row: Mapping[str, Any]) -> str:
    order = [*(key for key in _KEY_ORDER if key in row), *sorted(row.keys() - set(_KEY_ORDER))]
    ordered = {key: row[key] for key in order}
    line = json.dumps(ordered, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, or a file name that is not UTF-8
        return json.dumps(ordered)
    return line


def _resolve(path: str, folder: str) -> str:
    if path.startswith("/") or is_remote(path):
        return path
    if path.startswith("file:") and (local := user_path(path)) != path:
        return local
    if is_remote(folder):
        return addresses.join(folder, path)
    beside = os.path.join(folder, path)  # noqa: PTH118  (pathlib is slower, and this runs for every utterance)
    return beside if os.path.exists(beside) else user_path(path)  # noqa: PTH110


def _text(value: object) -> str | None:
    return None if value is None else str(value)


# ---- one line ----


def to_row(record: Row) -> Row:
    """Convert the object of a line to a row of a NeMo manifest. Raises ValueError if it is not an utterance."""
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


class _TwiceError(ValueError):
    """A key that appears twice in an object: readers disagree on which one counts."""


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(f"{_short(next(key for key in keys if keys.count(key) > 1))} occurs twice in one object")
    return row


JSON = JSONDecoder(object_pairs_hook=_once)


def parse(line: bytes, to_row: ToRow) -> tuple[Row, float, float]:
    """Parse one line; return its row, duration and offset. Raises ValueError with the fault and the remedy."""
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE >> 20} MiB; is this a manifest?")
    try:
        record = JSON.decode(str(line.removeprefix(_BYTE_ORDER_MARK), "utf-8"))
    except _TwiceError:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(why_no_json(line, error)) from None
    if not isinstance(record, dict):
        raise ValueError(f"{_short(record)} is not a JSON object; a manifest has one {{...}} per line")
    row = to_row(record)
    return row, *check_row(row)


def check_row(row: Row) -> tuple[float, float]:
    """Check a row; return its duration and offset in seconds. Raises ValueError for impossible values."""
    check_path(row["audio_filepath"])
    parsed_channel(row.get(CHANNEL_KEY))
    return _seconds(row, "duration", math.nan), _seconds(row, "offset", 0.0)


def check_path(path: object) -> None:
    if not isinstance(path, str) or not path:
        raise ValueError(f'"audio_filepath" is {_short(path)}; it must name one file')
    if path.startswith("file:"):
        path = user_path(path)
    if "\0" in path:
        raise ValueError(f'"audio_filepath" is {_short(path)}, with a zero byte, which no file name can contain')
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


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
