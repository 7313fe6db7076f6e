"""NEST in one safetensors file, without pickle: weights under NeMo's names, the configuration as JSON metadata."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nestcli.checkpoint.atomic import atomic_file
from nestcli.checkpoint.sizes import oversized
from nestcli.checkpoint.weights import checked_state, fitted_state, model_skeleton
from nestcli.config import config_from_dict, resolved
from nestcli.errors import CheckpointError

CONFIG_KEY = "nest_config"
# Weights that a file in half precision rounds. Statistics of batch norm, mel filters and codes stay as they are.
_HALVED = re.compile(r"(encoder|decoder)\.(?!.*\.running_)")
_MAX_CONFIG = 1 << 18  # bytes
_MAX_HEADER = 8 << 20  # bytes; the largest preset's has 200,000


def write_safetensors(
    path: str | os.PathLike[str], config: DictConfig, state_dict: Mapping[str, Tensor], *, half: bool = False
) -> None:
    """Write weights and configuration atomically; with `half`, the trained weights in fp16. Raises CheckpointError."""
    state = fitted_state(state_dict, config, f"the model for {path}")
    if half:
        state.update({k: v.half() for k, v in state.items() if v.is_floating_point() and _HALVED.match(k)})
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(resolved(config))}
    with atomic_file(path) as file:
        file.write(save({name: value.contiguous().clone() for name, value in state.items()}, metadata))


def read_safetensors(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[DictConfig, dict[str, Tensor]]:
    """Read the complete configuration, with overrides applied, and the checked weights.

    Raises CheckpointError and ConfigError.
    """
    config = safetensors_config(path, overrides)
    model_skeleton(config, str(path))
    return config, checked_state(safetensors_weights(path), config, str(path))


def safetensors_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DictConfig:
    """Read only the configuration. Raises CheckpointError and ConfigError."""
    with _opened(path) as file:
        text = (file.metadata() or {}).get(CONFIG_KEY)
    if text is None or len(text) > _MAX_CONFIG:
        raise CheckpointError(
            f"{path} has no NEST configuration: `nest export --to safetensors` did not write it."
            if text is None
            else f"{path}: its configuration has {len(text):,} bytes, more than {_MAX_CONFIG:,}. Refused."
        )
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its configuration must be valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its configuration must be a mapping of keys, not a {type(content).__name__}.")
    return config_from_dict(content, str(path), overrides)


def safetensors_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, of any model. Raises CheckpointError."""
    with _opened(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from None


def _opened(path: str | os.PathLike[str]) -> Any:
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint.")
    try:
        with Path(path).open("rb") as file:
            odd, length = oversized(os.fstat(file.fileno())), int.from_bytes(file.read(8), "little")
        if odd or _MAX_HEADER < length <= Path(path).stat().st_size:
            raise CheckpointError(f"{path} cannot be read: {odd or f'its table has {length:,} bytes'}. Refused.")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or it is damaged: {error}.") from None
