"""One pretraining run: check it, resume it or start it, train, and report the result."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nestcli.checkpoint.lightning import AtomicCheckpointIO
from nestcli.config import resolved
from nestcli.data.datamodule import NestDataModule
from nestcli.errors import ConfigError, RunFailedError
from nestcli.files import held_alone, remove_leftovers, write_text
from nestcli.model.module import NestModule
from nestcli.model.optim import build_optimizer, build_schedule
from nestcli.training.checkpoints import NestCheckpoint, checkpoints_of
from nestcli.training.config_changes import Changes, record_initial_weights
from nestcli.training.config_checks import check_masks, check_settings, without_effect
from nestcli.training.find_checkpoint import find_resume
from nestcli.training.initial_weights import ENCODER_KEY, fit_quantizer, load_initial_weights, weight_sources
from nestcli.training.launcher import check_launch, cluster_plugins, ended_together, is_first_process
from nestcli.training.lightning_internals import keep_signal_handlers
from nestcli.training.loggers import keep_wandb_id, make_loggers, silence_expected_warnings
from nestcli.training.monitor.metrics import Reporter
from nestcli.training.monitor.monitors import METRICS, Monitors
from nestcli.training.resume_callbacks import ConfiguredOptimizer, ResumedCounts, SameResume
from nestcli.training.run_folder import (
    check_folder,
    check_space,
    checkpoint_names,
    disk_explained,
    experiment_folder,
    in_use,
    make_folder,
)
from nestcli.training.settings import (
    Length,
    NestBlock,
    check_compiler,
    device_name,
    first_device,
    n_processes,
    trainer_options,
)
from nestcli.training.target_check import TargetCheck, check_targets

_PATIENCE = 5.0  # seconds for the loader processes of a killed run to notice that it is gone


@dataclass(frozen=True)
class RunPlan:
    """The model, data, device and folder of a run that has not begun. Times in seconds."""

    folder: Path
    resumes: Path | None
    resumes_at: int  # optimiser steps already done
    device: str
    parameters: int
    encoder: str  # nest or nemo: whose code it is
    train_utterances: int
    train_seconds: float
    train_left_out: int  # utterances that are too short or too long
    noise_clips: int
    val_utterances: int
    val_seconds: float
    steps: int | None
    initial_weights: tuple[str, ...] = ()  # a line for each checkpoint that a new run takes weights from
    ignored_key: str | None = None  # the key that names such checkpoints, where a resumed run does not use them


@dataclass(frozen=True)
class RunResult:
    """The result of a run; checkpoints are None where none was written."""

    folder: Path
    step: int
    val_loss: float | None
    val_accuracy: float | None
    best: Path | None
    last: Path | None
    nemo: Path | None
    metrics: Path
    skipped: int = 0  # utterances that could not be read


@dataclass(frozen=True)
class DryRun:
    """The plan of a run, and the measures of one optimiser step on the largest batch of its first epoch."""

    plan: RunPlan
    batch_seconds: float
    padding: float  # share of an epoch's batches
    loss: float
    masked_share: float
    gradient_norm: float
    peak_gpu_bytes: int | None


class Pretraining:
    """A configured run: `plan` describes it, `fit` trains, `dry_run` tries one batch."""

    def __init__(self, config: DictConfig, reporter: Reporter) -> None:
        self.config, self.reporter = config, reporter
        check_settings(config)
        processes = n_processes(config)
        check_launch(processes, int(config.trainer.num_nodes))
        check_compiler(config)
        self.folder = experiment_folder(config)
        self.data = NestDataModule(config, reporter.note)
        self.data.check_ready(processes, int(config.trainer.num_nodes))
        for key, corpus in (("model.train_ds", self.data.train), ("model.validation_ds", self.data.val)):
            if corpus is not None:
                check_masks(config, key, corpus.speech.durations, reporter.note)
        for line in without_effect(config):
            reporter.note(line)
        batches = self.data.train_plan(processes).batches(0)
        self.length = Length.of(config.trainer, len(batches), processes)
        self.data.batches = self.length.batches
        self.module = NestModule(config)
        self._names = checkpoint_names(self.folder)
        self._resume = find_resume(self.folder, config, self.module.model)
        self.resumes = self._resume.path
        self._sources = weight_sources(config)
        record_initial_weights(config, self._resume.former)
        self._changes = Changes.of(self._resume.former, config, self._resume.step)
        given = any(source.takes("quantizer.codebooks") for source in self._sources if source.key != ENCODER_KEY)
        self._fits_quantizer = not (given or self.resumes) and self.module.model.quantizer.config.init == "kmeans"
        self._loaded = () if self.resumes else tuple(load_initial_weights(self.module.model, self._sources, config))

    @property
    def plan(self) -> RunPlan:
        noise, train, val = self.data.train_noise, self.data.train, self.data.val
        return RunPlan(
            folder=self.folder,
            resumes=self.resumes,
            resumes_at=self._resume.step,
            device=device_name(self.config),
            parameters=sum(parameter.numel() for parameter in self.module.parameters()),
            encoder=self.module.model.encoder.config.backend,
            train_utterances=len(train.speech),
            train_seconds=float(train.speech.durations.sum()),
            train_left_out=train.left_out,
            noise_clips=len(noise.manifest) if noise else 0,
            val_utterances=len(val.speech) if val else 0,
            val_seconds=float(val.speech.durations.sum()) if val else 0.0,
            steps=self.length.steps,
            initial_weights=self._loaded,
            ignored_key=self._sources[0].key if self.resumes and self._sources else None,
        )

    def fit_quantizer(self) -> None:
        """Fit the quantizer of a new run, if the configuration says so and no checkpoint gave one. Once per run."""
        if self._fits_quantizer:
            self._fits_quantizer = False
            self.reporter.note(f"targets    {fit_quantizer(self.module.model, self.data)}")

    def check_targets(self, patience: float, *, remote: bool = False) -> TargetCheck | None:
        """Examine the targets of a sample of the data before a new run; None on resume and in other processes.

        Reads for at most about `patience` seconds. Call it before `fit` or `dry_run`, which move the model.
        """
        if self.resumes or not is_first_process():
            return None
        self.fit_quantizer()
        return check_targets(
            self.config, self.data, self.module.model, self.reporter.note, patience=patience, remote=remote
        )

    def fit(self) -> RunResult:
        """Train to the end. Raises NestError that the user can act on, StoppedError if a signal ended the run."""
        self.fit_quantizer()
        make_folder(self.folder)
        with ExitStack() as stack:
            if is_first_process():
                with disk_explained(self.folder):
                    stack.enter_context(held_alone(self.folder, in_use(self.folder), _PATIENCE))
                if checkpoint_names(self.folder) != self._names:  # the other run has just ended
                    raise in_use(self.folder)
            return self._fit()

    def _fit(self) -> RunResult:
        checkpoints = self.checkpoint_callback()
        if is_first_process():
            with disk_explained(self.folder):
                self._prepare_folder(checkpoints)
        monitors = Monitors.of(self.config, self.module, self.data, self.reporter, self.folder, self.length)
        callbacks = [
            SameResume(self._resume),
            ConfiguredOptimizer(self.reporter.note),
            *monitors.callbacks,
            *([checkpoints] if checkpoints else []),
            ResumedCounts(),
        ]
        with warnings.catch_warnings(), _memory_explained(), disk_explained(self.folder), monitors.signals as signals:
            silence_expected_warnings()
            trainer = self.trainer([*callbacks, signals], monitors.data_wait)
            with ended_together(trainer):
                try:
                    trainer.fit(self.module, datamodule=self.data, ckpt_path=self.resumes)
                except SystemExit:  # Lightning turns Ctrl-C into it
                    raise KeyboardInterrupt from None
        return self._result(trainer, checkpoints, monitors.metrics.path)

    def _result(self, trainer: Trainer, checkpoints: NestCheckpoint | None, metrics: Path) -> RunResult:
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        return RunResult(
            folder=self.folder,
            step=trainer.global_step,
            val_loss=values.get("val_loss"),
            val_accuracy=values.get("val_masked_accuracy"),
            best=self._written(checkpoints.best_model_path) if checkpoints else None,
            last=self._written(checkpoints.last_model_path) if checkpoints else None,
            nemo=checkpoints.nemo if checkpoints and checkpoints.nemo and checkpoints.nemo.is_file() else None,
            metrics=metrics,
            skipped=self.data.skipped.skipped,
        )

    def dry_run(self) -> DryRun:
        """Check everything that a run needs and try one optimiser step on the largest batch; write nothing."""
        self.fit_quantizer()
        device = first_device(self.config)
        check_folder(self.folder)
        batch, plan = self.data.train_batch(0, self.data.train_plan().largest()), self.plan
        self.data.check_validation_batch()
        checkpoints = self.checkpoint_callback()
        check_space(self.folder, checkpoints, self.module.model)
        self._resume.announce(self.reporter.note)
        self._changes.announce(self.reporter.note)
        with warnings.catch_warnings(), _memory_explained():
            silence_expected_warnings()
            trainer = self.trainer([checkpoints] if checkpoints else [])
            model = self.module.model.to(device).train()
            optimizer = build_optimizer(model, self.config)
            build_schedule(optimizer, self.config, self.length.steps or -1)
            on_device = batch.to(device)
            with trainer.precision_plugin.forward_context():
                output = model(on_device.audio, on_device.audio_len, on_device.noisy_audio, on_device.noisy_audio_len)
            output.loss.backward()
            _check_gradients(model)
            gradients = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
            optimizer.step()
        frames = (
            output.frames_B
            if self.module.model.mask_after_subsampling
            else (batch.noisy_audio_len // model.preprocessor.config.hop_length)
        )
        return DryRun(
            plan=plan,
            batch_seconds=float(batch.audio_len.sum()) / self.data.sample_rate,
            padding=self.data.train_plan().padding_waste(),
            loss=float(output.loss.detach()),
            masked_share=float(output.mask_BT.sum()) / max(1, int(frames.sum())),
            gradient_norm=float(torch.stack(gradients).norm()),
            peak_gpu_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def remove_leftovers(self) -> None:
        """Remove temporary files that killed runs left in the folder; for the first process alone."""
        for folder in (self.folder, self.folder / "checkpoints"):
            remove_leftovers(folder)

    def checkpoint_callback(self) -> NestCheckpoint | None:
        """Return the callback that writes checkpoints; None if the configuration wants none."""
        return checkpoints_of(self.config, self.folder, self.length, validates=self.data.val is not None)

    def trainer(self, callbacks: list[Any], profiler: Profiler | None = None) -> Trainer:
        """Return Lightning's trainer. Raises ConfigError for settings that Lightning refuses."""
        NestBlock.of(self.config).use_matmul_precision()
        try:
            trainer = Trainer(
                **trainer_options(self.config, self.length, validates=self.data.val is not None),
                callbacks=callbacks,
                profiler=profiler,
                logger=make_loggers(self.config, self.folder),
                plugins=[AtomicCheckpointIO(), *cluster_plugins()],
                default_root_dir=self.folder,
                enable_checkpointing=any(isinstance(callback, NestCheckpoint) for callback in callbacks),
            )
        except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:  # Lightning's own checks
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from None
        keep_signal_handlers(trainer)
        return trainer

    def _prepare_folder(self, checkpoints: NestCheckpoint | None) -> None:
        """Clean up after killed runs and write the configuration; for the first process alone."""
        self.remove_leftovers()
        check_space(self.folder, checkpoints, self.module.model)
        self._resume.set_aside(self.reporter.note)
        if self.resumes is None and (self.folder / METRICS).is_file():
            self.reporter.note(f"{self.folder} holds no checkpoint yet: the run starts from the beginning.")
        self._changes.announce(self.reporter.note)
        self._changes.keep_former(self.folder)
        keep_wandb_id(self.config, self.folder)
        write_text(self.folder / "config.yaml", [OmegaConf.to_yaml(resolved(self.config))])

    def _written(self, path: str) -> Path | None:
        written = self.folder / "checkpoints" / Path(path).name
        return written if path and written.is_file() else None


def _check_gradients(model: nn.Module) -> None:
    """Raise ConfigError if the loss does not depend on a trainable parameter."""
    idle = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    if idle:
        raise ConfigError(f"the loss has no gradient for {idle[0]}{f' and {len(idle) - 1} more' if idle[1:] else ''}.")


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn an out-of-memory error of the GPU or its driver into RunFailedError that names the settings to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailedError(
            f"the GPU's memory is full: {str(error).splitlines()[0]} Lower model.train_ds.batch_size (and raise "
            "trainer.accumulate_grad_batches by as much) or model.train_ds.max_duration, or set "
            "trainer.precision=bf16-mixed."
        ) from None
    except RuntimeError as error:  # of the driver: of page-locked main memory, or of the GPU's memory beside PyTorch's
        if not str(error).startswith("CUDA error: out of memory"):
            raise
        raise RunFailedError(
            "the GPU's driver is out of memory: of page-locked main memory, or of memory on the GPU outside PyTorch's "
            "own. Lower model.train_ds.num_workers or model.train_ds.batch_size, set model.train_ds.pin_memory=false "
            "and model.validation_ds.pin_memory=false, or end other programs that use this GPU."
        ) from None
