"""What a loader process is reading, noted in memory that it shares with the process that waits for its batches.

A note costs some 2 µs and takes no lock: a process that dies at any place leaves a note that can be read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestcli.data.manifest import Entry, Manifest

_HEADER = struct.Struct("=QdII?")  # notes made so far, since when, first byte and length of the text, reading or not
_SINCE = struct.Struct("=d")
_TEXT = 8 << 10  # bytes; two paths of the longest kind
_PAGE = 64 + 2 * _TEXT  # texts take turns, so that the last one stays whole while the next is written
_ATTEMPTS = 10
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Note:
    """What a process says of itself: it has been reading a file, or doing something else, `since` then.

    `since` is of `time.monotonic`, which all processes share; `number` tells notes apart. `name` and `line` are those
    of the file that is being read, or was last; the name is empty while the line itself is being read.
    """

    number: int
    since: float  # s
    reading: bool
    name: str
    line: str


class _Page:
    """A process's own page, to write to."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory, self._number = memory, 0
        self._start = self._length = 0
        self.end()

    def begin(self, name: str, line: str) -> None:
        text = f"{name}\0{line}".encode("utf-8", "backslashreplace")[:_TEXT]
        self._start = 64 + self._number % 2 * _TEXT
        self._length = len(text)
        self._memory[self._start : self._start + self._length] = text
        self._note(reading=True)

    def end(self) -> None:
        self._note(reading=False)

    def moved(self) -> None:
        _SINCE.pack_into(self._memory, 8, time.monotonic())

    def _note(self, *, reading: bool) -> None:
        self._number += 1
        _HEADER.pack_into(self._memory, 0, self._number, time.monotonic(), self._start, self._length, reading)


class Notes:
    """A page for each of `workers` processes, which must be forked from this one."""

    def __init__(self, workers: int) -> None:
        self._pages: list[mmap.mmap] | None = [mmap.mmap(-1, _PAGE) for _ in range(workers)]
        self._parent = os.getpid()
        self._dies_with_parent = False

    def forking(self) -> None:
        """In the process that made the pages: it is about to fork.

        The kernel takes the thread that forks for the parent: only the main one lasts as long as the process does.
        """
        self._dies_with_parent = threading.current_thread() is threading.main_thread()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pages": None}  # a process that is not forked cannot see them

    def enter(self, worker: int) -> None:
        """In a loader process: from now on what it reads is noted, and it does not outlive its parent."""
        global _own
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides what it means
        if self._pages is not None:
            _own = _Page(self._pages[worker])
            if self._dies_with_parent:
                _die_with(self._parent)

    def of(self, worker: int) -> Note:
        """In the process that made the pages: what a loader process noted last."""
        assert self._pages is not None
        page = self._pages[worker]
        for _ in range(_ATTEMPTS):
            number, since, start, length, reading = _HEADER.unpack_from(page)
            text = page[start : start + length]
            if _HEADER.unpack_from(page)[0] == number:
                break
        name, _, line = text.decode("utf-8", "replace").partition("\0")
        return Note(number, since, reading, name, line)


_own: _Page | None = None  # of this process, if it is a loader's


class Noted:
    """A context: the entry of a line, noted as what this process reads until the block ends. Raises DataError."""

    __slots__ = ("_line", "_manifest")

    def __init__(self, manifest: Manifest, line: int) -> None:
        self._manifest, self._line = manifest, line

    def __enter__(self) -> Entry:
        if _own is None:
            return self._manifest.entry(self._line)
        where = self._manifest.where(self._line)
        _own.begin("", where)  # a relative path is looked for, which can hang as well
        try:
            entry = self._manifest.entry(self._line)
        except BaseException:
            _own.end()
            raise
        _own.begin(entry.name, where)
        return entry

    def __exit__(self, *_: object) -> None:
        if _own is not None:
            _own.end()


def moved() -> None:
    """Note that what is being read, from far away, is still coming in."""
    if _own is not None:
        _own.moved()


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent goes, even in the middle of a file that does not end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it went just now
            os._exit(1)
