"""Lightning checkpoints: written whole or not at all, read without running anything that is in them."""

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
    """Writes a temporary file in the same folder, syncs it, reads it back and renames it: a name is a whole file.

    Reads tensors and plain data only, whatever Lightning asks for: 2.4, which NeMo pins, would run code in a file.
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
    """The content of a .ckpt file: plain data and tensors only. Raises CheckpointError, DamagedError.

    With `mmap` tensors stay on disk until they are used, and nobody has looked at all bytes: see `digest.verify`.
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
            "It is damaged, or holds more than tensors and plain data."
        ) from None
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of `nest pretrain`: it has no state_dict.")
    return dict(content)


def _check(path: str | os.PathLike[str]) -> None:
    """Refuse what PyTorch would take a machine's memory for, or run for days on. Raises CheckpointError."""
    with Path(path).open("rb") as file:
        status = os.fstat(file.fileno())
        if odd := oversized(status):
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {odd}. Refused.")
        check_zip(file, status.st_size, str(path), also=PICKLED)


def config_of_content(content: Mapping[str, Any], source: str, overrides: list[str]) -> DictConfig:
    """The configuration in the content of a .ckpt file, overrides applied."""
    if not isinstance(content.get(CONFIG_KEY), Mapping):
        raise CheckpointError(
            f"{source} carries no configuration that can be read: neither `nest pretrain` nor a NEST of NeMo wrote it. "
            "Its weights alone can start a run: nest pretrain CONFIG init_from_ptl_ckpt=FILE"
        )
    return config_from_dict(content[CONFIG_KEY], source, overrides)
