"""NeMo's tar files: checked block by block, and refused as a whole if anything in them is unexpected.

Nothing is extracted. `storage.tar_headers` walks the archive; this file decides which headers a model may have.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nestcli.checkpoint.sizes import oversized
from nestcli.errors import CheckpointError
from nestcli.storage.tar_headers import BLOCK, BrokenTarError, headers

RECORD = 20 * BLOCK  # tar files are padded to a multiple of this size
MAX_MEMBERS = 256  # NeMo writes 3, and a few more for a tokenizer
MAX_EXPANSION = 8  # maximum ratio for gzip; fp32 weights converted from bf16 shrink to less than half, others barely
_ALWAYS_EXPANDED = 64 << 20  # bytes; small files of zeros shrink further
_MAX_TAIL = 1 << 20  # bytes of padding after the last member
_MAX_NOTES = 1 << 16  # bytes of a PAX header
_PAX_KEYS = frozenset(("mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"))
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.XGLTYPE: "a global PAX header",
    tarfile.GNUTYPE_LONGNAME: "a renaming header",
    tarfile.GNUTYPE_LONGLINK: "a renaming header",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """A file in an archive; offset and size in bytes."""

    name: str  # without a leading ./
    offset: int
    size: int


class Archive:
    """Open archive with every header checked; `open` returns one member's bytes."""

    def __init__(self, file: IO[bytes], source: str) -> None:
        self.source = source
        self._file = file
        self.members = _members(file, source)

    def open(self, name: str) -> tuple[IO[bytes], int]:
        """Return a member as a read-only file, and its size in bytes. Raises CheckpointError if it is missing."""
        if name not in self.members:
            raise CheckpointError(f"{self.source} holds no {name}: it is not a model that NeMo's save_to wrote.")
        member = self.members[name]
        return io.BufferedReader(_Slice(self._file, member), 1 << 20), member.size


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open the tar file at `path`, plain or compressed with gzip. Raises CheckpointError."""
    try:
        with path.open("rb") as raw:
            if odd := oversized(os.fstat(raw.fileno())):
                raise CheckpointError(f"{path} cannot be read: {odd}. Refused.")
            if raw.read(2) != b"\x1f\x8b":
                yield Archive(raw, str(path))
                return
            with tempfile.TemporaryFile() as plain:  # it has no name, and disappears when closed
                _expand(raw, plain, str(path))
                yield Archive(plain, str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None


def _expand(raw: IO[bytes], plain: IO[bytes], source: str) -> None:
    """Undo gzip, up to a limit that follows from the file's size."""
    limit = max(_ALWAYS_EXPANDED, MAX_EXPANSION * raw.seek(0, io.SEEK_END))
    raw.seek(0)
    try:
        with gzip.GzipFile(fileobj=raw) as packed:
            while piece := packed.read(1 << 20):
                if plain.tell() + len(piece) > limit:
                    raise CheckpointError(f"{source}: its unpacked content grows beyond {limit:,} bytes. Refused.")
                plain.write(piece)
        plain.flush()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CheckpointError(f"{source}: its compression is damaged: {error}.") from None


def _members(file: IO[bytes], source: str) -> dict[str, Member]:
    members: dict[str, Member] = {}
    names = set[str]()
    end = 0
    try:
        for seen, header in enumerate(headers(file.fileno())):
            if len(names) >= MAX_MEMBERS or seen >= 2 * MAX_MEMBERS:  # a PAX header may precede each
                raise CheckpointError(f"{source} has more than {MAX_MEMBERS} members. Refused.")
            if header.type == tarfile.XHDTYPE:
                _check_notes(header, source)
            else:
                name = _checked_name(header, source)
                if name in names:
                    raise CheckpointError(f"{source} holds {_shown(name)} twice. Refused.")
                names.add(name)
                if header.type != tarfile.DIRTYPE:
                    members[name] = Member(name, header.offset_data, header.size)
            end = header.offset_data + header.size + len(padding(header.size))
    except BrokenTarError as error:
        raise CheckpointError(f"{source} is {error}.") from None
    _check_tail(file, end, source)
    return members


def _checked_name(header: tarfile.TarInfo, source: str) -> str:
    """Return the member's name without `./`; only files and folders inside the archive's own folder have one."""
    shown = _shown(header.name)
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise CheckpointError(f"{source} holds {_KINDS.get(header.type, 'something unknown')}, {shown}. Refused.")
    parts = [part for part in header.name.split("/") if part not in ("", ".")]
    if header.name.startswith("/") or ".." in parts or "\\" in header.name or not header.name.isprintable():
        raise CheckpointError(f"{source} holds a file that would land outside of it, {shown}. Refused.")
    if header.type == tarfile.DIRTYPE and header.size:
        raise CheckpointError(f"{source} holds a folder with content of its own, {shown}. Refused.")
    return "/".join(parts) or "."


def _check_notes(header: tarfile.TarInfo, source: str) -> None:
    """Accept a PAX header that only states times and owners; refuse one that renames, resizes or maps."""
    odd = sorted(header.pax_headers.keys() - _PAX_KEYS)
    if odd or header.size > _MAX_NOTES:
        raise CheckpointError(
            f"{source} has a PAX header that changes {_shown(odd[0] if odd else '?')} of a member. Refused: "
            "it may state only times and owners."
        )


def _check_tail(file: IO[bytes], position: int, source: str) -> None:
    file.seek(position)
    tail = file.read(_MAX_TAIL + 1)
    if len(tail) < BLOCK:
        raise CheckpointError(f"{source} is not a tar file, or is cut off: its end is missing.")
    if len(tail) > _MAX_TAIL or tail.strip(b"\0"):
        raise CheckpointError(f"{source} has data behind its end. Refused.")


def _shown(name: str) -> str:
    return repr(name[:100])


class _Slice(io.RawIOBase):
    """Read-only view of a member's bytes inside the archive."""

    def __init__(self, file: IO[bytes], member: Member) -> None:
        self._file, self._member, self._position = file, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.size}[whence]
        if start + offset < 0:
            raise ValueError("a negative position")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # always called with one
        left = max(0, self._member.size - self._position)
        self._file.seek(self._member.offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]  # files opened as bytes have it
        self._position += count
        return int(count)


def header_of(name: str, size: int, *, folder: bool = False) -> bytes:
    """Return the header of a member that we write: the same bytes for every user and at any time."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.type, info.mode = (tarfile.DIRTYPE, 0o755) if folder else (tarfile.REGTYPE, 0o644)
    return info.tobuf(tarfile.USTAR_FORMAT)


def padding(size: int, to: int = BLOCK) -> bytes:
    """Return the zero bytes that pad `size` bytes to a multiple of `to`."""
    return bytes(-size % to)
