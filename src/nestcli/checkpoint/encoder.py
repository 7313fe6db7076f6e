"""Read only the encoder from a file that holds one: a NEST, another model's .nemo, a transformers folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from nestcli.checkpoint.load import checkpoint_config, load_checkpoint
from nestcli.checkpoint.nemo import other_nemo, other_nemo_weights
from nestcli.checkpoint.nemo_config import config_around
from nestcli.checkpoint.transformers import is_transformers, read_transformers, transformers_blocks
from nestcli.checkpoint.weights import check_finite, fitted_tensor, model_skeleton
from nestcli.errors import CheckpointError
from nestcli.model.config import NestConfig
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.speech_encoder import SpeechEncoder


@dataclass(frozen=True)
class StoredEncoder:
    """An encoder with its preprocessor: a NEST configuration built around their blocks, and checked weights.

    The weights have the order of our model. `kind` is the class of the model in the file; `left` counts the other
    tensors of that model by the first part of their names.
    """

    config: DictConfig
    state_dict: dict[str, Tensor]
    kind: str
    left: Mapping[str, int]

    def build(self) -> SpeechEncoder:
        """Return the module in evaluation mode; it can be trained later, even if built in inference mode."""
        with torch.inference_mode(False):
            encoder = fresh_encoder(self.config)
            encoder.load_state_dict(self.state_dict)
            return encoder.eval()


def fresh_encoder(config: DictConfig) -> SpeechEncoder:
    """Return the encoder of a configuration with weights drawn from torch's generator; it is never compiled."""
    blocks = NestConfig.from_config(config)
    return SpeechEncoder(blocks.preprocessor, replace(blocks.encoder, compile=False))


def read_encoder(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StoredEncoder:
    """Read the encoder in a .nemo, .ckpt or .safetensors file or in a transformers folder.

    A .nemo may hold NEST, Parakeet or another FastConformer; `reference` is the encoder in the package. Nothing in the
    file is executed. Raises CheckpointError, and ConfigError for an encoder that cannot be built here.
    """
    source = str(path)
    if is_transformers(path):
        blocks = transformers_blocks(Path(path))
        config = config_around(blocks.preprocessor, blocks.encoder, source, overrides)
        model_skeleton(config, source)
        return _stored(config, read_transformers(Path(path)), blocks.kind, source)
    other = other_nemo(path)
    if other is not None:
        config = config_around(other.preprocessor, other.encoder, source, overrides)
        model_skeleton(config, source)  # refuses absurd sizes before memory is allocated for them
        return _stored(config, other_nemo_weights(path), other.kind, source)
    loaded = load_checkpoint(path, overrides)
    return _stored(loaded.config, loaded.state_dict, "NEST", source)


def encoder_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> DictConfig:
    """Read only the configuration. For another model, return a NEST configuration around that model's encoder."""
    if is_transformers(path):
        blocks = transformers_blocks(Path(path))
        return config_around(blocks.preprocessor, blocks.encoder, str(path), overrides)
    other = other_nemo(path)
    if other is not None:
        return config_around(other.preprocessor, other.encoder, str(path), overrides)
    return checkpoint_config(path, overrides)


def _stored(config: DictConfig, state: Mapping[str, Tensor], kind: str, source: str) -> StoredEncoder:
    with torch.device("meta"):
        wanted = fresh_encoder(config).state_dict()
    derived = _of_preprocessor(config)  # other models' files may leave these out
    fitted = {}
    for name, like in wanted.items():
        if name in state:
            fitted[name] = fitted_tensor(name, state[name], like, source)
        elif name in derived:
            fitted[name] = derived[name]
        else:
            raise CheckpointError(f"{source} lacks {name}: its weights do not fit the encoder in its configuration.")
    odd = [name for name in state if name.startswith("encoder.") and name not in wanted]
    if odd:
        raise CheckpointError(
            f"{source} holds {odd[0]}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}, which no FastConformer "
            "encoder of nest has. Refused: without it, this would be a different encoder."
        )
    check_finite(fitted, source)
    return StoredEncoder(config, fitted, kind, Counter(n.partition(".")[0] for n in state if n not in wanted))


def _of_preprocessor(config: DictConfig) -> dict[str, Tensor]:
    state = LogMelPreprocessor(NestConfig.from_config(config).preprocessor).state_dict()
    return {f"preprocessor.{name}": value for name, value in state.items()}
