"""What watches a run: the guard against bad steps, its health, its metrics. Lightning calls them in this order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig

from nestcli.config import section
from nestcli.data.datamodule import NestDataModule
from nestcli.model.config import ScheduleConfig
from nestcli.model.module import NestModule
from nestcli.training.collapse import CollapseWatch
from nestcli.training.guard import StepGuard
from nestcli.training.health import HealthMonitor, WaitClock
from nestcli.training.metrics import MetricsWriter, Reporter
from nestcli.training.settings import Length, SafetyConfig

BAD_BATCHES = "bad_batches.jsonl"


@dataclass(frozen=True)
class Watched:
    """Callbacks that know each other; `waits` goes to the trainer as its profiler."""

    guard: StepGuard
    health: HealthMonitor
    metrics: MetricsWriter
    waits: WaitClock

    @classmethod
    def of(
        cls,
        config: DictConfig,
        module: NestModule,
        data: NestDataModule,
        reporter: Reporter,
        folder: Path,
        length: Length,
    ) -> Watched:
        safety, quantizer = SafetyConfig.of(config), module.model.quantizer.config
        warmup = section(ScheduleConfig, config, "model.optim.sched").warmup(length.steps or -1)
        guard = StepGuard(
            folder / BAD_BATCHES,
            reporter.note,
            lambda number: _place(data, number),
            max_bad_steps=safety.max_bad_steps,
            explode_factor=safety.explode_factor,
        )
        health, waits = HealthMonitor(guard, n_books=quantizer.num_books, n_codes=quantizer.num_classes), WaitClock()
        metrics = MetricsWriter(
            folder / "metrics.jsonl",
            reporter,
            data.sample_rate,
            data.skipped,
            health,
            CollapseWatch(safety.collapse_lines, warmup, quantizer.num_classes),
            waits,
            batches_per_epoch=length.batches_per_epoch,
            log_every=int(config.trainer.log_every_n_steps),
            stop_on_collapse=safety.stop_on_collapse,
        )
        return cls(guard, health, metrics, waits)

    @property
    def callbacks(self) -> list[Callback]:
        return [self.guard, self.health, self.metrics]


def _place(data: NestDataModule, number: int) -> dict[str, Any]:
    """Where an utterance is: its audio file, and the line of its manifest."""
    speech = data.train.speech
    return {"file": str(speech.entry(number).audio_filepath), "where": speech.where(number)}
