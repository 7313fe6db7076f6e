"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import torch

from nestcli import files
from nestcli.errors import CheckpointError


class UnwrittenError(CheckpointError):
    """A checkpoint that could not be written, for want of space say; what was there before still is."""


def atomic_file(path: str | os.PathLike[str]) -> AbstractContextManager[BinaryIO]:
    """`files.atomic_file`; raises UnwrittenError."""
    return files.atomic_file(path, UnwrittenError, "Older checkpoints are untouched.")


def save_tensors(content: Any, file: BinaryIO) -> None:
    """`torch.save`; raises the file's own OSError, such as that of a full disk, where PyTorch's writer hides it."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
