"""Lightning checkpoints: write them atomically, and read them without running anything that is in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from omegaconf import DictConfig

from nestcli.checkpoint.atomic import atomic_file
from nestcli.checkpoint.digest import save_digested, verify
from nestcli.checkpoint.nemo_lightning import PICKLED
from nestcli.checkpoint.sizes import oversized
from nestcli.checkpoint.weights import check_zip, loaded
from nestcli.config import config_from_dict
from nestcli.errors import CheckpointError
from nestcli.model.module import CONFIG_KEY


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint I/O that writes atomically and reads safely.

    Writing goes to a temporary file in the same folder, which is synced, read back and renamed, so that a file with
    the final name is always complete. Reading accepts only tensors and plain data, whatever Lightning asks for:
    Lightning 2.4, which NeMo pins, would run code in a file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        with atomic_file(path) as file:
            save_digested(checkpoint, file)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_lightning_checkpoint(path)


def load_lightning_checkpoint(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Read a .ckpt file: plain data and tensors only. Raises CheckpointError, DamagedError.

    With `mmap`, tensors stay on disk until they are used, and the bytes are not verified (see `digest.verify`).
    """
    try:
        if not mmap:
            verify(path)
        _check(path)
        content = loaded(path, mmap=mmap)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}. "
            "It is damaged, or it holds more than tensors and plain data."
        ) from None
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of `nest pretrain`: it has no state_dict.")
    return dict(content)


def _check(path: str | os.PathLike[str]) -> None:
    """Refuse files on which PyTorch would exhaust the memory or run for days. Raises CheckpointError."""
    with Path(path).open("rb") as file:
        status = os.fstat(file.fileno())
        if odd := oversized(status):
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {odd}. Refused.")
        check_zip(file, status.st_size, str(path), also=PICKLED)


def config_of_content(content: Mapping[str, Any], source: str, overrides: list[str]) -> DictConfig:
    """Return the configuration in the content of a .ckpt file, with overrides applied. Raises CheckpointError."""
    if not isinstance(content.get(CONFIG_KEY), Mapping):
        raise CheckpointError(
            f"{source} has no readable configuration: neither `nest pretrain` nor NeMo's NEST wrote it. "
            "Its weights alone can start a run: nest pretrain CONFIG init_from_ptl_ckpt=FILE"
        )
    return config_from_dict(content[CONFIG_KEY], source, overrides)
