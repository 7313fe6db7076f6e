"""Write files completely or not at all, and never outside their folder; understand the paths that users write.

A results folder may come from somebody else with links planted in it: nothing is written through a link.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import unquote

from nestcli.errors import NestError

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "hdfs", "oci")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], error: type[NestError] = NestError, remedy: str = "", *, sync: bool = True
) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`; sync it and rename it to `path` if the block ends without an exception.

    An existing file at `path` stays untouched until then. An OSError of this file becomes `error`, with `remedy` at
    the end of its message; one of another file, such as a source that the block cannot read, passes unchanged.
    Without `sync`, a file is complete after a kill but perhaps not after a power cut: use it for many files that can
    be made again.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    foreign: OSError | None = None
    raw: _Watched | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # left by a killed process, or a planted link
        raw = _Watched(temporary, "x+b")
        with io.BufferedRandom(raw) as file:
            try:
                yield file
            except OSError as problem:
                foreign = None if raw.failed or _is_of(problem, temporary) else problem
                raise
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(target)
        if sync:
            _sync_folder(target.parent)
    except OSError as problem:
        if problem is foreign:
            raise
        cause = problem if raw is None or raw.failed is None else raw.failed  # libraries may raise another error
        raise error(f"{target} cannot be written: {cause.strerror or cause}. {remedy}".rstrip()) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class _Watched(io.FileIO):
    """A file that remembers its own OSError: the library that writes to it may raise a different error."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        with self._noted():
            return super().write(data)

    def readinto(self, buffer: Any) -> int:
        with self._noted():
            return super().readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._noted():
            return super().seek(offset, whence)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            self.failed = problem
            raise


def _is_of(problem: OSError, place: Path) -> bool:
    """Return True if an error comes from writing to `place`: it names a path there, or none and is a write error."""
    if problem.filename is None:
        return problem.errno in _WRITE_ERRORS
    return Path(os.fsdecode(problem.filename)).absolute().is_relative_to(place.absolute())


_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def new_folder(
    path: str | os.PathLike[str], error: type[NestError] = NestError, *, force: bool = False
) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` if the block ends without an exception.

    An existing folder that is not empty stays unchanged and raises `error`, unless `force` replaces it. An OSError of
    this folder becomes `error`; one of another file passes unchanged.
    """
    foreign: OSError | None = None
    target = Path(path)
    temporary, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        if target.exists() and not force and (not target.is_dir() or any(target.iterdir())):
            raise error(f"{target} already exists. Name a new folder, or add --force to replace it.")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
        except OSError as problem:
            foreign = None if _is_of(problem, temporary) else problem
            raise
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
    except OSError as problem:
        if problem is foreign:
            raise
        raise error(f"{target} cannot be written: {problem.strerror or problem}.") from None
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def user_path(path: str) -> str:
    """Expand a path that a user wrote in a call, a configuration or a manifest.

    A leading `~` or `~USER` becomes that user's home, and `file:///a%20b` becomes `/a b`. Environment variables are
    not expanded: the shell does that. Other addresses, and `~USER` of an unknown user, stay unchanged.
    """
    if path.startswith("file:"):
        address = path.removeprefix("file:")
        local = (
            address.removeprefix("//localhost") if address.startswith("//localhost/") else address.removeprefix("//")
        )
        return unquote(local) if local.startswith("/") and not local.startswith("//") else path
    try:  # pathlib raises for an unknown user; os.path raises only for a zero byte or a name that is not UTF-8
        return os.path.expanduser(path)  # noqa: PTH111
    except ValueError:
        return path


def is_remote(path: str) -> bool:
    """Return True if a path is an address with a supported scheme."""
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme in SCHEMES


def write_text(
    path: str | os.PathLike[str], pieces: Iterable[str], error: type[NestError] = NestError, remedy: str = ""
) -> None:
    """Write pieces of text in UTF-8, completely or not at all."""
    with atomic_file(path, error, remedy) as file:
        file.writelines(piece.encode() for piece in pieces)


def open_kept(path: str | os.PathLike[str], mode: str, error: type[NestError] = NestError, **options: Any) -> IO[Any]:
    """Open a file that is kept and appended to, such as a journal, but never through a symbolic or hard link.

    Raises `error` for a link and for anything that is not a regular file, OSError if the disk fails.
    """
    try:
        file = open(path, mode, opener=_own_file, **options)  # noqa: SIM115  # the caller closes it
    except OSError as problem:
        why = _NOT_OURS.get(problem.errno or 0)
        if why is None:
            raise
        raise error(f"{path} cannot be written: {why}. Move it away, or choose another folder.") from None
    return file


@contextmanager
def held_alone(folder: Path, refusal: NestError, patience: float = 0.0) -> Iterator[None]:
    """Lock a folder through its file `.lock`. Raises `refusal` if another process holds it.

    Waits up to `patience` s: children of a killed process may hold the lock until they notice. On a file system
    without locks, nothing is locked.
    """
    with open_kept(folder / ".lock", "a", type(refusal)) as lock:
        deadline = time.monotonic() + patience
        while _is_taken(lock):
            if time.monotonic() > deadline:
                raise refusal
            time.sleep(0.05)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)  # at once, even if a process that inherited it by fork still lives


def _is_taken(lock: IO[Any]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


_NOT_OURS = {errno.ELOOP: "it is a link", errno.EMLINK: "it is a link, or has a second hard link elsewhere",
             **dict.fromkeys((errno.EINVAL, errno.ENXIO, errno.EISDIR), "it is not a regular file")}  # fmt: skip


def _own_file(path: str, flags: int) -> int:
    """Open a regular file with a single hard link; O_NONBLOCK keeps a pipe from blocking."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    status = os.fstat(descriptor)
    wrong = errno.EINVAL if not stat.S_ISREG(status.st_mode) else errno.EMLINK if status.st_nlink > 1 else 0
    if wrong:
        os.close(descriptor)
        raise OSError(wrong, os.strerror(wrong))
    return descriptor


def refuse_links(folder: Path, error: type[NestError] = NestError, *, itself: bool = True) -> None:
    """Raise `error` if a results folder, or one below it, is a link: files written there would land elsewhere.

    With `itself` False, the folder itself may be a link: the user named it.
    """
    if itself and folder.is_symlink():
        raise error(f"{folder} is a link, and nest writes nothing through links. Remove it, or choose another folder.")
    waiting = [folder] if folder.is_dir() else []
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink() and entry.is_dir():
                        raise error(
                            f"{entry.path} is a link, and nest writes nothing through links. Remove it, or choose "
                            "another folder."
                        )
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
        except OSError as problem:
            raise error(f"{folder} cannot be searched: {problem.strerror}.") from None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder. No process may be writing there."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_name(key: str, identity: str) -> str:
    """Return a name for a converted file: readable parts of `key`, and a hash that is unique to `identity`."""
    parts = [part for part in Path(os.path.splitext(key)[0]).parts if part not in ("/", "..", ".")]  # noqa: PTH122
    readable = "/".join(_plain(part) for part in parts[-3:]) or "audio"
    return f"{readable}-{blake2b(identity.encode('utf-8', 'surrogatepass'), digest_size=6).hexdigest()}"


def _plain(part: str) -> str:
    kept = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in part)
    return kept.lstrip(".-")[:80] or "_"
