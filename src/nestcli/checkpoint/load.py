"""Any checkpoint: its configuration and its weights, whatever kind of file it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from nestcli.checkpoint.lightning import config_of_content, load_lightning_checkpoint
from nestcli.checkpoint.nemo import read_nemo, read_nemo_config
from nestcli.checkpoint.weights import checked_state, checked_tensors
from nestcli.errors import CheckpointError

SUFFIXES = (".ckpt", ".nemo")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A complete configuration, and weights that fit it: names, shapes, types and values are checked."""

    config: DictConfig
    state_dict: dict[str, Tensor]


def load_checkpoint(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedCheckpoint:
    """Read a .ckpt or .nemo file and apply `key=value` words to its configuration. Raises CheckpointError, ConfigError.

    Nothing that the file holds is executed. Weights have NeMo's names, in NeMo's order.
    """
    if _checked_path(path).suffix == ".nemo":
        return LoadedCheckpoint(*read_nemo(path, overrides))
    content = load_lightning_checkpoint(path)
    config = config_of_content(content, str(path), list(overrides))
    return LoadedCheckpoint(config, checked_state(_state_of(content, str(path)), config, str(path)))


def checkpoint_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration alone, which need not fit the weights once the overrides are applied."""
    if _checked_path(path).suffix == ".nemo":
        return read_nemo_config(path, overrides)
    return config_of_content(load_lightning_checkpoint(path, mmap=True), str(path), list(overrides))


def checkpoint_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights alone: a .ckpt then needs no configuration, and only plain tensors are promised."""
    if _checked_path(path).suffix == ".nemo":
        return read_nemo(path)[1]
    return _state_of(load_lightning_checkpoint(path), str(path))


def _state_of(content: Mapping[str, object], source: str) -> dict[str, Tensor]:
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source}: its state_dict is not a table of tensors but a {type(state).__name__}.")
    return checked_tensors(state, source)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked = Path(path)
    if checked.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} is not a checkpoint: the name ends with none of {', '.join(SUFFIXES)}.")
    if not checked.is_file():
        raise CheckpointError(f"{path}: no such checkpoint.")
    return checked
