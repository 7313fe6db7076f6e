"""Changes of the configuration between two parts of a run: which take effect, which are announced, which are refused.

docs/checkpoints.md has them as a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nestcli.checks import as_written
from nestcli.config import leaves, resolved
from nestcli.data.corpus import DatasetConfig
from nestcli.errors import ConfigError
from nestcli.files import write_text
from nestcli.keys import START_KEYS
from nestcli.model.config import (
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    MaskingConfig,
    OptimizerConfig,
    PreprocessorConfig,
    QuantizerConfig,
    ScheduleConfig,
)
from nestcli.training.settings import NestBlock, TrainerConfig

_BLOCKS: dict[str, type[Any]] = {
    "model.preprocessor": PreprocessorConfig,
    "model.masking": MaskingConfig,
    "model.quantizer": QuantizerConfig,
    "model.encoder": EncoderConfig,
    "model.decoder": DecoderConfig,
    "model.loss": LossConfig,
    "model.optim": OptimizerConfig,
    "model.optim.sched": ScheduleConfig,
    "model.train_ds": DatasetConfig,
    "model.validation_ds": DatasetConfig,
    "trainer": TrainerConfig,
    "nest": NestBlock,
}
# Keys of the model that may change between two parts of a run. The others make a different model, even if all shapes
# stay the same.
MAY_CHANGE = {
    "model.preprocessor": {"dither", "pad_to", "nemo_exact"},
    "model.quantizer": {"dist_fn", "freeze", "squeeze_single", "init"},
    "model.encoder": {
        "dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att", "stochastic_depth_drop_prob",
        "stochastic_depth_mode", "stochastic_depth_start_layer", "use_pytorch_sdpa", "conv_norm_ignore_padding",
        "backend", "compile", "dropout_draws", "pos_emb_max_len",
    },
    "model.decoder": {"squeeze_single"},
    "model.masking": {"block_size", "mask_prob", "freeze", "allow_overlap", "max_mask_ratio"},
}  # fmt: skip
# Keys whose change is not announced: the speed of the loader, the run's length and name, keys without effect.
_QUIET = (
    "name", "exp_manager", "model.spec_augment", "model.encoder.pos_emb_max_len", *START_KEYS, "model.quantizer.init",
    *(f"model.{part}.{key}" for part in ("train_ds", "validation_ds")
      for key in ("num_workers", "pin_memory", "read_timeout", "max_failed_share", "use_start_end_token")),
)  # fmt: skip
_TRAINER_KEYS = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "sync_batchnorm")
_BEST = tuple(
    f"exp_manager.checkpoint_callback_params.{key}"
    for key in ("monitor", "mode", "every_n_train_steps", "every_n_epochs")
)  # if one of them changes, Lightning does not restore the best models
_SHOWN = 8  # maximum number of keys in a message


@dataclass(frozen=True)
class Changes:
    """The keys whose values differ between a checkpoint's configuration and the current one: (then, now)."""

    former: Mapping[str, Any]
    step: int
    keys: dict[str, tuple[Any, Any]]

    @classmethod
    def of(cls, former: Mapping[str, Any] | None, config: DictConfig, step: int) -> Changes:
        """Compare `former`, the configuration in the checkpoint of `step` (None: no checkpoint), with the current."""
        if former is None:
            return cls({}, step, {})
        then, now = dict(leaves(former)), dict(leaves(resolved(config)))
        _fold_blocks(then, now)
        _fold_blocks(now, then)
        defaults = _defaults()
        pairs = {key: tuple(each.get(key, defaults.get(key)) for each in (then, now)) for key in {**then, **now}}
        differing = {key: (one, two) for key, (one, two) in pairs.items() if one != two and not _is_name(key)}
        return cls(former, step, differing)

    def check(self, checkpoint: Path) -> None:
        """Raise ConfigError for a change that makes a different model."""
        for key, (then, now) in self.keys.items():
            block, _, name = key.rpartition(".")
            ours = block in MAY_CHANGE and any(field.name == name for field in dataclasses.fields(_BLOCKS[block]))
            if key == "model.mask_position" or (ours and name not in MAY_CHANGE[block]):
                raise ConfigError(
                    f"the run in {checkpoint.parent.parent} has {key}={as_written(then)}, but the configuration has "
                    f"{as_written(now)}, which makes a different model. Set {key}={as_written(then)} to resume the "
                    f"run, or another exp_manager.name with init_from_ptl_ckpt={checkpoint} to start a new run from "
                    "its weights."
                )

    def announce(self, note: Callable[[str], None]) -> None:
        """Report the changes that affect training from here on, but not those of the run's length or speed."""
        announced = {key: pair for key, pair in self.keys.items() if _is_announced(key)}
        if announced:
            shown = [f"{key} is {as_written(now)}, was {as_written(then)}" for key, (then, now) in announced.items()][
                :_SHOWN
            ]
            more = f"; and {len(announced) - _SHOWN} more keys" if len(announced) > _SHOWN else ""
            note(
                f"The configuration changes from step {self.step + 1:,} on: {'; '.join(shown)}{more}. "
                f"The previous one is kept as {self.kept_name}."
            )
        if "seed" in announced:
            note("The new seed applies to data order, augmentation, masks and dropout; weights and codebooks stay.")
        if any(key in self.keys for key in _BEST):
            note("The search for the best model starts again; the best checkpoints so far stay in the folder.")

    @property
    def kept_name(self) -> str:
        return f"config-to-step-{self.step}.yaml"

    def keep_former(self, folder: Path) -> None:
        """Write the previous configuration beside config.yaml if anything differs. Raises NestError."""
        if self.keys:
            write_text(folder / self.kept_name, [OmegaConf.to_yaml(OmegaConf.create(dict(self.former)))])


def record_initial_weights(config: DictConfig, former: Mapping[str, Any] | None) -> None:
    """Make the configuration of a resumed run name the initial weights that the run began with, and no others."""
    if former is None:
        return
    for key in START_KEYS:
        if key in config or former.get(key) is not None:
            OmegaConf.update(config, key, former.get(key), merge=False, force_add=True)


def _fold_blocks(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Fold each block of `other` that is null in `one` into one key: only its presence differs."""
    for block in [key for key, value in one.items() if value is None]:
        inside = [key for key in other if key.startswith(f"{block}.")]
        for key in inside:
            del other[key]
        if inside:
            other[block] = "a block of keys"


def _defaults() -> dict[str, Any]:
    """Return the values of keys that a configuration may leave out."""
    values = {
        f"{block}.{field.name}": field.default
        for block, cls in _BLOCKS.items()
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }
    return {**values, "seed": 0}


def _is_name(key: str) -> bool:
    """Return True if a key names a class; a class can have several names."""
    return key.endswith("_target_")


def _is_announced(key: str) -> bool:
    if any(key == quiet or key.startswith(f"{quiet}.") for quiet in _QUIET):
        return False
    block, _, name = key.partition(".")
    return name in _TRAINER_KEYS if block == "trainer" else True
