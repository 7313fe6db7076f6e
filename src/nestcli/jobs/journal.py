"""Journal of a long command's results, so that the same command continues after any interruption.

Results stay on disk; memory holds only their positions, about 150 bytes each, so that a journal of millions of lines
opens in seconds.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from nestcli.errors import DataError, RunFailedError
from nestcli.files import held_alone, open_kept

NAME = ".prepared.jsonl"
_VERSION = 3  # part of every key, so that results of former versions are not found
_KEY_BYTES = 16
_GOES_ON = "Run the same command again to continue."
REMEDY = f"Is the disk full? {_GOES_ON}"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_HEAD = b'{"key": "'
_HEX = slice(len(_HEAD), len(_HEAD) + 2 * _KEY_BYTES)


class Journal:
    """Results by key, appended to a file as they arrive; a line that a kill left incomplete is dropped."""

    def __init__(self, folder: Path) -> None:
        self._file = open_kept(folder / NAME, "a+b", DataError)
        self._places: dict[bytes, int] = {}
        self._end = self._index()
        self._file.truncate(self._end)  # so that the next result starts a new line

    def get(self, key: str) -> Any:
        """Return the result of an earlier run, or of this one up to the last `flush`; None if not found."""
        place = self._places.get(_digest(key))
        if place is None:
            return None
        try:
            return json.loads(_line_at(self._file.fileno(), place))["result"]
        except (ValueError, KeyError):  # the disk lost data that was already written
            return None

    def add(self, key: str, result: Any) -> None:
        line = _HEAD + _digest(key).hex().encode() + b'", "result": ' + json.dumps(result).encode() + b"}\n"
        with self._told():
            self._file.write(line)
        self._places[_digest(key)] = self._end
        self._end += len(line)

    def flush(self) -> None:
        with self._told():
            self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # results that did not fit on the disk are computed again next time
            self._file.close()
        self._places.clear()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailedError(f"{self._file.name} cannot be written: {error.strerror}. {REMEDY}") from None

    def _index(self) -> int:
        """Index the position of every complete line; return the end of the last one."""
        self._file.seek(0)
        place = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            if line.startswith(_HEAD):
                with suppress(ValueError):
                    self._places[bytes.fromhex(line[_HEX].decode())] = place
            place += len(line)
        return place


def file_version(path: str) -> str:
    """Return a string that identifies a file's current content: its path, size and modification time."""
    try:
        status = os.stat(path)  # noqa: PTH116  (str paths, perhaps with bytes that are not UTF-8)
    except (OSError, ValueError):
        return f"{path}\0gone"
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"


@contextmanager
def disk_faults_told(folder: Path) -> Iterator[None]:
    """Turn an OSError that reports a disk fault, from a library or another process, into RunFailedError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = folder if error.filename is None else Path(os.fsdecode(error.filename))
        if error.errno == errno.EIO and not place.absolute().is_relative_to(folder.absolute()):
            raise RunFailedError(
                f"{error.filename} cannot be read: {error.strerror}. Check its disk. {_GOES_ON}"
            ) from None
        raise RunFailedError(f"{error.filename or folder} cannot be written: {error.strerror}. {REMEDY}") from None


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """Open the journal of a folder, for one process at a time. Raises DataError while another process uses it."""
    taken = DataError(f"another run of nest is writing to {folder}; wait for it, or give another --out")
    with held_alone(folder, taken):
        journal = Journal(folder)
        try:
            yield journal
        finally:
            journal.close()


def _digest(key: str) -> bytes:
    return blake2b(f"{_VERSION}\0{key}".encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()


def _line_at(descriptor: int, place: int) -> bytes:
    """Read the line that starts at `place`, without moving the file's position for writing."""
    line = b""
    size = 1 << 10
    while not line.endswith(b"\n"):
        more = os.pread(descriptor, size, place + len(line))
        if not more:
            return b""
        line += more.partition(b"\n")[0] + (b"\n" if b"\n" in more else b"")
        size *= 4
    return line
