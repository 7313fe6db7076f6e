"""Read audio, manifests and shards from remote addresses.

Single audio files are read into memory. Manifests and shards are copied once into a cache that all processes of this
machine share. `fetch` talks to the servers, `cache` keeps the copies.
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
from nestcli.files import SCHEMES, is_remote, user_path
from nestcli.storage import allowed_folders, cache, fetch

CACHE_VARIABLE, SIZE_VARIABLE = cache.CACHE_VARIABLE, cache.SIZE_VARIABLE
MAX_OBJECT = 2 << 30  # bytes of an object that is read into memory
_PLAIN_NAME = re.compile(r"[^A-Za-z0-9._-]+")

_copies: dict[str, Path] = {}  # copies that this process, or its parent before the fork, has requested


def check_remote(path: str) -> None:
    """Raise ValueError for an address that must not be read: unknown scheme, chained addresses, a password in it."""
    shown = fetch.shown(path)[:80]
    if not is_remote(path):
        raise ValueError(f"{shown!r} is an address of an unknown kind; nest reads {', '.join(SCHEMES)}")
    scheme, _, rest = path.partition("://")
    if "::" in path:
        raise ValueError(f"{scheme}://...: chained addresses (with `::`) are refused")
    if not path.isprintable():
        raise ValueError(f"{shown!r} has unprintable characters")
    try:
        host = urlsplit(path).netloc
    except ValueError as error:  # brackets without an IP address in them
        raise ValueError(f"{shown!r} is not a valid address: {error}") from None
    owner = host.rpartition("@")[0]  # abfs://CONTAINER@ACCOUNT.dfs.core.windows.net has no password
    if ":" in owner or (owner and scheme in ("http", "https")):
        raise ValueError(f"{scheme}://...: addresses with a password in them are refused; {fetch.credentials(path)}")
    if not rest.strip("/") or (not host and scheme != "hdfs"):
        raise ValueError(f"{shown!r} names no object")


def join(folder: str, path: str) -> str:
    """Return the address of a path relative to a remote folder; `..` stops at the bucket or host."""
    if is_remote(path):
        return path
    scheme, _, place = folder.partition("://")
    if scheme in ("http", "https"):
        place, path = place.partition("?")[0], quote(path)  # ? and # are ordinary characters in a file's name
    top, _, inside = place.rstrip("/").partition("/")
    parts = inside.split("/") if inside else []
    for part in path.lstrip("/").split("/"):
        if part == "..":
            del parts[-1:]
        elif part != ".":
            parts.append(part)
    return f"{scheme}://{top}/{'/'.join(parts)}"


def read_bytes(path: str) -> bytes:
    """Read a whole object. Raises DataError: at once if it does not exist, after four attempts if it is unreachable."""
    _check(path)
    return fetch.read(path, MAX_OBJECT)


def local_copy(path: str, cache_dir: str | None = None, *, keep: bool = False) -> str:
    """Return the path of a local copy of an object, from the cache or fetched into it. Raises DataError.

    Each process checks once whether the object has changed since it was cached, and fetches it again if so. The cache
    is `cache_dir`, or else `cache_folder()`. It is kept below $NEST_CACHE_GB (50) by removing the copies that were
    used longest ago, but none that was used in the last minute. So open the copy at once; it stays readable as long as
    it is open. With `keep`, the copy is not removed while this process, or one that it forks, lives.
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
    """Return the folder for copies of remote files: $NEST_CACHE/remote, or ~/.cache/nest/remote."""
    return Path(user_path(os.environ.get(CACHE_VARIABLE) or "~/.cache/nest")) / "remote"


def _check(path: str) -> None:
    try:
        check_remote(path)
    except ValueError as error:
        raise DataError(str(error)) from None
    if why := allowed_folders.outside(path):
        raise DataError(f"{fetch.shown(path)} is not read: {why}")


def _fetched(path: str, folder: Path) -> Path:
    """Return the copy of an object's current version on the server; download it if necessary."""
    for _ in range(fetch.ATTEMPTS):
        found = fetch.describe(path)
        copy = folder / _name(path, found)
        limit = cache.limit()

        def write(file: BinaryIO, found: fetch.Description = found, limit: int = limit) -> bool:
            fetch.download(path, found, file, limit)
            return fetch.describe(path) == found  # else it was replaced meanwhile, and the copy may mix both versions

        if cache.make(copy, found.size, limit, write):
            return copy
    raise DataError(f"{fetch.shown(path)} changes while it is read. Wait until it is fully written.")


def _name(path: str, found: fetch.Description) -> str:
    """Return a copy's name: it differs for each version on the server, and keeps the ending, which tells the format."""
    version = found.version or time.strftime("%Y-%m-%d", time.gmtime())  # servers without versions are asked daily
    digest = blake2b("\0".join([path, version, str(found.size)]).encode("utf-8", "surrogatepass"), digest_size=16)
    name = _PLAIN_NAME.sub("_", path.partition("://")[2].partition("?")[0].rpartition("/")[2])
    return f"{digest.hexdigest()}-{name[-80:]}"
