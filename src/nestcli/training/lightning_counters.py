"""What Lightning counts, put right where a run goes on: validation that is owed, another number of batches a step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nestcli.data.datamodule import NestDataModule, recounted

_BATCHES = "epoch_loop.batch_progress"
_VALIDATED = "epoch_loop.val_loop.batch_progress"
_COUNTS = ("ready", "started", "processed", "completed")


class ResumedCounts(Callback):
    """Mends the counts in a checkpoint before Lightning takes them over.

    Left alone, Lightning passes over the validation that was due when a checkpoint was written at the end of a step,
    and goes on in the middle of one that was stopped, with the beginning of its data and half of its sums.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        owed = _complete_step(loops) or _is_unfinished(loops.get(_VALIDATED))
        stored = checkpoint.get(NestDataModule.__qualname__, {})
        accumulate = trainer.accumulate_grad_batches
        for counts in (loops[_BATCHES]["total"], loops[_BATCHES]["current"]):
            for name in _COUNTS:
                counts[name] = recounted(counts[name], stored.get("accumulate", accumulate), accumulate)
        counted = loops[_BATCHES]["total"]["ready"]
        if not owed:
            return
        if validation_is_due(trainer, counted):
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # the first batch, and nothing of it
            loops[_VALIDATED] = {"total": dict(begun), "current": dict(begun), "is_last_batch": False}
        else:  # Lightning goes straight on to the next batch, without counting the step for the loggers
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()  # what it began with above stays in the total


def validation_is_due(trainer: Trainer, batches: int) -> bool:
    """Whether validation comes after so many batches of training."""
    return bool(trainer.limit_val_batches) and batches % int(trainer.val_check_interval or 1) == 0


def _complete_step(loops: dict[str, Any]) -> bool:
    """Whether the checkpoint was written at the end of a step, before what follows; such a step is counted now."""
    counts = loops[_BATCHES]
    if counts["total"]["completed"] == counts["total"]["processed"]:
        return False
    for each in (counts["total"], counts["current"]):
        each["completed"] = each["processed"]
    return True


def _is_unfinished(validated: dict[str, Any] | None) -> bool:
    return validated is not None and validated["current"]["ready"] != validated["current"]["completed"]
