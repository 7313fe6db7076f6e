"""Any checkpoint: its configuration and its weights, whatever kind of file it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from nestcli.checkpoint.lightning import config_of_content, load_lightning_checkpoint
from nestcli.checkpoint.weights import checked_tensors, fitted_state
from nestcli.errors import CheckpointError

SUFFIXES = (".ckpt",)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A complete configuration, and weights that fit it: names, shapes, types and values are checked."""

    config: DictConfig
    state_dict: dict[str, Tensor]


def load_checkpoint(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedCheckpoint:
    """Read a checkpoint and apply `key=value` words to its configuration. Raises CheckpointError and ConfigError.

    Nothing that the file holds is executed. Weights have NeMo's names, in NeMo's order.
    """
    content = load_lightning_checkpoint(_checked_path(path))
    config = config_of_content(content, str(path), list(overrides))
    return LoadedCheckpoint(config, dict(fitted_state(_state_of(content, str(path)), config, str(path))))


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
