"""Checkpoints of a run under NeMo's names: when they are written and which are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from nestcli.checkpoint.nemo import write_nemo
from nestcli.config import resolved
from nestcli.errors import ConfigError
from nestcli.model.module import NestModule
from nestcli.training.lightning_internals import OpenModelCheckpoint
from nestcli.training.settings import CheckpointConfig, Length

LAST_KEPT = 2  # number of newest checkpoints to keep: if one is damaged, the other remains
_MONITORS = ("val_loss", "val_masked_accuracy", "train_loss", "masked_accuracy")
_PER_PROCESS = ("train_loss", "masked_accuracy")  # values that each process logs of its own batches
_FIELD = re.compile(r"(?:[A-Za-z_/]+=)?\{(?P<name>[\w/-]+)(?::[^{}]*)?\}[-_ ]?")
_HAS_STEP = re.compile(r"\{step[:}]")
_STEP = re.compile(r"step=(\d+)(-last)?(-v\d+)?\.ckpt")
# Text with {metric} or {metric:.3f} in it. Python's own formats also allow widths of gigabytes, and attributes.
_FILENAME = re.compile(r"(?:[^{}]|\{[\w/-]+(?::0?\d{0,2}(?:\.\d{1,2})?[a-z]?)?\})+")


def step_in_name(path: Path) -> int | None:
    """Return the optimiser steps that a checkpoint's name ends with, such as `...-step=100-last.ckpt`."""
    found = _STEP.search(path.name)
    return int(found[1]) if found and found.end() == len(path.name) else None


def without_unknown(template: str, known: Collection[str]) -> str:
    """Remove the values that are not known from a template of names such as `{val_loss:.3f}-{step}`."""
    for field in _FIELD.finditer(template):
        if field["name"] not in known:
            template = template.replace(field[0], "", 1)
    return template.strip("-_ ") or "{step}"


def checkpoints_of(config: DictConfig, folder: Path, length: Length, *, validates: bool) -> NestCheckpoint | None:
    """Return the callback that `exp_manager` configures for a run's folder; None if it wants no checkpoints."""
    manager = config.exp_manager
    if not manager.create_checkpoint_callback:
        return None
    ours = {field.name for field in fields(CheckpointConfig)}
    options = {key: value for key, value in resolved(manager.checkpoint_callback_params).items() if key in ours}
    nemo = nemo_path(config, folder) if options.pop("always_save_nemo", False) else None
    monitor = options.pop("monitor", "val_loss")
    if monitor not in _MONITORS:
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.monitor: {monitor!r} is not logged. "
            f"Use one of {', '.join(_MONITORS)}."
        )
    monitor = monitor if validates else None
    filename = options.pop("filename", None) or f"{manager.name}--{{{monitor}:.4f}}-{{epoch}}"
    _check_filename(str(filename))
    if monitor is None:  # nothing to compare by: keep the newest only
        filename, options["save_top_k"] = f"{manager.name}--{{step}}", 1
        options.setdefault("every_n_train_steps", max(1, length.validate_every // length.accumulate))
    if options.get("save_last") is None:
        options["save_last"] = True
    try:
        return NestCheckpoint(folder / "checkpoints", filename, monitor=monitor, nemo=nemo, **options)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"exp_manager.checkpoint_callback_params: {' '.join(str(error).split())}") from None


def nemo_path(config: DictConfig, folder: Path) -> Path | None:
    """Return the path that NeMo's exp_manager gives the .nemo file; None for post_conv, which NeMo cannot load."""
    fits = config.model.mask_position == "pre_conv"
    return folder / "checkpoints" / f"{config.exp_manager.name}.nemo" if fits else None


def _check_filename(filename: str) -> None:
    """Raise ConfigError for a name that leaves its folder or formats a number with an absurd width."""
    if Path(filename).is_absolute() or ".." in Path(filename).parts or not _FILENAME.fullmatch(filename):
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.filename: {filename[:100]!r} must be a name such as "
            "run--{val_loss:.3f}-{step}."
        )


