"""What a loader process is reading, noted in memory that it shares with the process that waits for its batches.

A note costs less than 1 µs and takes no lock: a process that dies at any place leaves a note that can be read.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

EntryT_co = TypeVar("EntryT_co", covariant=True)
EntryT = TypeVar("EntryT")

_NOTE = struct.Struct("=Qdqh?")  # the fields of Note
_SINCE, _SINCE_AT = struct.Struct("=d"), 8  # its time alone, and where that stands
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Note:
    """What a process says of itself: it has been reading a file, or doing something else, `since` then.

    `since` is of `time.monotonic`, which all processes share; `number` tells notes apart. The file is that of a line
    (from 0) of one of the manifests, the one that is being read or was last; -1 for none.
    """

    number: int
    since: float  # s
    line: int
    manifest: int
    reading: bool


NOTHING = Note(0, 0.0, -1, -1, False)  # of a process that tells nothing


class Lines(Protocol[EntryT_co]):
    """What a line has an entry in: a Manifest, which stands above this room."""

    def entry(self, line: int, /) -> EntryT_co: ...


class _Page:
    """A process's own page, to write to."""

    def __init__(self, memory: mmap.mmap, manifests: Sequence[Lines[Any]]) -> None:
        self._memory = memory
        self._place_of = {id(manifest): place for place, manifest in enumerate(manifests)}
        self._number, self._line, self._place = 0, -1, -1
        self.end()

    def begin(self, manifest: Lines[Any], line: int) -> None:
        self._number += 1
        self._line, self._place = line, self._place_of.get(id(manifest), -1)
        _NOTE.pack_into(self._memory, 0, self._number, time.monotonic(), line, self._place, True)

    def end(self) -> None:
        self._number += 1
        _NOTE.pack_into(self._memory, 0, self._number, time.monotonic(), self._line, self._place, False)

    def moved(self) -> None:
        _SINCE.pack_into(self._memory, _SINCE_AT, time.monotonic())


class Notes:
    """A page for each of `workers` processes, which must be forked from this one, about the lines of `manifests`."""

    def __init__(self, workers: int, manifests: Sequence[Lines[Any]]) -> None:
        self.manifests = manifests
        self._pages = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(workers)]

    def enter(self, worker: int) -> None:
        """In a loader process: from now on, note what it reads."""
        global _own
        _own = _Page(self._pages[worker], self.manifests)

    def of(self, worker: int) -> Note:
        """In the process that made the pages: return what a loader process noted last."""
        page = self._pages[worker]
        for _ in range(_ATTEMPTS):
            note = Note(*_NOTE.unpack_from(page))
            if Note(*_NOTE.unpack_from(page)).number == note.number:  # it was not being written
                break
        return note


_own: _Page | None = None  # of this process, if it is a loader's


class Noted(Generic[EntryT]):
    """A context: the entry of a line, noted as what this process reads until the block ends. Raises DataError."""

    __slots__ = ("_line", "_manifest")

    def __init__(self, manifest: Lines[EntryT], line: int) -> None:
        self._manifest, self._line = manifest, line

    def __enter__(self) -> EntryT:
        if _own is None:
            return self._manifest.entry(self._line)
        _own.begin(self._manifest, self._line)  # before the entry: a relative path is looked for, which can hang too
        try:
            return self._manifest.entry(self._line)
        except BaseException:
            _own.end()
            raise

    def __exit__(self, *_: object) -> None:
        if _own is not None:
            _own.end()


def moved() -> None:
    """Note that what is being read, from far away, is still coming in."""
    if _own is not None:
        _own.moved()
