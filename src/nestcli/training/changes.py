"""A run that goes on with another configuration: what takes effect, what is told, and what is refused.

docs/checkpoints.md has the same as a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from nestcli.bounds import as_written
from nestcli.config import leaves, resolved
from nestcli.data.dataset_config import DatasetConfig
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
from nestcli.model.optim import NoamAnnealing
from nestcli.training.settings import SafetyConfig, TrainerConfig

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
    "nest": SafetyConfig,
}
# Keys of the model that may change between two parts of a run. The others make it another model, even where all
# shapes stay the same.
MAY_CHANGE = {
    "model.preprocessor": {"dither", "pad_to", "nemo_exact"},
    "model.quantizer": {"dist_fn", "freeze", "squeeze_single"},
    "model.encoder": {
        "dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att", "stochastic_depth_drop_prob",
        "stochastic_depth_mode", "stochastic_depth_start_layer", "use_pytorch_sdpa", "conv_norm_ignore_padding",
        "backend", "compile", "dropout_draws", "pos_emb_max_len",
    },
    "model.decoder": {"squeeze_single"},
    "model.masking": {"block_size", "mask_prob", "freeze", "allow_overlap", "max_mask_ratio"},
}  # fmt: skip
# Keys whose change is not worth a word: how fast data come, how long the run is, what it is called, no effect at all.
_QUIET = (
    "name", "exp_manager", "model.spec_augment", "model.encoder.pos_emb_max_len", *START_KEYS,
    *(f"model.{part}.{key}" for part in ("train_ds", "validation_ds")
      for key in ("num_workers", "pin_memory", "read_timeout", "max_failed_share", "use_start_end_token")),
)  # fmt: skip
_TOLD_OF_TRAINER = ("precision", "gradient_clip_val", "gradient_clip_algorithm", "sync_batchnorm")
_BEST = tuple(
    f"exp_manager.checkpoint_callback_params.{key}"
    for key in ("monitor", "mode", "every_n_train_steps", "every_n_epochs")
)  # with another one, Lightning does not take over what the best models were
_SHOWN = 8  # keys in a message


@dataclass(frozen=True)
class Changes:
    """The keys whose values differ between the configuration of a checkpoint and that of today: (then, now)."""

    former: Mapping[str, Any]
    step: int
    keys: dict[str, tuple[Any, Any]]

    @classmethod
    def of(cls, former: Mapping[str, Any] | None, config: DictConfig, step: int) -> Changes:
        """`former` is the configuration in the checkpoint of `step`; None where there is none."""
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
        """Raise ConfigError for a change that makes another model of it, or that a checkpoint's weights rule out."""
        for key, (then, now) in self.keys.items():
            block, _, name = key.rpartition(".")
            ours = block in MAY_CHANGE and any(field.name == name for field in dataclasses.fields(_BLOCKS[block]))
            if key == "model.mask_position" or (ours and name not in MAY_CHANGE[block]):
                raise ConfigError(
                    f"the run in {checkpoint.parent.parent} has {key}={as_written(then)}, and here it is "
                    f"{as_written(now)}: that is another model. Set {key}={as_written(then)} to go on, or another "
                    f"exp_manager.name with init_from_ptl_ckpt={checkpoint} to begin a new run with the weights "
                    "of this one."
                )

    def tell(self, note: Callable[[str], None]) -> None:
        """Say what changes for training from here on; the length of a run and its surroundings go without saying."""
        told = {key: pair for key, pair in self.keys.items() if _is_told(key)}
        if told:
            shown = [f"{key} is {as_written(now)}, was {as_written(then)}" for key, (then, now) in told.items()][
                :_SHOWN
            ]
            more = f"; and {len(told) - _SHOWN} more keys" if len(told) > _SHOWN else ""
            note(
                f"From step {self.step + 1:,} on the configuration is another one: {'; '.join(shown)}{more}. "
                f"The former one is kept as {self.kept_name}."
            )
        if "seed" in told:
            note(
                "The new seed draws the order of the data, augmentation, masks and dropout; weights and codebooks stay."
            )
        if any(key in self.keys for key in _BEST):
            note("The best model is looked for anew; the best checkpoints of before stay in the folder.")

    @property
    def kept_name(self) -> str:
        return f"config-to-step-{self.step}.yaml"

    def keep_former(self, folder: Path) -> None:
        """Write the former configuration beside config.yaml, if anything differs. Raises NestError."""
        if self.keys:
            write_text(folder / self.kept_name, [OmegaConf.to_yaml(OmegaConf.create(dict(self.former)))])


def record_start(config: DictConfig, former: Mapping[str, Any] | None) -> None:
    """Have the configuration of a run that goes on name the weights that it began with; others are not used."""
    if former is None:
        return
    for key in START_KEYS:
        if key in config or former.get(key) is not None:
            OmegaConf.update(config, key, former.get(key), merge=False, force_add=True)


class ConfiguredOptimizer(Callback):
    """Gives optimiser and schedule the configuration's values where a run goes on; moments and steps are kept.

    Lightning restores all options with the state of a checkpoint. Where nothing has changed they are the same.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self._options: dict[str, Any] = {}
        self._schedule: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [optimizer], schedule = trainer.optimizers, _schedule_of(trainer)
        [group] = optimizer.param_groups
        self._options = {key: value for key, value in group.items() if key not in ("params", "lr")}
        self._schedule = {
            key: getattr(schedule, key) for key in ("base_lrs", "d_model", "warmup_steps", "min_lr")
        }  # before the checkpoint's state replaces them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.ckpt_path:
            return
        [group], schedule = trainer.optimizers[0].param_groups, _schedule_of(trainer)
        before = float(group["lr"])
        group.update(self._options)
        place_steps(trainer.optimizers[0])
        vars(schedule).update(self._schedule)
        [group["lr"]] = rates = schedule.get_lr()
        schedule._last_lr = rates
        if abs(float(group["lr"]) - before) > 1e-9 * before:
            self.note(
                f"The learning rate of step {trainer.global_step + 1:,} is {float(group['lr']):.3g}; with the former "
                f"configuration it would have been {before:.3g}. The optimiser's moments are the checkpoint's."
            )


def place_steps(optimizer: Optimizer) -> None:
    """Put the optimiser's counts of steps where its options want them: a fused one beside the weights, others in RAM.

    PyTorch follows the options of the checkpoint. With a GPU a fused step would fail, and another would wait for it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if group["fused"] else "cpu")


def _schedule_of(trainer: Trainer) -> NoamAnnealing:
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, NoamAnnealing)
    return schedule


def _fold_blocks(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Make one key of a block of `other` that is null in `one`: its keys say no more than that it is there."""
    for block in [key for key, value in one.items() if value is None]:
        inside = [key for key in other if key.startswith(f"{block}.")]
        for key in inside:
            del other[key]
        if inside:
            other[block] = "a block of keys"


def _defaults() -> dict[str, Any]:
    """Values of keys that a configuration need not have; null for all others."""
    values = {
        f"{block}.{field.name}": field.default
        for block, cls in _BLOCKS.items()
        for field in dataclasses.fields(cls)
        if field.default is not dataclasses.MISSING
    }
    return {**values, "seed": 0}


def _is_name(key: str) -> bool:
    """Whether a key names a class, which has several names."""
    return key.endswith("_target_")


def _is_told(key: str) -> bool:
    if any(key == quiet or key.startswith(f"{quiet}.") for quiet in _QUIET):
        return False
    block, _, name = key.partition(".")
    return name in _TOLD_OF_TRAINER if block == "trainer" else True
