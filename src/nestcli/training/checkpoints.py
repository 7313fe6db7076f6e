"""Checkpoints of a run, named as NeMo names them: when they are written, and which are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from nestcli.checkpoint.nemo import write_nemo
from nestcli.model.module import NestModule
from nestcli.training.lightning_internals import OpenModelCheckpoint

LAST_KEPT = 2  # newest checkpoints: a damaged one has one before it
_OF_EACH_PROCESS = ("train_loss", "masked_accuracy")  # values that processes log of their own batches
_FIELD = re.compile(r"(?:[A-Za-z_/]+=)?\{(?P<name>[\w/-]+)(?::[^{}]*)?\}[-_ ]?")
_TELLS_STEP = re.compile(r"\{step[:}]")
_STEP = re.compile(r"step=(\d+)(-last)?(-v\d+)?\.ckpt")


def step_in_name(path: Path) -> int | None:
    """The optimiser steps that a checkpoint's name ends with, as `...-step=100-last.ckpt`."""
    found = _STEP.search(path.name)
    return int(found[1]) if found and found.end() == len(path.name) else None


def without_unknown(template: str, known: Collection[str]) -> str:
    """A template of names such as `{val_loss:.3f}-{step}` without the values that are not among the known ones."""
    for field in _FIELD.finditer(template):
        if field["name"] not in known:
            template = template.replace(field[0], "", 1)
    return template.strip("-_ ") or "{step}"


class NestCheckpoint(OpenModelCheckpoint):
    """Checkpoints named as NeMo names them: `NAME--val_loss=8.123-step=100.ckpt`, and the newest two with `-last`.

    A last one is written whenever a best one could be, and at the end of training, where validation may not have come
    by. A value that is not known yet, as before the first validation, has no part in a name. `nemo` is a .nemo file of
    the best model to keep beside them, or of the newest as long as there is no best one.
    Weights that are not finite are not written: the last good checkpoint stays.
    """

    def __init__(
        self, folder: Path, filename: str, *, monitor: str | None, nemo: Path | None = None, **options: Any
    ) -> None:
        if options.get("save_last") == "link":  # to a file that is removed when a better one comes
            options["save_last"] = True
        if options.get("save_top_k", 1) not in (0, 1) and not _TELLS_STEP.search(filename):
            filename = f"{filename}-{{step}}"  # several best models have several names
        super().__init__(dirpath=folder, filename=filename, monitor=monitor, enable_version_counter=False, **options)
        step = "{step}" if self.auto_insert_metric_name else "step={step}"
        self.CHECKPOINT_NAME_LAST = f"{filename}-last" if filename.endswith(step) else f"{filename}-{step}-last"
        self.nemo = nemo
        self._best_before: set[str] = set()
        self._unknown = torch.tensor(-math.inf if self.mode == "max" else math.inf)  # of the monitor, before it has one
        self._left_over: list[str] = []  # names of former best ones that a kill may have kept from being removed

    def state_dict(self) -> dict[str, Any]:
        outdated = self._best_before - {*self.best_k_models, self.best_model_path}
        return {**super().state_dict(), "outdated": sorted(Path(path).name for path in outdated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The names that count are those in the folder of today: a run may have been moved."""
        moved = {**state_dict, "dirpath": self.dirpath}
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[key] = self._here(state_dict.get(key, ""))
        best = state_dict.get("best_k_models", {})
        moved["best_k_models"] = {self._here(path): score for path, score in best.items()}
        surplus = self._beyond_top_k(moved)
        super().load_state_dict(moved)
        self._left_over = [*state_dict.get("outdated", ()), *surplus]

    def _beyond_top_k(self, state: dict[str, Any]) -> list[str]:
        """Take the best models that a smaller `save_top_k` leaves no room for out of a state; their files' names."""
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
        """Write the last one where the model is none of the best as well; Lightning 2.6 would not."""
        super().on_validation_end(trainer, pl_module)
        if self.saves_after_validation(trainer) and self.is_due(trainer):
            self.write_last(trainer, self.candidates(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.take_deferred() and self.is_due(trainer):  # due on the last batch, which no validation followed
            self.write_best(trainer, self.candidates(trainer))
            self.write_last(trainer, self.candidates(trainer))
        super().on_train_end(trainer, pl_module)
        if self.save_last and self.last_saved_step != trainer.global_step:
            self.write_last(trainer, self.candidates(trainer))

    def save_now(self, trainer: Trainer) -> Path:
        """Write the last checkpoint out of turn, whatever `save_last` says; to be called in all processes."""
        wanted, self.save_last = self.save_last, True
        self.write_last(trainer, self.candidates(trainer))
        self.save_last = wanted
        return Path(self.last_model_path)

    def write(self, trainer: Trainer, filepath: str) -> None:
        """The .nemo file comes first: after a kill in between, the run that goes on writes both again."""
        try:
            self._keep_nemo(trainer, filepath)
        finally:
            super().write(trainer, filepath)

    def _keep_nemo(self, trainer: Trainer, filepath: str) -> None:
        score = self.best_model_score
        has_best = score is not None and math.isfinite(float(score))
        if self.nemo is None or (has_best and filepath != self.best_model_path):
            return
        weights = trainer.strategy.lightning_module_state_dict()  # whole in the first process, wherever the parts are
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
        """Former best ones go, the one that the run was resumed from too; the last ones are seen to elsewhere."""
        inside = Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents
        return previous != current and inside and not previous.endswith("-last.ckpt")

    def candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Lightning's, the same in all processes: these have to agree on the best model and on its file's name."""
        candidates = super().candidates(trainer)
        for name in _OF_EACH_PROCESS:
            if name in candidates:
                candidates[name] = trainer.strategy.reduce(candidates[name], reduce_op="mean")
        if self.monitor is not None:  # before the first validation any model may be the best
            candidates.setdefault(self.monitor, self._unknown)
        return candidates

    def format_checkpoint_name(
        self, metrics: dict[str, Tensor], filename: str | None = None, *more: Any, **options: Any
    ) -> str:
        """As Lightning does it, whose releases take more or fewer words; a value that is not known is left out."""
        known = [name for name, value in metrics.items() if value is not self._unknown]
        kept = without_unknown(filename or str(self.filename), known)
        return str(super().format_checkpoint_name(metrics, kept, *more, **options))


def _outdated(newest: Path) -> list[Path]:
    """The last checkpoints that may go once `newest` is written: those of before, without the newest of them."""
    others = [path for path in newest.parent.glob("*-last.ckpt") if path != newest]
    keyed = sorted(((step_in_name(path) or -1, path.stat().st_mtime_ns, path) for path in others), reverse=True)
    before = [path for step, _, path in keyed if step <= (step_in_name(newest) or 0)]
    return before[LAST_KEPT - 1 :]


def _is_finite(trainer: Trainer) -> bool:
    """Whether all weights and running statistics are, in all processes: these must not differ in what they write."""
    state = trainer.lightning_module.state_dict().values()
    own = [value.to_local() if isinstance(value, DTensor) else value for value in state]
    finite = bool(torch.stack([value.isfinite().all() for value in own]).all())
    return bool(trainer.strategy.reduce_boolean_decision(finite, all=True))
