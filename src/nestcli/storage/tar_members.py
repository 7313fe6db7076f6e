"""Where the members of an uncompressed tar stand, so that any of them is read by one positioned read.

Nothing is extracted and no member decides anything but its own name and size, so a hostile shard can do no more than
fail to be read. The walk reads headers alone; a shard of a gigabyte is indexed in milliseconds.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections import OrderedDict
from typing import Any

from nestcli.errors import DataError
from nestcli.storage import addresses, allowed_folders

_BLOCK = 512  # bytes; everything in a tar begins at a multiple of it
_OPEN_SHARDS = 64  # in each process
_MAX_EXTENSION = 1 << 20  # bytes of a long name or of PAX records
_DIGITS = 20  # of a number in them: Python gives up at 4,300
_FILES = (b"0", b"7", b"\0")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes, whatever size they state
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"g", b"S"
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}


class TarMembers:
    """The regular files of a tar: `members` gives the offset and size in bytes of each; read positioned, without a
    file position that forks or threads could share. Of two members of one name the last counts, as with tar itself.

    Raises DataError where the tar is compressed, cut off or damaged, or holds sparse files.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._size: int | None = None  # in bytes
        try:
            self._size = os.fstat(self._open()).st_size
            self.members = self._walk(self._size)
        except OSError as error:
            raise self._unreadable(error) from None

    def read(self, name: str) -> bytes:
        """A member's content. Raises KeyError if there is none, DataError if the file is no longer whole."""
        position, size = self.members[name]
        try:
            content = self._read(position, size)
        except OSError as error:
            raise self._unreadable(error) from None
        if len(content) < size:
            raise DataError(f"the shard {self.path} has become shorter since it was opened; start again")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def _open(self) -> int:
        if self._descriptor is None:
            if why := allowed_folders.outside(self.path):
                raise DataError(f"the shard {self.path} is not read: {why}")
            local = addresses.local_copy(self.path) if addresses.is_remote(self.path) else self.path
            descriptor = os.open(local, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not hang on a FIFO
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise DataError(f"the shard {self.path} is a folder, a pipe or a device; name a tar")
            if self._size not in (None, os.fstat(descriptor).st_size):
                os.close(descriptor)
                raise DataError(f"the shard {self.path} has changed since it was opened; start again")
            self._descriptor = descriptor
            weakref.finalize(self, os.close, descriptor)
        return self._descriptor

    def _read(self, position: int, size: int) -> bytes:
        content = os.pread(self._open(), size, position)
        while 0 < len(content) < size:  # Linux gives at most 2 GiB at once
            more = os.pread(self._open(), size - len(content), position + len(content))
            if not more:
                break
            content += more
        return content

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"the shard {self.path} cannot be read: {error.strerror or error}")

    # ---- walking ----

    def _walk(self, total: int) -> dict[str, tuple[int, int]]:
        members: dict[str, tuple[int, int]] = {}
        position, last = 0, "none"
        name: str | None = None  # given by an extension before the header
        size: int | None = None
        while position < total:
            header = os.pread(self._open(), _BLOCK, position)
            if not any(header):
                break  # the end of the archive
            kind, own_name, own_size = self._header(header, position, last)
            content = position + _BLOCK
            length = 0 if kind in _WITHOUT_CONTENT else own_size if size is None else size
            if content + length > total:
                raise self._damaged(
                    f"it ends inside of {name or own_name!r}; the last whole member is {last!r}", "cut off"
                )
            position = content + -(-length // _BLOCK) * _BLOCK
            if kind == _LONG_NAME:
                name = self._extension(content, length).split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind == _PAX:
                records = _pax_records(self._extension(content, length))
                name, size = records.get("path", name), _number(records.get("size"), size)
                if any(key.startswith("GNU.sparse.") for key in records):
                    raise self._sparse(records.get("GNU.sparse.name", name))
            elif kind == _SPARSE:
                raise self._sparse(name or own_name)
            elif kind not in (_LONG_LINK, _PAX_GLOBAL):
                own_name = name or own_name
                if kind in _FILES and not (kind == b"\0" and own_name.endswith("/")):  # an old tar's folder
                    last = own_name
                    members[last.removeprefix("./")] = (content, length)
                name = size = None
        return members

    def _header(self, header: bytes, position: int, last: str) -> tuple[bytes, str, int]:
        """Kind, name and size of a member; raises DataError for what is no header."""
        if position == 0:
            for magic, program in _COMPRESSED.items():
                if header.startswith(magic):
                    raise DataError(
                        f"the shard {self.path} is compressed; unpack it with {program}: shards are read by position, "
                        "and audio does not get smaller by this"
                    )
        if len(header) < _BLOCK:
            raise self._damaged(f"the last whole member is {last!r}", "cut off")
        try:
            stated = int(header[148:156].strip(b"\0 "), 8)
            size = _tar_number(header[124:136])
        except ValueError:
            raise self._damaged(
                f"there is no header at byte {position}, after {last!r}", "no tar, or damaged"
            ) from None
        if size < 0 or (stated != _sum(header) and stated != _signed_sum(header)):
            raise self._damaged(f"the header at byte {position}, after {last!r}, is wrong", "damaged")
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
            name = prefix + b"/" + name
        return header[156:157], name.decode("utf-8", "surrogateescape"), size

    def _extension(self, position: int, length: int) -> bytes:
        if length > _MAX_EXTENSION:
            raise self._damaged(f"a name at byte {position} is of {length} bytes", "damaged")
        return os.pread(self._open(), length, position)

    def _sparse(self, name: str | None) -> DataError:
        return DataError(
            f"the shard {self.path} holds a sparse file, {name!r}, whose bytes are not in one place. "
            "Write it again, without tar's --sparse."
        )

    def _damaged(self, detail: str, what: str) -> DataError:
        return DataError(f"the shard {self.path} is {what}: {detail}. Write it again.")


def _sum(header: bytes) -> int:
    """The sum of a header's bytes, its own field taken as blanks."""
    return sum(header) - sum(header[148:156]) + 8 * 32


def _signed_sum(header: bytes) -> int:
    """The same as some old programs compute it, bytes from 128 on taken as negative."""
    return _sum(header) - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _tar_number(field: bytes) -> int:
    """An octal number, or a binary one where it would not fit."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.strip(b"\0 ") or b"0", 8)


def _pax_records(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header."""
    records = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not (digits.isdigit() and len(digits) < _DIGITS) or not len(digits) < int(digits) <= len(content):
            break
        record, content = content[len(digits) + 1 : int(digits) - 1], content[int(digits) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return records


def _number(text: str | None, otherwise: int | None) -> int | None:
    usable = text is not None and len(text) < _DIGITS and text.isascii() and text.isdigit()
    return int(text) if usable and text is not None else otherwise


_opened: OrderedDict[str, TarMembers] = OrderedDict()


def open_shard(path: str) -> TarMembers:
    """The members of a shard, local or remote; those used last stay open in each process."""
    shard = _opened.pop(path, None) or TarMembers(path)
    _opened[path] = shard
    while len(_opened) > _OPEN_SHARDS:
        _opened.popitem(last=False)
    return shard
