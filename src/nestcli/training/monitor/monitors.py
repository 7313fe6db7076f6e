"""The callbacks that watch a run, built from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from omegaconf import DictConfig

from nestcli.config import section
from nestcli.data.datamodule import NestDataModule
from nestcli.model.config import NestConfig, ScheduleConfig
from nestcli.model.cost import Utilisation
from nestcli.model.module import NestModule
from nestcli.training.monitor.health import CollapseDetector, DataWaitClock, HealthMonitor, PlateauDetector
from nestcli.training.monitor.metrics import MetricsWriter, Reporter
from nestcli.training.monitor.step_guard import StepGuard
from nestcli.training.monitor.step_numbers import StopRequest
from nestcli.training.settings import Length, NestBlock, peak_operations
from nestcli.training.signals import StopSignals
from nestcli.training.target_check import remedies

METRICS, BAD_BATCHES = "metrics.jsonl", "bad_batches.jsonl"


@dataclass(frozen=True)
class Monitors:
    """The callbacks that monitor a run. Each uses the one before it, so Lightning must call them in this order."""

    guard: StepGuard
    health: HealthMonitor
    metrics: MetricsWriter
    data_wait: DataWaitClock  # the trainer's profiler
    signals: StopSignals  # called after the callbacks that write checkpoints

    @classmethod
    def of(
        cls,
        config: DictConfig,
        module: NestModule,
        data: NestDataModule,
        reporter: Reporter,
        folder: Path,
        length: Length,
    ) -> Monitors:
        safety, quantizer = NestBlock.of(config), module.model.quantizer.config
        warmup = section(ScheduleConfig, config, "model.optim.sched").warmup(length.steps or -1)
        guard = StepGuard(
            folder / BAD_BATCHES,
            reporter.note,
            lambda number: _place(data, number),
            max_bad_steps=safety.max_bad_steps,
            explode_factor=safety.explode_factor,
            request=(request := StopRequest()),
        )
        health = HealthMonitor(guard, n_books=quantizer.num_books, n_codes=quantizer.num_classes)
        data_wait = DataWaitClock()
        metrics = MetricsWriter(
            folder / METRICS,
            reporter,
            data.sample_rate,
            data.skipped,
            health,
            CollapseDetector(safety.collapse_lines, warmup, quantizer.num_classes),
            PlateauDetector(warmup, remedies(config)),
            data_wait,
            Utilisation(NestConfig.from_config(config), peak_operations(config)),
            batches_per_epoch=length.batches_per_epoch,
            log_every=int(config.trainer.log_every_n_steps),
            stop_on_collapse=safety.stop_on_collapse,
        )
        return cls(guard, health, metrics, data_wait, StopSignals(request))

    @property
    def callbacks(self) -> list[Callback]:
        return [self.guard, self.health, self.metrics]


def _place(data: NestDataModule, number: int) -> dict[str, Any]:
    """Return an utterance's audio file and its line in the manifest."""
    speech = data.train.speech
    return {"file": str(speech.entry(number).audio_filepath), "where": speech.where(number)}
