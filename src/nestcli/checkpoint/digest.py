"""A checkpoint's SHA-256, kept in the file itself: the comment that ends a zip archive, which every reader skips.

File and digest cannot get out of step then, and one rename gives both their name. The digest is of all bytes but its
own 64 digits: `head -c -64 FILE | sha256sum` gives it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, Protocol, cast

from nestcli.checkpoint.atomic import save_tensors
from nestcli.checkpoint.sizes import oversized
from nestcli.errors import CheckpointError

_END = 22  # bytes of the record that ends a zip, its comment left out; the last two hold the comment's length
_MARK = b"nest sha256 "
_DIGITS = 64
_COMMENT = len(_MARK) + _DIGITS
_BLOCK = 1 << 22  # bytes
UNREADABLE = (
    OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error, OverflowError, NotImplementedError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not those that were written; `reason` says how that is known."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{path} cannot be read as a checkpoint: {reason}. It is damaged.")
        self.reason = reason


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class _HashedFile:
    """What `torch.save` writes to: passes bytes on and hashes them, all but the last two written so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash: _Hash = hashlib.sha256()
        self.held = b""

    def write(self, data: memoryview) -> int:
        written = self.file.write(data)
        if len(data) >= 2:
            self.hash.update(self.held)
            self.hash.update(data[:-2])
            self.held = bytes(data[-2:])
        else:
            both = self.held + bytes(data)
            self.hash.update(both[:-2])
            self.held = both[-2:]
        return written

    def flush(self) -> None:
        self.file.flush()


def save_digested(content: Any, file: BinaryIO) -> None:
    """`torch.save` into a new file, the digest at its end; then the file is read back from the disk and compared.

    Raises OSError, also for a disk that gives back something else.
    """
    hashed = _HashedFile(file)
    save_tensors(content, cast(BinaryIO, hashed))
    assert hashed.held == b"\0\0"  # the length of the comment that `torch.save` writes: none
    head = struct.pack("<H", _COMMENT) + _MARK
    hashed.hash.update(head)
    file.seek(-2, io.SEEK_END)
    file.write(head + hashed.hash.hexdigest().encode())
    file.flush()
    try:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # from the disk, not from the memory that it was written through
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:  # which does not say whose it is
        raise OSError(error.errno, error.strerror, file.name) from None
    if _digest(file, file.tell()) != hashed.hash.hexdigest():
        why = "it reads back other than it was written: the disk or the memory is faulty"
        raise OSError(errno.EIO, why, file.name)


def stored_digest(file: IO[bytes], size: int) -> str | None:
    """The digest that a zip of `size` bytes ends with, None if it ends without a comment as PyTorch writes it.

    Raises ValueError for any other end: nothing may be behind it, and it may not be cut off.
    """
    file.seek(-min(size, _END + _COMMENT), io.SEEK_END)
    tail = file.read(_END + _COMMENT)
    if tail[-_END:].startswith(b"PK\x05\x06") and tail[-2:] == b"\0\0":
        return None
    marked = struct.pack("<H", _COMMENT) + _MARK
    if tail.startswith(b"PK\x05\x06") and re.fullmatch(re.escape(marked) + rb"[0-9a-f]{64}", tail[_END - 2 :]):
        return tail[-_DIGITS:].decode()
    raise ValueError("it is cut off, or more data follows its end")


def verify(path: str | os.PathLike[str]) -> None:
    """Read a whole .ckpt and compare it with its SHA-256, or with its records' CRC-32 if it carries none.

    One flipped bit is found; `torch.load` would not notice. Raises DamagedError, and FileNotFoundError and
    PermissionError where it cannot be looked at.
    """
    try:
        with Path(path).open("rb") as file:
            if odd := oversized(os.fstat(file.fileno())):
                raise ValueError(odd)
            _verify(file, os.fstat(file.fileno()).st_size)
    except (FileNotFoundError, PermissionError):
        raise
    except UNREADABLE as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DamagedError(path, next(iter(text.splitlines()), type(error).__name__)[:200].rstrip(".")) from None


def _verify(file: BinaryIO, size: int) -> None:
    if size == 0:
        raise ValueError("it is empty")
    if file.read(4) != b"PK\x03\x04":
        raise ValueError("it does not begin as a file of PyTorch does")
    digest = stored_digest(file, size)
    if digest is None:
        _check_records(file)
    elif _digest(file, size) != digest:
        raise ValueError("its SHA-256 is not the one that it was written with")


def _digest(file: BinaryIO, size: int) -> str:
    """SHA-256 of all but the last 64 bytes."""
    found, left = hashlib.sha256(), size - _DIGITS
    file.seek(0)
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        found.update(block)
        left -= len(block)
    return found.hexdigest()


def _check_records(file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.CRC == 0:  # PyTorch can be told not to compute it
                continue
            with archive.open(entry) as record:
                while record.read(_BLOCK):
                    pass
