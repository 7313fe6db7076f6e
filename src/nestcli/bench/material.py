"""The manifest lines of a configuration's training set, for measurements that do not use the loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig

from nestcli.data.manifest import Manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import ConfigError, DataError
from nestcli.files import user_path

_NOT_FILES = ("is_tarred", "shar_path", "input_cfg", "cuts_path")


@dataclass(frozen=True)
class Material:
    """Utterances whose duration training accepts, and noise."""

    speech: Manifest
    noise: Manifest | None


def read_material(config: DictConfig) -> Material:
    """Read the manifests of `model.train_ds`. Raises ConfigError for other kinds of data, DataError if none is left."""
    block = config.model.train_ds
    for key in _NOT_FILES:
        if block.get(key):
            raise ConfigError(
                f"nest bench measures on single audio files: remove model.train_ds.{key} and set "
                "model.train_ds.manifest_filepath."
            )
    speech = read_manifests(_paths(block.manifest_filepath))
    shortest, longest = block.get("min_duration") or 0.0, block.get("max_duration") or np.inf
    kept = speech.select((speech.durations >= shortest) & (speech.durations <= longest))
    if len(kept) == 0:
        raise DataError(
            f"model.train_ds: none of the {len(speech)} utterances lasts between {shortest:g} and {longest:g} s. "
            "Change model.train_ds.min_duration or model.train_ds.max_duration."
        )
    noise = block.noise_manifest
    return Material(kept, read_manifests(_paths(noise), require_duration=False) if noise else None)


def _paths(value: Any) -> str | list[str]:
    if isinstance(value, str):
        return user_path(value)
    return [user_path(str(path)) for path in value]
