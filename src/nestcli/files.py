"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from nestcli.errors import NestError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], error: type[NestError] = NestError, remedy: str = "", *, sync: bool = True
) -> Iterator[BinaryIO]:
    """A temporary file in the folder of `path`, synced and given that name when the block ends without an exception.

    What stood at `path` before is untouched until then. An OSError becomes `error`, with `remedy` as its last words.
    Without `sync` a file is whole after a kill, and perhaps not after a power cut: for many that can be made again.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(target)
        if sync:
            _sync_folder(target.parent)
    except OSError as problem:
        raise error(f"{target} cannot be written: {problem.strerror or problem}. {remedy}".rstrip()) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(
    path: str | os.PathLike[str], pieces: Iterable[str], error: type[NestError] = NestError, remedy: str = ""
) -> None:
    """Write pieces of text in UTF-8, whole or not at all."""
    with atomic_file(path, error, remedy) as file:
        file.writelines(piece.encode() for piece in pieces)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; none may be writing there."""
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
