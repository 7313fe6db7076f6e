"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nestcli.errors import CheckpointError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file in the folder of `path`, synced and given that name when the block ends without an error.

    Raises CheckpointError; what stood at `path` before is then untouched.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}. Older checkpoints are untouched."
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_tensors(content: Any, file: BinaryIO) -> None:
    """`torch.save`; raises the file's own OSError, such as that of a full disk, where PyTorch's writer hides it."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
