"""Atomic writes of checkpoints: a file is written completely or not at all."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import torch

from nestcli import files
from nestcli.errors import CheckpointError


class UnwrittenError(CheckpointError):
    """A checkpoint could not be written, for example because the disk is full; a previous file is untouched."""


def atomic_file(path: str | os.PathLike[str]) -> AbstractContextManager[BinaryIO]:
    """Open `path` with `files.atomic_file`. Raises UnwrittenError."""
    return files.atomic_file(path, UnwrittenError, "Older checkpoints are untouched.")


def save_tensors(content: Any, file: BinaryIO) -> None:
    """Call `torch.save`; raise the file's own OSError (such as a full disk), which PyTorch's writer hides."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
