"""What a run tells: metrics.jsonl and the progress display."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nestcli.data.batch import NoiseBatch
from nestcli.data.skipping import SkipCounter
from nestcli.files import write_text
from nestcli.model.module import NestModule
from nestcli.training.processes import summed_over_processes


@dataclass(frozen=True)
class StepReport:
    """Where training stands after an optimiser step. Times and audio in seconds."""

    step: int
    steps: int | None  # in all; None if the end is given in epochs
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    audio_per_second: float
    seconds_left: float | None


class Reporter(Protocol):
    """Shows a run to a person."""

    def step(self, report: StepReport) -> None: ...

    def validation(self, step: int, loss: float, accuracy: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finished(self) -> None: ...


@dataclass
class _Totals:
    """What a run has seen, resumes included."""

    audio_seconds: float = 0.0
    seconds: float = 0.0


class MetricsWriter(Callback):
    """One line of metrics.jsonl for every logged step, and a report to the display for every step.

    Lines carry step, epoch, train_loss, masked_accuracy, lr, audio_seconds, seconds (of training, in all) and skipped
    (utterances of the first process that could not be read), and val_loss and val_masked_accuracy where validation ran
    at that step. All but `skipped` are of all processes.
    """

    def __init__(
        self,
        path: Path,
        reporter: Reporter,
        sample_rate: int,
        skipped: SkipCounter,
        *,
        batches_per_epoch: int,
        log_every: int,
    ) -> None:
        self.path, self.reporter, self.sample_rate, self.skipped = path, reporter, sample_rate, skipped
        self.batches_per_epoch, self.log_every = batches_per_epoch, max(1, log_every)
        self.totals = _Totals()
        self._micro: list[tuple[float, ...]] = []  # loss, correct, selected, seconds of the batches of a step
        self._used_lr = 0.0
        self._clock = 0.0
        self._started: tuple[float, float] | None = None  # seconds and audio seconds when this process began
        self._first_step = 0
        self._row: dict[str, Any] = {}

    # ---- Lightning's hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        self._started = (self.totals.seconds, self.totals.audio_seconds)
        if trainer.is_global_zero:
            _drop_lines_after(self.path, trainer.global_step)
            self._row = _line_at(self.path, trainer.global_step) or self._row  # validation may come before a step
        self._clock = time.monotonic()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not hasattr(trainer.fit_loop.epoch_loop, "update_restart_stage"):
            # Lightning 2.4, which NeMo pins, repeats the end of the validation that a checkpoint was written after, and
            # takes its mean for the whole. Without its counters it repeats all of it, with the same result.
            checkpoint["loops"]["fit_loop"].pop("epoch_loop.val_loop.batch_progress", None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._used_lr = cast(NestModule, pl_module).learning_rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: NoiseBatch, batch_idx: int
    ) -> None:
        # The losses are averaged over the micro-batches of a step in all processes, as their gradients are. Lightning
        # has divided those of this process by their number.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        seconds = float(batch.audio_len.sum()) / self.sample_rate
        self._micro.append((float(loss), float(outputs["correct"]), float(outputs["selected"]), seconds))
        now = time.monotonic()
        self.totals.seconds += now - self._clock
        self._clock = now
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        loss, correct, selected, seconds = summed_over_processes(
            trainer, [sum(column) for column in zip(*self._micro, strict=True)]
        )
        loss /= len(self._micro) * trainer.world_size
        self._micro.clear()
        self.totals.audio_seconds += seconds
        report = self._report(trainer, loss, correct / max(1.0, selected))
        self.reporter.step(report)
        if report.step % self.log_every == 0 or report.step == report.steps:
            self._write(trainer, self._line(report))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = time.monotonic()  # validation is not training time
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or "val_loss" not in metrics:
            return
        loss, accuracy = float(metrics["val_loss"]), float(metrics.get("val_masked_accuracy", math.nan))
        self.reporter.validation(trainer.global_step, loss, accuracy)
        self._write(
            trainer, {"step": trainer.global_step, **self._row, "val_loss": loss, "val_masked_accuracy": accuracy}
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reporter.finished()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.reporter.finished()

    def state_dict(self) -> dict[str, Any]:
        return {"audio_seconds": self.totals.audio_seconds, "seconds": self.totals.seconds, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.totals = _Totals(state_dict["audio_seconds"], state_dict["seconds"])
        self._row = state_dict.get("row", {})

    # ---- lines ----

    def _report(self, trainer: Trainer, loss: float, accuracy: float) -> StepReport:
        step, steps = trainer.global_step, trainer.max_steps if trainer.max_steps > 0 else None
        assert self._started is not None
        seconds, audio = self.totals.seconds - self._started[0], self.totals.audio_seconds - self._started[1]
        per_step = seconds / max(1, step - self._first_step)
        report = StepReport(
            step=step,
            steps=steps,
            epoch=(trainer.fit_loop.epoch_loop.batch_progress.total.ready * trainer.world_size - 1)
            // self.batches_per_epoch,
            loss=loss,
            accuracy=accuracy,
            learning_rate=self._used_lr,
            audio_per_second=audio / max(seconds, 1e-9),
            seconds_left=None if steps is None else per_step * (steps - step),
        )
        self._row = self._line(report)
        return report

    def _line(self, report: StepReport) -> dict[str, Any]:
        return {
            "step": report.step,
            "epoch": report.epoch,
            "train_loss": report.loss,
            "masked_accuracy": report.accuracy,
            "lr": report.learning_rate,
            "audio_seconds": round(self.totals.audio_seconds, 3),
            "seconds": round(self.totals.seconds, 3),
            "skipped": self.skipped.skipped,
        }

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Append a line, or replace the last one where validation followed a logged step."""
        if not trainer.is_global_zero:
            return
        if "val_loss" in row:
            _drop_lines_after(self.path, row["step"] - 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in row.items()}) + "\n")


def _drop_lines_after(path: Path, step: int) -> None:
    """Take out of metrics.jsonl what a killed run wrote after the checkpoint that is resumed."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if len(kept) < len(lines):
        write_text(path, kept)


def _line_at(path: Path, step: int) -> dict[str, Any]:
    """The last line of metrics.jsonl if it is that of a step, without what validation added."""
    if not path.is_file():
        return {}
    line = path.read_text(encoding="utf-8").splitlines()[-1:]
    row: dict[str, Any] = json.loads(line[0]) if line and _step_of(line[0]) == step else {}
    return {key: value for key, value in row.items() if not key.startswith("val_")}


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a kill cut off
