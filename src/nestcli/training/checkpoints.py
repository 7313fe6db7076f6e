"""Checkpoints of a run, named as NeMo names them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from nestcli.checkpoint.nemo import write_nemo
from nestcli.model.module import NestModule


class NestCheckpoint(ModelCheckpoint):
    """Checkpoints named as NeMo names them: `NAME--val_loss=8.123-step=100.ckpt`, and the newest with `-last`.

    The last one is also written at the end of training, where validation may not have come by. `nemo` is a .nemo file
    of the best model to keep beside them, or of the newest as long as there is no best one.
    """

    def __init__(
        self, folder: Path, filename: str, *, monitor: str | None, nemo: Path | None = None, **options: Any
    ) -> None:
        super().__init__(dirpath=folder, filename=filename, monitor=monitor, enable_version_counter=False, **options)
        self.CHECKPOINT_NAME_LAST = f"{filename}-last"
        self.nemo = nemo

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def save_now(self, trainer: Trainer) -> Path:
        """Write the last checkpoint out of turn, whatever `save_last` says; to be called in all processes."""
        wanted, self.save_last = self.save_last, True
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self.save_last = wanted
        return Path(self.last_model_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        score = self.best_model_score
        has_best = score is not None and math.isfinite(float(score))
        if self.nemo is None or (has_best and filepath != self.best_model_path):
            return
        weights = trainer.strategy.lightning_module_state_dict()  # whole in the first process, wherever the parts are
        if trainer.is_global_zero:
            config = cast(NestModule, trainer.lightning_module).config
            write_nemo(self.nemo, config, {name.removeprefix("model."): value for name, value in weights.items()})

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        if trainer.is_global_zero:  # Lightning leaves the one that a run was resumed from
            for older in Path(str(self.dirpath)).glob("*-last.ckpt"):
                if older != Path(self.last_model_path):
                    older.unlink(missing_ok=True)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates: dict[str, Tensor] = super()._monitor_candidates(trainer)
        if self.monitor is not None:  # before the first validation the name still needs a number
            candidates.setdefault(self.monitor, torch.tensor(math.inf))
        return candidates
