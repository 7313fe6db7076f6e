"""Notes of what each loader process is reading, in memory that it shares with the trainer.

A note costs less than 1 µs and takes no lock: a process that dies at any point leaves a readable note.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

_NOTE = struct.Struct("=Qdqh?")  # the fields of Note
_SINCE, _SINCE_AT = struct.Struct("=d"), 8  # the field `since` alone, and its offset
_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Note:
    """State of a loader process: since `since` it has been reading a file, or doing something else.

    `since` is a time of `time.monotonic`, which all processes share; `number` distinguishes notes. `line` (from 0) and
    `manifest` name the file that is being read, or that was read last; -1 for none.
    """

    number: int
    since: float  # s
    line: int
    manifest: int
    reading: bool


NOTHING = Note(0, 0.0, -1, -1, False)  # for a process that writes no notes, or has not begun


class Page:
    """The page that a process writes its notes to. `manifests` are known by identity."""

    def __init__(self, memory: mmap.mmap, manifests: Sequence[object]) -> None:
        self._memory = memory
        self._place_of = {id(manifest): place for place, manifest in enumerate(manifests)}
        self._number, self._line, self._place = 0, -1, -1
        self.end()

    def begin(self, manifest: object, line: int) -> None:
        self._number += 1
        self._line, self._place = line, self._place_of.get(id(manifest), -1)
        _NOTE.pack_into(self._memory, 0, self._number, time.monotonic(), line, self._place, True)

    def end(self) -> None:
        self._number += 1
        _NOTE.pack_into(self._memory, 0, self._number, time.monotonic(), self._line, self._place, False)

    def moved(self) -> None:
        _SINCE.pack_into(self._memory, _SINCE_AT, time.monotonic())


class Notes:
    """Pages for `workers` processes, forked from this one, that read the lines of `manifests`."""

    def __init__(self, workers: int, manifests: Sequence[object]) -> None:
        self.manifests = manifests
        self._pages = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(workers)]
        for page in self._pages:  # a process may die before it enters
            _NOTE.pack_into(page, 0, *astuple(NOTHING))

    def enter(self, worker: int) -> None:
        """Start to note what this process reads; call it in the loader process."""
        global own
        own = Page(self._pages[worker], self.manifests)

    def of(self, worker: int) -> Note:
        """Return the last note of a loader process; call it in the process that made the pages."""
        page = self._pages[worker]
        for _ in range(_ATTEMPTS):
            note = Note(*_NOTE.unpack_from(page))
            if Note(*_NOTE.unpack_from(page)).number == note.number:  # it was not being written
                break
        return note


own: Page | None = None  # the page of this process, if it is a loader process


def moved() -> None:
    """Note that data of a remote file is still arriving."""
    if own is not None:
        own.moved()
