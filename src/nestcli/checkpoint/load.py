"""Load a checkpoint of any format: its configuration and its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nestcli.checkpoint.lightning import config_of_content, load_lightning_checkpoint
from nestcli.checkpoint.nemo import other_nemo, other_nemo_weights, read_nemo, read_nemo_config
from nestcli.checkpoint.nemo_config import from_nemo
from nestcli.checkpoint.nemo_lightning import STAND_INS, hyper_parameters
from nestcli.checkpoint.safetensors_file import read_safetensors, safetensors_config, safetensors_weights
from nestcli.checkpoint.weights import check_finite, checked_state, checked_tensors
from nestcli.errors import CheckpointError
from nestcli.model.module import CONFIG_KEY

SUFFIXES = (".ckpt", ".nemo", ".safetensors")
REFERENCE = "reference"  # names the encoder in the package wherever a checkpoint is read
_PACKAGED = Path(__file__).parents[1] / "reference" / "encoder.safetensors"


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A complete configuration and weights that fit it; names, shapes, types and values are checked."""

    config: DictConfig
    state_dict: dict[str, Tensor]


def packaged_encoder() -> Path:
    """Return the path of the reference encoder, a part of the package. Raises CheckpointError if it is missing."""
    if not _PACKAGED.is_file():
        raise CheckpointError(
            f"{REFERENCE}: this installation of nest lacks {_PACKAGED}. Install nestcli again, or name a checkpoint."
        )
    return _PACKAGED


def checkpoint_path(path: str | os.PathLike[str]) -> Path:
    """Return the path that a user's word names: `reference` is the packaged encoder, unless it exists as a path."""
    is_packaged = os.fspath(path) == REFERENCE and not os.path.lexists(path)
    return packaged_encoder() if is_packaged else Path(path)


def load_checkpoint(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedCheckpoint:
    """Read a .ckpt, .nemo or .safetensors file, or `reference`; apply `key=value` overrides to its configuration.

    Nothing in the file is executed. Weights have NeMo's names, in NeMo's order. Raises CheckpointError and ConfigError.
    """
    path = _checked_path(path)
    suffix = path.suffix
    if suffix == ".nemo":
        return LoadedCheckpoint(*read_nemo(path, overrides))
    if suffix == ".safetensors":
        return LoadedCheckpoint(*read_safetensors(path, overrides))
    content = _content(path)
    config = _config_of(content, str(path), overrides)
    return LoadedCheckpoint(config, checked_state(_state_of(content, str(path)), config, str(path)))


def checkpoint_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DictConfig:
    """Read only the configuration, with overrides applied; it is not checked against the weights."""
    path = _checked_path(path)
    suffix = path.suffix
    if suffix == ".nemo":
        return read_nemo_config(path, overrides)
    if suffix == ".safetensors":
        return safetensors_config(path, overrides)
    return _config_of(_content(path, mmap=True), str(path), overrides)


def checkpoint_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read only the weights, of any model; a .ckpt then needs no configuration. Raises CheckpointError."""
    path = _checked_path(path)
    suffix = path.suffix
    if suffix == ".nemo" and other_nemo(path) is None:
        return read_nemo(path)[1]
    if suffix == ".nemo":
        state = other_nemo_weights(path)
    elif suffix == ".safetensors":
        state = safetensors_weights(path)
    else:
        state = _state_of(_content(path), str(path))
    check_finite(state, str(path))
    return state


def _content(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a .ckpt of `nest pretrain` or NeMo, after checks of its size and the names in it."""
    with torch.serialization.safe_globals([*STAND_INS]):
        return load_lightning_checkpoint(path, mmap=mmap)


def _config_of(content: Mapping[str, Any], source: str, overrides: Sequence[str]) -> DictConfig:
    model = None if CONFIG_KEY in content else hyper_parameters(content, source)
    if model is not None:
        return from_nemo(model, source, overrides)
    return config_of_content(content, source, list(overrides))


def _state_of(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    state = content["state_dict"]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{source}: its state_dict is not a table of tensors but a {type(state).__name__}.")
    return checked_tensors(state, source)


def _checked_path(path: str | os.PathLike[str]) -> Path:
    checked = checkpoint_path(path)
    if checked.suffix not in SUFFIXES:
        there = sorted(checked.glob("checkpoints/*.nemo")) if os.path.isdir(path) else []  # noqa: PTH112  (pathlib raises for some)
        meant = f" Did you mean {there[0]}?" if there else ""
        if os.fspath(path) == REFERENCE:
            meant += " It hides the encoder of that name in the package: work in another folder, or rename it."
        raise CheckpointError(f"{path} is not a checkpoint: its name must end with {', '.join(SUFFIXES)}.{meant}")
    if not checked.is_file():
        raise CheckpointError(f"{path}: no such checkpoint.")
    return checked
