"""Read objects from servers through fsspec, with retries.

fsspec and its packages for a scheme are imported when an address is first used. Errors that the network may have caused
are retried, with four attempts in all. The clients' own retries are disabled; together they would make a hundred.
"""

from __future__ import annotations

import io
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, TypeVar

from nestcli.errors import DataError, MissingDependencyError, NestError
from nestcli.jobs.activity import moved

ATTEMPTS = 4
_FIRST_WAIT = 0.5  # s before the second attempt; three times as long before each further one
_BLOCK = 8 << 20  # bytes per request
_PARALLEL = 4  # requests in flight at a time; a single stream from S3 does not fill a fast line
_CONNECT, _SILENCE = 10, 60  # timeouts in s: for connecting, and for the next byte
_WEB = ("http", "https")
_PACKAGES = {
    "s3": "nestcli[s3]", "gs": "nestcli[gcs]", "gcs": "nestcli[gcs]", "az": "nestcli[azure]", "abfs": "nestcli[azure]",
    "hdfs": "pyarrow", "oci": "ocifs", "http": "fsspec[http]", "https": "fsspec[http]",
}  # fmt: skip
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws (AWS_PROFILE), or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or the machine's account",
    "az": "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY",
    "http": "~/.netrc, or headers in FSSPEC_HTTP",
    "hdfs": "Kerberos' ticket",
    "oci": "~/.oci/config",
}
_SAME = {"gcs": "gs", "abfs": "az", "https": "http"}
_VERSION_KEYS = (
    "ETag", "etag", "md5Hash", "generation", "LastModified", "Last-Modified", "last_modified", "mtime", "updated",
)  # fmt: skip
_SECRETS = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@|(?<=\?)[^\s'\")]+")

_T = TypeVar("_T")
_filesystems: dict[tuple[object, ...], Any] = {}


@dataclass(frozen=True, slots=True)
class Description:
    """Size in bytes of an object and a text that identifies its version, as far as the server states them."""

    size: int | None
    version: str


def shown(text: str) -> str:
    """Return an address, or a message that quotes one, without passwords and signatures."""
    return _SECRETS.sub("***", text)


def credentials(path: str) -> str:
    """Say where credentials for an address are looked up."""
    scheme = path.partition("://")[0]
    return f"credentials are taken from {_CREDENTIALS[_SAME.get(scheme, scheme)]}"


def describe(path: str) -> Description:
    """Ask for an object's size and version. Raises DataError, also if it does not exist or is a folder."""
    info = _tried(path, lambda files, place: files.info(place))
    if info.get("type") == "directory":
        raise DataError(f"{shown(path)} is a folder, not a file.")
    return Description(info.get("size"), "\0".join(str(info[key]) for key in _VERSION_KEYS if info.get(key)))


def read(path: str, limit: int) -> bytes:
    """Read a whole object of at most `limit` bytes in one request. Raises DataError."""

    def work(files: Any, place: str) -> bytes:
        if not _is_web(path):
            content: bytes = files.cat_file(place, start=0, end=limit + 1)
            if len(content) > limit:
                raise _too_large(path, limit)
            return content
        memory = io.BytesIO()
        files.get_file(place, _Limited(memory, path, limit))
        return memory.getvalue()

    try:
        return _tried(path, work)
    except _EmptyError:
        return b""


def download(path: str, found: Description, file: BinaryIO, limit: int) -> None:
    """Write the object that `found` describes to an open file, in blocks. Raises DataError."""
    if _is_web(path) or found.size is None:
        _tried(path, lambda files, place: _stream(path, files, place, found.size, file, limit))
        return
    for start in range(0, found.size, _BLOCK * _PARALLEL):
        starts = list(range(start, min(start + _BLOCK * _PARALLEL, found.size), _BLOCK))
        ends = [min(each + _BLOCK, found.size) for each in starts]
        for block in _tried(path, partial(_blocks, starts=starts, ends=ends)):
            file.write(block)
        moved()


def _stream(path: str, files: Any, place: str, size: int | None, file: BinaryIO, limit: int) -> None:
    """Download an object in a single response, because not every web server supports ranges."""
    file.seek(0)
    file.truncate()
    files.get_file(place, _Limited(file, path, limit if size is None else size))
    if size is not None and file.tell() != size:
        raise ConnectionError(f"only {file.tell()} of {size} bytes arrived")


def _blocks(files: Any, place: str, starts: list[int], ends: list[int]) -> list[bytes]:
    blocks: list[bytes] = files.cat_ranges([place] * len(starts), starts, ends, on_error="raise")
    for block, start, end in zip(blocks, starts, ends, strict=True):
        if len(block) != end - start:
            raise ConnectionError(f"only {len(block)} of {end - start} bytes arrived")
    return blocks


class _Limited:
    """Writable file that accepts at most `limit` bytes."""

    def __init__(self, file: BinaryIO, path: str, limit: int) -> None:
        self._file, self._path, self._limit = file, path, limit

    def write(self, block: bytes) -> int:
        if self._file.tell() + len(block) > self._limit:
            raise _too_large(self._path, self._limit)
        moved()
        try:
            return self._file.write(block)
        except OSError as error:
            raise _LocalError(error) from None

    def read(self) -> bytes:  # fsspec treats objects with read, tell and close as files
        raise io.UnsupportedOperation

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None: ...


def _too_large(path: str, limit: int) -> DataError:
    return DataError(f"{shown(path)} has more than {limit:,} bytes. Is this the file that you mean?")


# --- attempts


class _LocalError(Exception):
    """An error of this machine's disk, not of the network."""

    def __init__(self, problem: OSError) -> None:
        super().__init__(problem)
        self.problem = problem


class _EmptyError(DataError):
    pass


def _tried(path: str, work: Callable[[Any, str], _T]) -> _T:
    """Run `work`, and retry it if the network may be at fault. Raises DataError."""
    wait = _FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work(*_filesystem(path))
        except (NestError, MemoryError):
            raise
        except _LocalError as error:
            raise error.problem from None
        except Exception as error:  # each file system raises its own types
            answer = _answer(error)
            if answer != "again" or attempt == ATTEMPTS:
                raise _failure(path, error, answer) from None
        time.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311  (so that processes do not retry in step)
        wait *= 3
    raise AssertionError("unreachable")


Answer = Literal["missing", "denied", "empty", "refused", "again"]


def _answer(error: BaseException) -> Answer:
    """Classify an error; `again` means that another attempt may help.

    fsspec's HTTP client reports every failure as "not found", with the real error as the cause. S3's errors keep the
    server's response as well.
    """
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return _answer(error.__cause__)
    status = _status(error)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return "denied"
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        return "missing"
    if status == 416:
        return "empty"  # the range is not satisfiable: the object has no first byte
    if status is not None:
        return "again" if status >= 500 or status in (408, 425, 429) else "refused"
    return "refused" if isinstance(error, (ValueError, TypeError, IsADirectoryError)) else "again"


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error, wherever the client keeps it, or None."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for status in (response, *(getattr(error, name, None) for name in ("status", "status_code", "code"))):
            if isinstance(status, int) and 300 <= status < 600:
                return status
        # Causes of other errors do not count: aiohttp's parser calls truncated content a 400.
        error = error.__cause__ if isinstance(error, OSError) else None
    return None


def _failure(path: str, error: BaseException, answer: Answer) -> DataError:
    where = shown(path)
    if answer == "missing":
        return DataError(f"{where}: the object does not exist.")
    if answer == "denied":
        return DataError(f"{where}: access is denied; {credentials(path)}.")
    if answer == "empty":
        return _EmptyError(f"{where}: the object is empty.")
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(error, "status", None)
    why = f"the server answers {status} {getattr(error, 'message', '')}" if status else " ".join(str(error).split())
    why = shown(why.replace(path, where)).strip() or type(error).__name__
    return DataError(f"{where} cannot be read{f' after {ATTEMPTS} attempts' if answer == 'again' else ''}: {why}.")


# --- fsspec


def _is_web(path: str) -> bool:
    return path.partition("://")[0] in _WEB


def _filesystem(path: str) -> tuple[Any, str]:
    """Return this process's own file system for an address, and the name of the address in it.

    A file system that was created before a fork is neither used nor released in the child. Closing its connections
    would, through the event loop's shared epoll, remove them from the parent's loop too, which would then wait forever
    for responses.
    """
    scheme = path.partition("://")[0]
    try:
        import fsspec

        kind = fsspec.get_filesystem_class(scheme)
        own = kind._get_kwargs_from_urls(path)  # HDFS keeps the host there, Azure the account
        key = (os.getpid(), kind, *sorted(own.items()))
        if key not in _filesystems:
            files = kind(skip_instance_cache=True, use_listings_cache=False, **{**_options(kind), **own})
            if scheme == "s3":
                files.retries = 1
            _filesystems[key] = files
    except ImportError as error:
        remedy = f"Run pip install '{_PACKAGES[scheme]}'."
        raise MissingDependencyError(f"{scheme}:// needs a package that is missing ({error}). {remedy}") from None
    return _filesystems[key], kind._strip_protocol(path)


def _options(kind: Any) -> dict[str, Any]:
    """Return our defaults, overridden by the user's own configuration of fsspec ($FSSPEC_S3, $FSSPEC_HTTP)."""
    from fsspec.config import apply_config

    theirs = apply_config(kind, {})
    if "s3" in kind.protocol:
        retries = {"retries": {"total_max_attempts": 1}, "connect_timeout": _CONNECT, "read_timeout": _SILENCE}
        return {"config_kwargs": {**retries, **theirs.get("config_kwargs", {})}}
    if "http" in kind.protocol:
        import aiohttp

        ours = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE),
            "auto_decompress": False,  # some servers declare a .gz as encoded; it must stay compressed
            "trust_env": True,  # use the proxies that it names
        }
        given = theirs.get("client_kwargs", {})
        return {
            "client_kwargs": {**ours, **given, "headers": {"Accept-Encoding": "identity", **given.get("headers", {})}}
        }
    return {}
