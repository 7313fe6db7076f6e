"""NeMo's .nemo files: a tar of `model_config.yaml` and `model_weights.ckpt`.

Files are written for NeMo 3.0.0 and read from untrusted sources. docs/decisions/0005 explains what is refused and why.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nestcli.checkpoint.archive import RECORD, Archive, header_of, open_archive, padding
from nestcli.checkpoint.atomic import atomic_file, save_tensors
from nestcli.checkpoint.nemo_config import from_nemo, is_nest, plain_yaml, to_nemo, yaml_of
from nestcli.checkpoint.weights import checked_state, fitted_state, load_weights, model_skeleton
from nestcli.checks import MAX_YAML
from nestcli.errors import CheckpointError
from nestcli.storage.tar_headers import BLOCK

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_LARGEST_ITEM = 8  # bytes of a number in fp64
_LARGEST_MEMBER = (8 << 30) - 1  # bytes; the largest size that fits into a tar header
_OVERHEAD = 1 << 16  # bytes; an upper bound for a zip entry, its alignment and its line in the table of tensors


def write_nemo(path: str | os.PathLike[str], config: DictConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Write a .nemo file that NeMo 3.0.0 restores: atomically, and with the same bytes for the same model.

    Weights are stored as NeMo stores them: in its order, in fp32, codebooks in fp64. Raises CheckpointError.
    """
    text = yaml_of(to_nemo(config))
    weights = OrderedDict(
        (name, _alone(value)) for name, value in fitted_state(state_dict, config, f"the model for {path}").items()
    )
    with atomic_file(path) as file:
        file.write(header_of("./", 0, folder=True))
        file.write(header_of(f"./{CONFIG}", len(text)) + text + padding(len(text)))
        header = file.tell()
        file.write(bytes(BLOCK))  # filled in when the size is known
        save_tensors(weights, file)
        size = file.tell() - header - BLOCK
        if size > _LARGEST_MEMBER:
            raise CheckpointError(f"{path}: weights of {size:,} bytes do not fit into a .nemo file. Keep the .ckpt.")
        file.write(padding(size) + bytes(2 * BLOCK))
        file.write(padding(file.tell(), RECORD))
        file.seek(header)
        file.write(header_of(f"./{WEIGHTS}", size))


def read_nemo(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[DictConfig, dict[str, Tensor]]:
    """Read a .nemo file of any NeMo version: the complete configuration, with overrides applied, and checked weights.

    Nothing is extracted or executed, and an archive with anything unusual in it is refused. Raises CheckpointError.
    """
    with open_archive(Path(path)) as archive:
        config = _config_in(archive, overrides)
        largest = _largest_size(model_skeleton(config, str(path)))
        file, size = archive.open(WEIGHTS)
        if size > largest:
            raise CheckpointError(
                f"{path}: {WEIGHTS} has {size:,} bytes, more than the {largest:,} that the model can need. Refused."
            )
        state = load_weights(file, size, str(path))
        return config, checked_state(state, config, str(path))


def read_nemo_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DictConfig:
    """Read the complete configuration in a .nemo file, without its weights. Raises CheckpointError."""
    with open_archive(Path(path)) as archive:
        return _config_in(archive, overrides)


@dataclass(frozen=True)
class OtherModel:
    """A model other than NEST: its class, and the blocks of its configuration that describe an encoder."""

    kind: str
    preprocessor: Any
    encoder: Any


def other_nemo(path: str | os.PathLike[str]) -> OtherModel | None:
    """Describe the model in a .nemo file if it is not a NEST; return None for a NEST and for other files.

    Raises CheckpointError.
    """
    if Path(path).suffix != ".nemo" or not Path(path).is_file():
        return None
    with open_archive(Path(path)) as archive:
        keys = ("target", "quantizer", "preprocessor", "encoder")
        content = plain_yaml(_config_bytes(archive), archive.source, keys)
    if is_nest(content) or not isinstance(content.get("encoder"), Mapping):
        return None
    kind = str(content.get("target")).rpartition(".")[2][:100]
    return OtherModel(kind, content.get("preprocessor"), content["encoder"])


def other_nemo_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a .nemo file, of any model. Raises CheckpointError."""
    with open_archive(Path(path)) as archive:
        return load_weights(*archive.open(WEIGHTS), str(path))


def _config_in(archive: Archive, overrides: Sequence[str]) -> DictConfig:
    return from_nemo(plain_yaml(_config_bytes(archive), archive.source), archive.source, overrides)


def _config_bytes(archive: Archive) -> bytes:
    file, size = archive.open(CONFIG)
    if size > MAX_YAML:
        raise CheckpointError(f"{archive.source}: {CONFIG} has {size:,} bytes, more than {MAX_YAML:,}. Refused.")
    return file.read()


def _largest_size(model: torch.nn.Module) -> int:
    state: Mapping[str, Tensor] = model.state_dict()
    return sum((_LARGEST_ITEM * value.numel() + _OVERHEAD for value in state.values()), start=_OVERHEAD)


def _alone(value: Tensor) -> Tensor:
    """Return the tensor, copied if it shares its storage: `torch.save` would write the whole storage."""
    value = value.detach().cpu().contiguous()
    return value if value.untyped_storage().nbytes() == value.numel() * value.element_size() else value.clone()
