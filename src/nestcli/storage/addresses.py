"""Audio, manifests and shards at remote addresses.

Single files are read into memory; manifests and shards are copied into a cache on this machine once, whoever asks.
`fetch` talks to the servers, `cache` keeps the copies.
"""

from __future__ import annotations

import os
import re
import time
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, urlsplit

from nestcli.errors import DataError
from nestcli.files import user_path
from nestcli.storage import allowed_folders, cache, fetch

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "hdfs", "oci")
CACHE_VARIABLE, SIZE_VARIABLE = cache.CACHE_VARIABLE, cache.SIZE_VARIABLE
MAX_OBJECT = 2 << 30  # bytes of an object that is read into memory
_PLAIN_NAME = re.compile(r"[^A-Za-z0-9._-]+")

_copies: dict[str, Path] = {}  # what this process, or the one that it was forked from, has asked for already


def is_remote(path: str) -> bool:
    """Whether a path is an address of a scheme that we read."""
    scheme, found, _ = path.partition("://")
    return bool(found) and scheme in SCHEMES


def check_remote(path: str) -> None:
    """Raise ValueError for an address that is not read: other schemes, chains of them, passwords in it."""
    shown = fetch.shown(path)[:80]
    if not is_remote(path):
        raise ValueError(f"{shown!r} is an address of an unknown kind; those read are {', '.join(SCHEMES)}")
    scheme, _, rest = path.partition("://")
    if "::" in path:
        raise ValueError(f"{scheme}://...: addresses in chains (with `::`) are refused")
    if not path.isprintable():
        raise ValueError(f"{shown!r} has characters in it that cannot be printed")
    try:
        host = urlsplit(path).netloc
    except ValueError as error:  # brackets that hold no number
        raise ValueError(f"{shown!r} is no address: {error}") from None
    owner = host.rpartition("@")[0]  # abfs://CONTAINER@ACCOUNT.dfs.core.windows.net is no password
    if ":" in owner or (owner and scheme in ("http", "https")):
        raise ValueError(f"{scheme}://...: addresses with a password in them are refused; {fetch.credentials(path)}")
    if not rest.strip("/") or (not host and scheme != "hdfs"):
        raise ValueError(f"{shown!r} names no object")


def join(folder: str, path: str) -> str:
    """The address of a path that is relative to a remote folder; `..` stops at the bucket or host."""
    if is_remote(path):
        return path
    scheme, _, place = folder.partition("://")
    if scheme in ("http", "https"):
        place, path = place.partition("?")[0], quote(path)  # a file's name, in which ? and # are letters like others
    top, _, inside = place.rstrip("/").partition("/")
    parts = inside.split("/") if inside else []
    for part in path.lstrip("/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{top}/{'/'.join(parts)}"


def read_bytes(path: str) -> bytes:
    """A whole object. Raises DataError, at once if there is none, after four attempts if it cannot be reached."""
    _check(path)
    return fetch.read(path, MAX_OBJECT)


def local_copy(path: str, cache_dir: str | None = None, *, keep: bool = False) -> str:
    """A file on this machine with an object's content, from the cache or fetched into it. Raises DataError.

    An object that has changed since it was cached is fetched again; each process looks once. The cache is
    `cache_dir`, or `cache_folder()`. It is kept below $NEST_CACHE_GB (50) by removing what was not used for longest,
    but nothing of the last minute: open what you get at once, and it can be read as long as it is open. With `keep`
    it is not removed while this process, or one that it forks, lives.
    """
    _check(path)
    folder = Path(cache_dir) if cache_dir else cache_folder()
    key = f"{folder}\0{path}"
    while True:
        copy = _copies.get(key)
        if copy is None or not cache.touch(copy):
            copy = _copies[key] = _fetched(path, folder)
        if not keep or cache.hold(copy):  # another process may have removed it just now
            return str(copy)


def cache_folder() -> Path:
    """Where copies of remote files are kept: $NEST_CACHE/remote, or ~/.cache/nest/remote."""
    return Path(user_path(os.environ.get(CACHE_VARIABLE) or "~/.cache/nest")) / "remote"


def _check(path: str) -> None:
    try:
        check_remote(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    if why := allowed_folders.outside(path):
        raise DataError(f"{fetch.shown(path)} is not read: {why}")


def _fetched(path: str, folder: Path) -> Path:
    """The copy of an object as it is on the server now, made if need be."""
    for _ in range(fetch.ATTEMPTS):
        found = fetch.describe(path)
        copy = folder / _name(path, found)
        limit = cache.limit()

        def write(file: BinaryIO, found: fetch.Description = found, limit: int = limit) -> bool:
            fetch.download(path, found, file, limit)
            return fetch.describe(path) == found  # or it was replaced meanwhile, and this may be half of each

        if cache.make(copy, found.size, limit, write):
            return copy
    raise DataError(f"{fetch.shown(path)} changes while it is read. Wait until it is written.")


def _name(path: str, found: fetch.Description) -> str:
    """A copy's name: other content on the server has another one; the ending stays, since it tells the format."""
    version = found.version or time.strftime("%Y-%m-%d", time.gmtime())  # a server that says nothing is asked daily
    digest = blake2b("\0".join([path, version, str(found.size)]).encode("utf-8", "surrogatepass"), digest_size=16)
    name = _PLAIN_NAME.sub("_", path.partition("://")[2].partition("?")[0].rpartition("/")[2])
    return f"{digest.hexdigest()}-{name[-80:]}"
