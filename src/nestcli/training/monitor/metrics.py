"""Report a run: metrics.jsonl, the loggers' curves and the progress display."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nestcli.data.dataset import NoiseBatch, SkipCounter
from nestcli.errors import RunFailedError
from nestcli.model.cost import Utilisation
from nestcli.model.module import NestModule
from nestcli.training.lightning_internals import is_step_complete, is_validation_due
from nestcli.training.monitor.health import CollapseDetector, DataWaitClock, HealthMonitor, PlateauDetector
from nestcli.training.monitor.jsonl import append_line, drop_lines_after, line_at

_LOGGED_ALONE = ("audio_per_second", "mfu", "unigram_loss", "unigram_accuracy", "data_wait_share")
TIMED = ("seconds", "data_wait_share", "audio_per_second", "mfu")  # keys of a line that differ between equal runs
_SAME_AS_MODULE = ("step", "train_loss", "masked_accuracy", "lr")  # logged by the module itself


@dataclass(frozen=True)
class StepReport:
    """The state of training after an optimiser step. Times and audio in seconds; shares from 0 to 1.

    Loss, accuracy and the fields from `audio_per_second` on are those of the last logged step.
    """

    step: int
    steps: int | None  # in the whole run; None without a limit
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    audio_per_second: float  # this and the fields after seconds_left: NaN until a step is logged
    seconds_left: float | None
    unigram_loss: float = math.nan  # loss of guessing by code frequency
    unigram_accuracy: float = math.nan
    data_wait_share: float = math.nan
    mfu: float = math.nan


class Reporter(Protocol):
    """Shows a run to a person."""

    def step(self, report: StepReport) -> None: ...

    def validation(self, step: int, loss: float, accuracy: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finished(self) -> None: ...


@dataclass
class _Totals:
    """Audio and time of the whole run, resumes included; audio up to the last reading."""

    samples: int = 0
    seconds: float = 0.0


@dataclass
class _Window:
    """Times since the last logged line, in seconds."""

    seconds: float = 0.0
    waited: float = 0.0  # the data wait clock's time at the start of the window


class MetricsWriter(Callback):
    """Writes a line of metrics.jsonl for every logged step, and reports every step to the display.

    Lines hold step, epoch, train_loss, masked_accuracy, lr, audio_seconds, seconds (of training in total), skipped
    (utterances that this process could not read), audio_per_second since the last line, mfu (of this process's GPU, if
    its peak is known), the measures of docs/health.md, and val_loss and val_masked_accuracy if validation ran at that
    step. All but `skipped` and `mfu` cover all processes. Nothing is read from the device between logged steps.
    """

    def __init__(
        self,
        path: Path,
        reporter: Reporter,
        sample_rate: int,
        skipped: SkipCounter,
        health: HealthMonitor,
        collapse: CollapseDetector,
        plateau: PlateauDetector,
        data_wait: DataWaitClock,
        utilisation: Utilisation,
        *,
        batches_per_epoch: int,
        log_every: int,
        stop_on_collapse: bool,
    ) -> None:
        self.path, self.reporter, self.sample_rate, self.skipped = path, reporter, sample_rate, skipped
        self.health, self.collapse, self.plateau, self.data_wait = health, collapse, plateau, data_wait
        self.utilisation = utilisation
        self.batches_per_epoch, self.log_every = batches_per_epoch, max(1, log_every)
        self.stop_on_collapse = stop_on_collapse
        self.totals, self._window = _Totals(), _Window()
        self._used_lr = 0.0
        self._clock = 0.0
        self._started = _Totals()  # when this process began
        self._first_step = 0
        self._shown: dict[str, float] = {}  # the values of the last reading that the display shows
        self._message: str | None = None  # message of the collapse detector that is not yet reported
        self._plateau_message: str | None = None  # message of the plateau detector that is not yet reported
        self._row: dict[str, Any] = {}  # the line of the newest step that was read

    # ---- Lightning's hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        self._started = _Totals(self.totals.samples, self.totals.seconds)
        self._window = _Window(waited=self.data_wait.seconds)
        if trainer.is_global_zero:
            drop_lines_after(self.path, trainer.global_step)
            self._row = line_at(self.path, trainer.global_step) or self._row  # validation may come before a step
        self._clock = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._used_lr = cast(NestModule, pl_module).learning_rate

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: NoiseBatch, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self.totals.seconds += now - self._clock
        self._window.seconds += now - self._clock
        self._clock = now
        self.utilisation.add(*batch.audio.shape)
        if not is_step_complete(trainer):
            return
        step, steps = trainer.global_step, _steps(trainer)
        if step % self.log_every == 0 or step == steps:
            self._log(trainer, pl_module)
        elif is_validation_due(trainer, trainer.fit_loop.epoch_loop.batch_progress.total.ready):
            self._read(trainer, pl_module)  # now: a run that stops here validates when it resumes
        elif not self._shown:  # the display should not wait for the first line
            self._shown = dict(zip(("train_loss", "masked_accuracy"), self.health.glance(), strict=True))
        self.reporter.step(self._report(trainer))
        self._report_health()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.health.unread and not trainer.sanity_checking:
            self._read(trainer, pl_module)  # the line that validation adds to
        self._clock = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = time.monotonic()  # validation is not training time
        metrics = trainer.callback_metrics
        baseline = self.health.read_validation(trainer)
        if trainer.sanity_checking or "val_loss" not in metrics:
            return
        loss, accuracy = float(metrics["val_loss"]), float(metrics.get("val_masked_accuracy", math.nan))
        self.reporter.validation(trainer.global_step, loss, accuracy)
        values = {"val_loss": loss, "val_masked_accuracy": accuracy, **baseline}
        self._write(trainer, {"step": trainer.global_step, **self._row, **values})
        _log_curves(trainer, baseline)
        self._report_health()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reporter.finished()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.reporter.finished()

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self.totals.samples,
            "seconds": self.totals.seconds,
            "watch": self.collapse.state_dict(),
            "plateau": self.plateau.state_dict(),
            "row": self._row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "audio_seconds" in state_dict:  # a checkpoint without collapse detection
            state_dict = {**state_dict, "samples": round(state_dict["audio_seconds"] * self.sample_rate)}
        self.totals = _Totals(state_dict["samples"], state_dict["seconds"])
        self._row = state_dict.get("row", {})
        if "watch" in state_dict:
            self.collapse.load_state_dict(state_dict["watch"])
        if "plateau" in state_dict:
            self.plateau.load_state_dict(state_dict["plateau"])

    # ---- lines ----

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer, pl_module)
        self._write(trainer, self._row)
        _log_curves(trainer, self._row)

    def _read(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the measures of the newest step into its line, and start a new window."""
        self.health.guard.settle(trainer)
        measures = self.health.read(trainer, pl_module)
        samples = int(measures.pop("samples"))
        self.totals.samples += samples
        measures["recent_tokens"] = int(measures["recent_tokens"])
        waited = self.data_wait.seconds - self._window.waited
        seconds = max(self._window.seconds, 1e-9)
        measures["data_wait_share"] = round(min(1.0, waited / seconds), 4)
        measures["audio_per_second"] = round(samples / self.sample_rate / seconds, 2)
        if (mfu := self.utilisation.take(seconds)) is not None:
            measures["mfu"] = round(mfu, 4)
        self._window = _Window(waited=self.data_wait.seconds)
        audio = self.totals.samples / self.sample_rate
        self._row = {
            "step": trainer.global_step,
            "epoch": _epoch(trainer, self.batches_per_epoch),
            "train_loss": measures.pop("train_loss"),
            "masked_accuracy": measures.pop("masked_accuracy"),
            "lr": self._used_lr,
            "audio_seconds": round(audio, 3),
            "audio_hours": round(audio / 3600, 5),
            "seconds": round(self.totals.seconds, 3),
            "skipped": self.skipped.skipped,
            "bad_steps": self.health.guard.bad_steps,
            **measures,
        }
        self._message = self.collapse.update(trainer.global_step, self._row)
        self._plateau_message = self.plateau.update(trainer.global_step, self._row)
        self._row["collapsed"] = self.collapse.collapsed
        per_second = (audio - self._started.samples / self.sample_rate) / max(self._trained, 1e-9)
        # The display shows the mean since this process began, which also tells the time left.
        self._shown = {**self._row, "audio_per_second": per_second}

    def _report_health(self) -> None:
        """Report a plateau, a collapse or a recovery after its line. Raises RunFailedError to stop the run."""
        message, plateau = self._message, self._plateau_message
        self._message = self._plateau_message = None
        if plateau is not None:
            self.reporter.note(plateau)
        if message is None:
            return
        if self.collapse.collapsed and self.stop_on_collapse:
            raise RunFailedError(f"{message} Training was stopped because nest.stop_on_collapse is set.")
        self.reporter.note(message)

    @property
    def _trained(self) -> float:
        """Seconds of training by this process."""
        return self.totals.seconds - self._started.seconds

    def _report(self, trainer: Trainer) -> StepReport:
        step, steps, shown = trainer.global_step, _steps(trainer), self._shown
        per_step = self._trained / max(1, step - self._first_step)
        return StepReport(
            step=step,
            steps=steps,
            epoch=_epoch(trainer, self.batches_per_epoch),
            loss=shown["train_loss"],
            accuracy=shown["masked_accuracy"],
            learning_rate=self._used_lr,
            seconds_left=None if steps is None else per_step * (steps - step),
            **{key: shown.get(key, math.nan) for key in _LOGGED_ALONE},
        )

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Append a line, or replace the last one if validation followed a logged step."""
        if not trainer.is_global_zero:
            return
        if "val_loss" in row:
            drop_lines_after(self.path, row["step"] - 1, then=row)
            return
        append_line(self.path, row)


def _epoch(trainer: Trainer, batches_per_epoch: int) -> int:
    """Return the epoch of the newest batch; all processes together train on an epoch's batches."""
    consumed = trainer.fit_loop.epoch_loop.batch_progress.total.ready * trainer.world_size
    return (consumed - 1) // batches_per_epoch


def _steps(trainer: Trainer) -> int | None:
    return trainer.max_steps if trainer.max_steps > 0 else None


def _log_curves(trainer: Trainer, row: dict[str, Any]) -> None:
    """Log the measures to TensorBoard and W&B at the step that Lightning uses for the module's own values."""
    finite = {key: float(value) for key, value in row.items() if math.isfinite(value)}
    values = {f"health/{key}": value for key, value in finite.items() if key not in _SAME_AS_MODULE}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=max(0, trainer.global_step - 1))