class NestCheckpoint(OpenModelCheckpoint):
    """Checkpoints named as NeMo names them: `NAME--val_loss=8.123-step=100.ckpt`, and the newest two with `-last`.

    A last one is written whenever a best one could be, and at the end of training, which need not end with validation.
    A value that is not known yet, as before the first validation, is left out of the name. `nemo` is a .nemo file of
    the best model, written beside them; until there is a best model it holds the newest.
    Weights that are not finite are not written, so the last good checkpoint stays.
    """

    def __init__(
        self, folder: Path, filename: str, *, monitor: str | None, nemo: Path | None = None, **options: Any
    ) -> None:
        if options.get("save_last") == "link":  # the link's target is removed when a better model is saved
            options["save_last"] = True
        if options.get("save_top_k", 1) not in (0, 1) and not _HAS_STEP.search(filename):
            filename = f"{filename}-{{step}}"  # distinguishes several best models
        super().__init__(dirpath=folder, filename=filename, monitor=monitor, enable_version_counter=False, **options)
        step = "{step}" if self.auto_insert_metric_name else "step={step}"
        self.CHECKPOINT_NAME_LAST = f"{filename}-last" if filename.endswith(step) else f"{filename}-{step}-last"
        self.nemo = nemo
        self._best_before: set[str] = set()
        self._unknown = torch.tensor(-math.inf if self.mode == "max" else math.inf)  # the monitor before it has a value
        self._left_over: list[str] = []  # former best checkpoints that remain if a kill interrupted their removal

    def state_dict(self) -> dict[str, Any]:
        outdated = self._best_before - {*self.best_k_models, self.best_model_path}
        return {**super().state_dict(), "outdated": sorted(Path(path).name for path in outdated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state with paths in the current folder: a run may have been moved."""
        moved = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[key] = self._here(state_dict.get(key, ""))
        best = state_dict.get("best_k_models", {})
        moved["best_k_models"] = {self._here(path): score for path, score in best.items()}
        surplus = self._drop_surplus(moved)
        super().load_state_dict(moved)
        self._left_over = [*state_dict.get("outdated", ()), *surplus]

    def _drop_surplus(self, state: dict[str, Any]) -> list[str]:
        """Remove the best models that exceed a smaller `save_top_k` from a state; return their files' names."""
        best = sorted(state["best_k_models"].items(), key=lambda each: float(each[1]), reverse=self.mode == "max")
        if not 0 < self.save_top_k < len(best):
            return []
        kept = best[: self.save_top_k]
        state["best_k_models"] = dict(kept)
        state["kth_best_model_path"], state["kth_value"] = kept[-1]
        return [Path(path).name for path, _ in best[self.save_top_k :]]

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath)) / Path(path).name) if path else ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            for name in self._left_over:
                Path(self._here(name)).unlink(missing_ok=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last one even if the model is not among the best; Lightning 2.6 would not."""
        super().on_validation_end(trainer, pl_module)
        if self.saves_after_validation(trainer) and self.is_due(trainer):
            self.write_last(trainer, self.candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.take_deferred() and self.is_due(trainer):  # the last batch, without a validation
            self.write_best(trainer, self.candidates(trainer))
            self.write_last(trainer, self.candidates(trainer))
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.last_saved_step != trainer.global_step:
            self.write_last(trainer, self.candidates(trainer))

    def save_now(self, trainer: Trainer) -> Path:
        """Write the last checkpoint now, whatever `save_last` says; all processes must call this."""
        wanted, self.save_last = self.save_last, True
        self.write_last(trainer, self.candidates(trainer))
        self.save_last = wanted
        return Path(self.last_model_path)

    def write(self, trainer: Trainer, filepath: str) -> None:
        """Write the .nemo file first: a run that is killed before the checkpoint writes both again on resume."""
        try:
            self._write_nemo(trainer, filepath)
        finally:
            super().write(trainer, filepath)

    def _write_nemo(self, trainer: Trainer, filepath: str) -> None:
        score = self.best_model_score
        has_best = score is not None and math.isfinite(float(score))
        if self.nemo is None or (has_best and filepath != self.best_model_path):
            return
        weights = trainer.strategy.lightning_module_state_dict()  # whole in the first process, even if sharded
        if trainer.is_global_zero:
            config = cast(NestModule, trainer.lightning_module).config
            write_nemo(self.nemo, config, {name.removeprefix("model."): value for name, value in weights.items()})

    def write_best(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        if not _is_finite(trainer):
            return
        self._best_before = {*self.best_k_models, self.best_model_path} - {""}
        super().write_best(trainer, candidates)

    def write_last(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        if not _is_finite(trainer):
            return
        super().write_last(trainer, candidates)
        if self.save_last and trainer.is_global_zero:
            for path in _outdated(Path(self.last_model_path)):
                path.unlink(missing_ok=True)

    def is_removable(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Allow the removal of former best ones, also the one that the run was resumed from.

        `write_last` removes the last ones.
        """
        inside = Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents
        return previous != current and inside and not previous.endswith("-last.ckpt")

    def candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the values for monitor and file names, equal in all processes: all must choose the same model."""
        candidates = super().candidates(trainer)
        for name in _PER_PROCESS:
            if name in candidates:
                candidates[name] = trainer.strategy.reduce(candidates[name], reduce_op="mean")
        if self.monitor is not None:  # without a value before the first validation, any model may be the best
            candidates.setdefault(self.monitor, self._unknown)
        return candidates

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, *more: Any, **options: Any
    ) -> str:
        """Return Lightning's name without the values that are not known. Its releases pass different arguments."""
        known = [name for name, value in metrics.items() if value is not self._unknown]
        kept = without_unknown(filename or str(self.filename), known)
        return str(super().format_checkpoint_name(metrics, kept, *more, **options))


def _outdated(newest: Path) -> list[Path]:
    """Return the `-last` checkpoints to remove once `newest` is written: all older ones, except the newest of these."""
    others = [path for path in newest.parent.glob("*-last.ckpt") if path != newest]
    keyed = sorted(((step_in_name(path) or -1, path.stat().st_mtime_ns, path) for path in others), reverse=True)
    before = [path for step, _, path in keyed if step <= (step_in_name(newest) or 0)]
    return before[LAST_KEPT - 1 :]


def _is_finite(trainer: Trainer) -> bool:
    """Return True if all weights and running statistics are finite in every process; the processes must agree."""
    state = trainer.lightning_module.state_dict().values()
    own = [value.to_local() if isinstance(value, DTensor) else value for value in state]
    finite = bool(torch.stack([value.isfinite().all() for value in own]).all())
    return bool(trainer.strategy.reduce_boolean_decision(finite, all=True))
