"""Index of the members of an uncompressed tar, so that one positioned read returns any of them.

Nothing is extracted, and a member decides nothing but its own name and size, so a hostile shard can only fail to be
read. Indexing reads only the headers; it takes milliseconds for a shard of a gigabyte.
"""

from __future__ import annotations

import os
import stat
import tarfile
import weakref
from collections import OrderedDict
from typing import Any

from nestcli.errors import DataError
from nestcli.files import is_remote
from nestcli.storage import addresses, allowed_folders
from nestcli.storage.tar_headers import BrokenTarError, headers

_OPEN_SHARDS = 64  # in each process
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}


class TarMembers:
    """Regular files of a tar; `members` maps each name to its offset and size in bytes.

    Reads are positioned, so forks and threads share no file position. If several members have the same name, the last
    one counts, as for tar itself. Raises DataError if the tar is compressed, cut off or damaged, or holds sparse files.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._size: int | None = None  # in bytes
        try:
            self._size = os.fstat(self._open()).st_size
            self.members = self._walk()
        except OSError as error:
            raise self._unreadable(error) from None

    def read(self, name: str) -> bytes:
        """Return a member's content. Raises KeyError if it does not exist, DataError if the file became shorter."""
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
            local = addresses.local_copy(self.path) if is_remote(self.path) else self.path
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

    def _walk(self) -> dict[str, tuple[int, int]]:
        start = os.pread(self._open(), 8, 0)
        for magic, program in _COMPRESSED.items():
            if start.startswith(magic):
                raise DataError(
                    f"the shard {self.path} is compressed; unpack it with {program}: shards are read by position, "
                    "and audio does not get smaller by this"
                )
        members: dict[str, tuple[int, int]] = {}
        last = "none"
        try:
            for header in headers(self._open()):
                if not header.isreg():
                    continue
                last = header.name
                if header.type == tarfile.GNUTYPE_SPARSE or any(
                    key.startswith("GNU.sparse.") for key in header.pax_headers
                ):
                    raise self._sparse(header.pax_headers.get("GNU.sparse.name", last))
                members[last.removeprefix("./")] = (header.offset_data, header.size)
        except BrokenTarError as error:
            raise DataError(
                f"the shard {self.path} is {error}; the last whole member is {last!r}. Write it again."
            ) from None
        return members

    def _sparse(self, name: str) -> DataError:
        return DataError(
            f"the shard {self.path} holds a sparse file, {name!r}, whose bytes are not in one place. "
            "Write it again, without tar's --sparse."
        )


_opened: OrderedDict[str, TarMembers] = OrderedDict()


def open_shard(path: str) -> TarMembers:
    """Return the members of a shard, local or remote. Each process keeps the most recently used shards open."""
    shard = _opened.pop(path, None) or TarMembers(path)
    _opened[path] = shard
    while len(_opened) > _OPEN_SHARDS:
        _opened.popitem(last=False)
    return shard
