"""What a long command has done so far, so that the same command goes on after any interruption.

The results stay on the disk: of each the memory holds where it stands, some 150 bytes, so that a journal of millions
of lines is opened in seconds.
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
_VERSION = 3  # part of every key: results that a former version wrote are not found
_KEY_BYTES = 16
_GOES_ON = "The same command goes on where it was."
REMEDY = f"Is the disk full? {_GOES_ON}"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_HEAD = b'{"key": "'
_HEX = slice(len(_HEAD), len(_HEAD) + 2 * _KEY_BYTES)


class Journal:
    """Results by key, appended to a file as they come; a line that a kill cut off does not count."""

    def __init__(self, folder: Path) -> None:
        self._file = open_kept(folder / NAME, "a+b", DataError)
        self._places: dict[bytes, int] = {}
        self._end = self._index()
        self._file.truncate(self._end)  # the next line shall begin a line

    def get(self, key: str) -> Any:
        """The result of an earlier run, or of this one up to the last `flush`; None if there is none."""
        place = self._places.get(_digest(key))
        if place is None:
            return None
        try:
            return json.loads(_line_at(self._file.fileno(), place))["result"]
        except (ValueError, KeyError):  # a disk that lost what it had promised
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
        with suppress(OSError):  # what the disk had no room for is done again
            self._file.close()
        self._places.clear()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunFailedError(f"{self._file.name} cannot be written: {error.strerror}. {REMEDY}") from None

    def _index(self) -> int:
        """Note where every whole line stands; the end of the last one."""
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
    """A name for a file as it is now: another one stands for it when its size or its time changes."""
    try:
        status = os.stat(path)  # noqa: PTH116  (str paths, perhaps with bytes that are not UTF-8)
    except (OSError, ValueError):
        return f"{path}\0gone"
    return f"{path}\0{status.st_size}\0{status.st_mtime_ns}"


@contextmanager
def disk_faults_told(folder: Path) -> Iterator[None]:
    """Raise RunFailedError for a fault of the disk that a library, or another process, left as an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = folder if error.filename is None else Path(os.fsdecode(error.filename))
        if error.errno == errno.EIO and not place.absolute().is_relative_to(folder.absolute()):
            raise RunFailedError(
                f"{error.filename} cannot be read: {error.strerror}. Look whether its disk is well. {_GOES_ON}"
            ) from None
        raise RunFailedError(f"{error.filename or folder} cannot be written: {error.strerror}. {REMEDY}") from None


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, for one process at a time. Raises DataError while another works there."""
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
    """The line of a file that starts at a place, read without moving where the file is written to."""
    line = b""
    size = 1 << 10
    while not line.endswith(b"\n"):
        more = os.pread(descriptor, size, place + len(line))
        if not more:
            return b""
        line += more.partition(b"\n")[0] + (b"\n" if b"\n" in more else b"")
        size *= 4
    return line
