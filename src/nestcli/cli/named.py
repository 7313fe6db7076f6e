"""Load the configuration that a command's first words name: a preset, a YAML file, or a checkpoint that contains it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestcli.cli import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

CHECKPOINTS = (".ckpt", ".nemo", ".safetensors")


@dataclass(frozen=True)
class Named:
    """A configuration with its overrides applied, and the weights that came with it."""

    name: str
    config: DictConfig
    state_dict: dict[str, Any] | None = None  # tensors; Any, because torch is not imported here


def read_named(words: Sequence[str]) -> Named:
    """Read `[CONFIG or CHECKPOINT] [key=value ...]`. Raises NestError."""
    from nestcli.config import load_config, split_words

    name, overrides = split_words(words)
    if not name.endswith(CHECKPOINTS):
        return _told(Named(name, load_config(name, overrides)))
    from nestcli.checkpoint.load import load_checkpoint

    loaded = load_checkpoint(name, overrides)
    return _told(Named(name, loaded.config, loaded.state_dict))


def read_config(words: Sequence[str], *, training: bool = False) -> Named:
    """Read the same words without loading weights; with `training`, environment variables apply. Raises NestError.

    For a checkpoint of another model or a transformers folder, the configuration is a NEST model with its encoder.
    """
    from nestcli.config import load_config, load_training_config, split_words, words_of_environment

    name, overrides = split_words(words)
    if not name.endswith(CHECKPOINTS) and not Path(name, "config.json").is_file():
        return _told(Named(name, (load_training_config if training else load_config)(name, overrides)))
    from nestcli.checkpoint.encoder import encoder_config

    return _told(Named(name, encoder_config(name, [*(words_of_environment() if training else []), *overrides])))


def _told(named: Named) -> Named:
    """Print a note for every key that nest does not read, and return the argument."""
    from nestcli.config import unused_keys

    for told in unused_keys(named.config):
        console.note(told)
    return named
