"""Cache folder that all processes of a machine share: each copy is made once, the least recently used are removed.

A process writes a copy under a second name and holds a lock on that file itself, so no lock file is needed. If the
process dies, its lock becomes free and the next one overwrites the partial file. A finished copy is never changed, only
removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nestcli.errors import NestError
from nestcli.jobs.activity import moved

CACHE_VARIABLE, SIZE_VARIABLE = "NEST_CACHE", "NEST_CACHE_GB"
_DEFAULT_GB = 50.0
_GROWING = ".part"
_POLL = 0.05  # s between checks of a copy that another process is writing
_JUST_USED = 60.0  # s after a request in which a copy is not removed, because it is about to be opened

_OURS = re.compile(r"[0-9a-f]{32}-")  # the folder may hold the user's own files too

_held: dict[Path, int] = {}  # descriptors whose locks keep copies from being removed


def limit() -> int:
    """Return how many bytes the folder may hold."""
    text = os.environ.get(SIZE_VARIABLE) or str(_DEFAULT_GB)
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 < size < float("inf"):
        raise NestError(f"${SIZE_VARIABLE} is {text!r}; it must be a number of gigabytes.")
    return int(size * 1e9)


def make(copy: Path, size: int | None, limit: int, write: Callable[[BinaryIO], bool]) -> bool:
    """Make sure that `copy` exists: call `write` to fill it, or wait for a process that is writing it now.

    `size` is in bytes, or None if unknown. Returns False if `write` did, which means that the content is unusable.
    Raises NestError.
    """
    part = copy.with_name(copy.name + _GROWING)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        while not _is_whole(copy, size):
            with _locked(part) as file:
                if file is None:
                    moved()  # tells the trainer that this process makes progress: the writing process is watched itself
                    time.sleep(_POLL)
                elif not _is_whole(copy, size):  # another process may have finished it before we got the lock
                    _make_room(copy.parent, size or 0, limit)
                    if not _fill(file, part, copy, write):
                        return False
                else:
                    part.unlink(missing_ok=True)
    except OSError as error:
        raise NestError(
            f"{copy.parent} cannot hold copies of remote files: {error.strerror or error}. "
            f"Set ${CACHE_VARIABLE} to a folder with free space, or ${SIZE_VARIABLE} to what is available."
        ) from None
    touch(copy)
    return True


def touch(copy: Path) -> bool:
    """Mark a copy as used now. Return False if it does not exist."""
    try:
        os.utime(copy)
    except FileNotFoundError:
        return False
    except OSError:  # another user's folder, or a read-only one
        return copy.exists()
    return True


def hold(copy: Path) -> bool:
    """Protect a copy from removal while this process or its forks live. Return False if it does not exist."""
    if copy in _held:
        return True
    try:
        descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise NestError(
            f"{len(_held):,} remote manifests are open, and this process may have {most:,} files open. "
            "Allow more with `ulimit -n`, or name fewer manifests."
        ) from None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not _is_still(descriptor, copy):
        os.close(descriptor)
        return False
    _held[copy] = descriptor
    return True


def _is_whole(copy: Path, size: int | None) -> bool:
    try:
        there = copy.stat().st_size
    except FileNotFoundError:
        return False
    return size is None or there == size


def _fill(file: BinaryIO, part: Path, copy: Path, write: Callable[[BinaryIO], bool]) -> bool:
    done = False
    try:
        file.truncate(0)
        if write(file):
            file.flush()
            os.fsync(file.fileno())
            part.replace(copy)
            done = True
    finally:
        if not done:
            part.unlink(missing_ok=True)
    return done


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO | None]:
    """Open a file, created if necessary, under an exclusive lock; yield None if another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+b") as file:  # noqa: PTH123  (a descriptor)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        try:
            yield file if _is_still(descriptor, path) else None
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # at once, even if a process was forked with it meanwhile


def _is_still(descriptor: int, path: Path) -> bool:
    """Return True if a path still names an open file; it may have been renamed or removed before we got the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _make_room(folder: Path, wanted: int, limit: int) -> None:
    """Remove the least recently used copies until `wanted` more bytes fit. Open copies stay readable."""
    if wanted > limit:
        raise NestError(f"a file of {wanted:,} bytes does not fit into a cache of {limit:,}. Set ${SIZE_VARIABLE}.")
    files = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode) and _OURS.match(path.name):
                files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files) + wanted
    for used, size, path in sorted(files):
        if total <= limit or used > time.time() - _JUST_USED:
            return
        if _remove(path):
            total -= size


def _remove(path: Path) -> bool:
    """Remove a file unless a process is writing or holding it. Return True if it was removed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
