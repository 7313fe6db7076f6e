"""Callbacks that make Lightning resume correctly: one checkpoint for all, the configured optimiser, loop counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from nestcli.data.datamodule import NestDataModule, recounted
from nestcli.errors import CheckpointError
from nestcli.model.optim import NoamAnnealing
from nestcli.training.find_checkpoint import Resume
from nestcli.training.lightning_internals import count_step_for_loggers, is_validation_due, set_last_rates

_BATCHES = "epoch_loop.batch_progress"
_VALIDATED = "epoch_loop.val_loop.batch_progress"
_COUNTS = ("ready", "started", "processed", "completed")


class ResumedCounts(Callback):
    """Fixes the loop counters in a checkpoint before Lightning restores them.

    Otherwise Lightning skips a validation that was due when the checkpoint was written at the end of a step, and
    resumes an interrupted validation in the middle, with the first data again and half of the sums.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        if not hasattr(trainer.fit_loop.epoch_loop, "update_restart_stage"):
            # Lightning 2.4, which NeMo pins, repeats the last batches of the validation before a checkpoint and takes
            # their mean for all. Without these counters it repeats the whole validation, with the same result.
            loops.pop(_VALIDATED, None)
        owed = _complete_step(loops) or _is_unfinished(loops.get(_VALIDATED))
        stored = checkpoint.get(NestDataModule.__qualname__, {})
        accumulate = trainer.accumulate_grad_batches
        for counts in (loops[_BATCHES]["total"], loops[_BATCHES]["current"]):
            for name in _COUNTS:
                counts[name] = recounted(counts[name], stored.get("accumulate", accumulate), accumulate)
        counted = loops[_BATCHES]["total"]["ready"]
        if not owed:
            return
        if is_validation_due(trainer, counted):
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # before the first batch
            loops[_VALIDATED] = {"total": dict(begun), "current": dict(begun), "is_last_batch": False}
        else:  # Lightning continues with the next batch and does not count the step for the loggers
            count_step_for_loggers(loops)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # removes the 1 set above


def _complete_step(loops: dict[str, Any]) -> bool:
    """Count a step that had ended but was not counted when the checkpoint was written; return True if there was one."""
    counts = loops[_BATCHES]
    if counts["total"]["completed"] == counts["total"]["processed"]:
        return False
    for each in (counts["total"], counts["current"]):
        each["completed"] = each["processed"]
    return True


def _is_unfinished(validated: dict[str, Any] | None) -> bool:
    return validated is not None and validated["current"]["ready"] != validated["current"]["completed"]


class SameResume(Callback):
    """Stops a run whose processes would resume from different checkpoints, as in a folder that is not shared."""

    def __init__(self, resume: Resume) -> None:
        self.resume = resume

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        ours = (self.resume.path.name if self.resume.path else None, self.resume.step)
        first = trainer.strategy.broadcast(ours)
        if ours != first:
            raise CheckpointError(
                f"process {trainer.global_rank} finds {ours[0] or 'no checkpoint'} to resume from, the first process "
                f"{first[0] or 'none'}. Set exp_manager.exp_dir to a folder that all processes share."
            )


class ConfiguredOptimizer(Callback):
    """Sets the optimiser's and the schedule's options from the configuration on resume; keeps moments and step counts.

    Lightning restores all options from the checkpoint.
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
        }  # saved before the checkpoint's state replaces them

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.ckpt_path:
            return
        [group], schedule = trainer.optimizers[0].param_groups, _schedule_of(trainer)
        before = float(group["lr"])
        group.update(self._options)
        place_steps(trainer.optimizers[0])
        vars(schedule).update(self._schedule)
        [group["lr"]] = rates = schedule.get_lr()
        set_last_rates(schedule, rates)
        if abs(float(group["lr"]) - before) > 1e-9 * before:
            self.note(
                f"The learning rate of step {trainer.global_step + 1:,} is {float(group['lr']):.3g}; with the previous "
                f"configuration it would have been {before:.3g}. The optimiser's moments are the checkpoint's."
            )


def place_steps(optimizer: Optimizer) -> None:
    """Move the optimiser's step counters to the right device: with a fused optimiser the weights' device, else the CPU.

    PyTorch places them by the options in the checkpoint, which may differ from the current ones. On a GPU, a fused step
    would then fail, and a plain step would wait for the device.
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
