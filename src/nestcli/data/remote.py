"""Audio, manifests and shards at remote addresses, through fsspec.

Single files are read into memory; manifests and shards are copied into a cache on this machine once, whoever asks.
fsspec, and what it needs for a scheme, are imported when an address is first used.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from nestcli.errors import DataError, MissingDependencyError

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "hdfs", "oci")
CACHE_VARIABLE, SIZE_VARIABLE = "NEST_CACHE", "NEST_CACHE_GB"
ATTEMPTS = 4
_FIRST_WAIT = 0.5  # s before the second attempt; doubled before each further one
_DEFAULT_GB = 50.0
_MAX_OBJECT = 2 << 30  # bytes of an object that is read into memory
_BLOCK = 1 << 22  # bytes
_EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure"}

_T = TypeVar("_T")
_copies: dict[str, str] = {}  # what this process has asked for already


def is_remote(path: str) -> bool:
    """Whether a path is an address of a scheme that we read."""
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme in SCHEMES


def check_remote(path: str) -> None:
    """Raise ValueError for an address that is not read: other schemes, chains of them, passwords in it."""
    if not is_remote(path):
        raise ValueError(f"{path[:60]!r} is an address of an unknown kind; those read are {', '.join(SCHEMES)}")
    host = path.partition("://")[2].partition("/")[0]
    if "::" in path or "@" in host:
        raise ValueError(
            f"{path.partition('://')[0]}://...: addresses in chains, or with a password in them, are refused"
        )


def join(folder: str, path: str) -> str:
    """A path that is relative to a remote folder."""
    return f"{folder.rstrip('/')}/{path.removeprefix('./')}"


def read_bytes(path: str) -> bytes:
    """A whole object. Raises DataError, at once if there is none, after four attempts if it cannot be reached."""
    files = _files(path)

    def read() -> bytes:
        size = files.info(path).get("size")
        if size is not None and size > _MAX_OBJECT:
            raise DataError(f"{path} has {size >> 20} MiB, too much for one recording")
        content: bytes = files.cat_file(path)
        if size is not None and len(content) != size:
            raise ConnectionError(f"{len(content)} of {size} bytes came")
        return content

    return _tried(path, read)


def local_copy(path: str) -> str:
    """A file on this machine with an object's content, from the cache or fetched into it. Raises DataError.

    An object that has changed since it was cached is fetched again; each process looks once. The cache is $NEST_CACHE,
    or ~/.cache/nest, and is kept below $NEST_CACHE_GB (50) by removing what was not used for longest; a process that
    has a removed file open still reads it.
    """
    if path not in _copies or not Path(_copies[path]).exists():
        files = _files(path)
        info = _tried(path, lambda: files.info(path))
        _copies[path] = str(_fetched(path, files, info))
    return _copies[path]


# --- the cache


def cache_folder() -> Path:
    """Where copies of remote files are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/nest").expanduser() / "remote"


def _fetched(path: str, files: Any, info: dict[str, Any]) -> Path:
    version = [str(info.get(key, "")) for key in ("ETag", "etag", "size", "mtime", "LastModified", "last_modified")]
    digest = blake2b("\0".join([path, *version]).encode(), digest_size=16).hexdigest()
    folder = cache_folder()
    copy = folder / f"{digest}-{path.rpartition('/')[2][-80:]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{digest}.lock"):
            if copy.exists():
                os.utime(copy)
            else:
                _make_room(folder, int(info.get("size") or 0))
                _tried(path, lambda: _download(path, files, copy, info.get("size")))
    except OSError as error:
        raise DataError(
            f"{path} cannot be kept in {folder}: {error.strerror or error}. Set ${CACHE_VARIABLE}."
        ) from None
    return copy


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Of all processes of the machine one goes on; a lock whose process died is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(path: str, files: Any, copy: Path, size: int | None) -> None:
    part = copy.with_name(f".{copy.name}.part")  # of this process alone: it holds the lock
    try:
        with files.open(path, "rb", cache_type="readahead", block_size=_BLOCK) as source, part.open("wb") as target:
            while block := source.read(_BLOCK):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())
        if size is not None and part.stat().st_size != size:
            raise ConnectionError(f"{part.stat().st_size} of {size} bytes came")
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)


def _make_room(folder: Path, wanted: int) -> None:
    limit = float(os.environ.get(SIZE_VARIABLE) or _DEFAULT_GB) * 1e9
    copies = [(file.stat(), file) for file in folder.iterdir() if not file.name.startswith(".")]
    total = sum(status.st_size for status, _ in copies) + wanted
    for status, file in sorted(copies, key=lambda each: each[0].st_mtime):
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size


# --- fsspec


def _files(path: str) -> Any:
    """The file system of an address. fsspec makes one anew in each forked process."""
    try:
        check_remote(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    scheme = path.partition("://")[0]
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        remedy = f'pip install "nestcli[{extra}]"' if extra else str(error)
        raise MissingDependencyError(f"{path}: what reads {scheme}:// is not installed. Run {remedy}.") from None


def _tried(path: str, work: Callable[[], _T]) -> _T:
    """Do it, again and again where the network may be at fault; raises DataError."""
    wait = _FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except (DataError, MissingDependencyError):
            raise
        except Exception as error:  # each file system has its own kinds
            if (final := _final_answer(error)) is not None:
                raise DataError(f"{path}: {final}") from None
            if attempt == ATTEMPTS:
                why = " ".join(str(error).split()) or type(error).__name__
                raise DataError(f"{path} cannot be read after {attempt} attempts: {why}") from None
        time.sleep(wait)
        wait *= 2
    raise AssertionError("unreachable")


def _final_answer(error: Exception) -> str | None:
    """What the server said, if it would say the same again; None where another attempt may help.

    fsspec's HTTP says "not found" of anything that went wrong, and has the truth as the cause.
    """
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
    status = getattr(cause, "status", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return (
            "access is denied. Credentials are taken from where the provider's own tools look: environment variables, "
            "configuration files, the machine's role"
        )
    if isinstance(error, FileNotFoundError) and (status == 404 or not isinstance(cause, OSError | TimeoutError)):
        return "there is no such object" if status in (None, 404) else None
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return " ".join(str(cause).split())
    return None
