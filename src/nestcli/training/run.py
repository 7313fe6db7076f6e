"""One pretraining run: the folder, what it resumes from, the trainer, and the result."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler
from omegaconf import DictConfig, OmegaConf
from torch import nn

from nestcli.checkpoint.lightning import AtomicCheckpointIO
from nestcli.config import resolved
from nestcli.data.datamodule import NestDataModule
from nestcli.errors import ConfigError, RunFailedError
from nestcli.files import held_alone, remove_leftovers, user_path, write_text
from nestcli.model.module import NestModule
from nestcli.model.optim import build_optimizer, build_schedule
from nestcli.training.changes import Changes, ConfiguredOptimizer, record_start
from nestcli.training.checkpoints import NestCheckpoint
from nestcli.training.checks import CheckpointConfig, check_masks, check_settings, without_effect
from nestcli.training.cluster import check_launch, cluster_plugins
from nestcli.training.disk import check_folder, check_space, disk_explained
from nestcli.training.find_checkpoint import SameResume, find_resume
from nestcli.training.initial_weights import start_from, starts_of
from nestcli.training.launcher import ended_together
from nestcli.training.lightning_counters import ResumedCounts
from nestcli.training.metrics import Reporter
from nestcli.training.monitoring import Watched
from nestcli.training.settings import (
    Length,
    accelerator,
    check_compiler,
    device_name,
    make_loggers,
    n_processes,
    quieten,
    trainer_options,
)
from nestcli.training.signals import StopSignals, leave_signals_to_us
from nestcli.training.wandb_run import keep_id

DEFAULT_EXP_DIR = "nest_experiments"
_PATIENCE = 5.0  # s, for loader processes of a killed run to find out that it is gone
# Text, and {metric} or {metric:.3f} in it; Python's own formats also know widths of gigabytes, and attributes.
_FILENAME = re.compile(r"(?:[^{}]|\{[\w/-]+(?::0?\d{0,2}(?:\.\d{1,2})?[a-z]?)?\})+")
_MONITORS = ("val_loss", "val_masked_accuracy", "train_loss", "masked_accuracy")


@dataclass(frozen=True)
class RunPlan:
    """What is about to be trained, on what, where. Times in seconds."""

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
    starts_from: tuple[str, ...] = ()  # checkpoints whose weights the run begins with
    ignored_start: str | None = None  # the key that names some, where a resumed run has its own


@dataclass(frozen=True)
class RunResult:
    """What came out of a run; checkpoints are None where none was written."""

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
    """What a run would do, and one forward and backward pass of its first batch."""

    plan: RunPlan
    batch_seconds: float
    padding: float  # share of an epoch's batches
    loss: float
    masked_share: float
    gradient_norm: float
    peak_gpu_bytes: int | None


class Pretraining:
    """A configured run: `plan` says what it will do, `fit` does it, `dry_run` tries one batch."""

    def __init__(self, config: DictConfig, reporter: Reporter) -> None:
        self.config, self.reporter = config, reporter
        check_settings(config)
        processes = n_processes(config)
        check_launch(processes, int(config.trainer.num_nodes))
        check_compiler(config)
        self.folder = experiment_folder(config)
        self.data = NestDataModule(config, reporter.note)
        self.data.check_ready(processes // int(config.trainer.num_nodes))
        for key, corpus in (("model.train_ds", self.data.train), ("model.validation_ds", self.data.val)):
            if corpus is not None:
                check_masks(config, key, corpus.speech.durations, reporter.note)
        for told in without_effect(config):
            reporter.note(told)
        batches = self.data.train_plan(processes).batches(0)
        self.length = Length.of(config.trainer, len(batches), processes)
        self.data.batches = self.length.batches
        self.module = NestModule(config)
        self._there = _checkpoints_in(self.folder)
        self._resume = find_resume(self.folder, config, self.module.model)
        self.resumes = self._resume.path
        self._starts = starts_of(config)
        record_start(config, self._resume.former)
        self._changes = Changes.of(self._resume.former, config, self._resume.step)
        self._starts_from = () if self.resumes else tuple(start_from(self.module.model, self._starts, config))

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
            starts_from=self._starts_from,
            ignored_start=self._starts[0].key if self.resumes and self._starts else None,
        )

    @property
    def nemo_path(self) -> Path | None:
        """The .nemo file that a run can keep, named as NeMo's exp_manager names it; NeMo has none for post_conv."""
        fits = self.config.model.mask_position == "pre_conv"
        return self.folder / "checkpoints" / f"{self.config.exp_manager.name}.nemo" if fits else None

    def fit(self) -> RunResult:
        """Train to the end; raises NestError for what the user can mend, StoppedError where a signal ended it."""
        _make_folder(self.folder)
        with ExitStack() as stack:
            if _is_first():
                with disk_explained(self.folder):
                    stack.enter_context(held_alone(self.folder, _taken(self.folder), _PATIENCE))
                if _checkpoints_in(self.folder) != self._there:  # the other one has just ended
                    raise _taken(self.folder)
            return self._fit()

    def _fit(self) -> RunResult:
        checkpoints = self._checkpoint_callback()
        if _is_first():
            with disk_explained(self.folder):
                self._prepare_folder(checkpoints)
        watched = Watched.of(self.config, self.module, self.data, self.reporter, self.folder, self.length)
        metrics = watched.metrics
        resumed = [SameResume(self._resume), ConfiguredOptimizer(self.reporter.note)]
        trainer_callbacks = [*resumed, *watched.callbacks, *([checkpoints] if checkpoints else [])]
        with warnings.catch_warnings(), _memory_explained(), disk_explained(self.folder), StopSignals() as signals:
            quieten()
            trainer = self._trainer([*trainer_callbacks, ResumedCounts(), signals], watched.waits)
            with ended_together(trainer):
                try:
                    trainer.fit(self.module, datamodule=self.data, ckpt_path=self.resumes)
                except SystemExit:  # Lightning's answer to Ctrl-C
                    raise KeyboardInterrupt from None
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        return RunResult(
            folder=self.folder,
            step=trainer.global_step,
            val_loss=values.get("val_loss"),
            val_accuracy=values.get("val_masked_accuracy"),
            best=self._written(checkpoints.best_model_path) if checkpoints else None,
            last=self._written(checkpoints.last_model_path) if checkpoints else None,
            nemo=checkpoints.nemo if checkpoints and checkpoints.nemo and checkpoints.nemo.is_file() else None,
            metrics=metrics.path,
            skipped=self.data.skipped.skipped,
        )

    def dry_run(self) -> DryRun:
        """One optimiser step on the first batch, and a look at all that a run needs; nothing is written."""
        device = torch.device("cuda" if accelerator(self.config) == "gpu" else "cpu")
        check_folder(self.folder)
        batch, plan = self.data.train_batch(0, 0), self.plan
        self.data.check_validation_batch()
        checkpoints = self._checkpoint_callback()
        check_space(self.folder, checkpoints, self.module.model)
        self._resume.announce(self.reporter.note)
        self._changes.tell(self.reporter.note)
        with warnings.catch_warnings(), _memory_explained():
            quieten()
            trainer = self._trainer([checkpoints] if checkpoints else [])
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
            peak_gpu_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        )

    def remove_leftovers(self) -> None:
        """Remove what a kill in the middle of a write left in the run's folder; only for the first process."""
        for folder in (self.folder, self.folder / "checkpoints"):
            remove_leftovers(folder)

    # ---- parts ----

    def _prepare_folder(self, checkpoints: NestCheckpoint | None) -> None:
        """What killed runs have left is put in order; only the first process does that."""
        self.remove_leftovers()
        check_space(self.folder, checkpoints, self.module.model)
        self._resume.set_aside(self.reporter.note)
        if self.resumes is None and (self.folder / "metrics.jsonl").is_file():
            self.reporter.note(f"{self.folder} holds no checkpoint yet: the run starts from the beginning.")
        self._changes.tell(self.reporter.note)
        self._changes.keep_former(self.folder)
        keep_id(self.config, self.folder)
        write_text(self.folder / "config.yaml", [OmegaConf.to_yaml(resolved(self.config))])

    def _checkpoint_callback(self) -> NestCheckpoint | None:
        manager = self.config.exp_manager
        if not manager.create_checkpoint_callback:
            return None
        ours = {field.name for field in fields(CheckpointConfig)}
        options = {key: value for key, value in resolved(manager.checkpoint_callback_params).items() if key in ours}
        nemo = self.nemo_path if options.pop("always_save_nemo", False) else None
        monitor = options.pop("monitor", "val_loss")
        if monitor not in _MONITORS:
            raise ConfigError(
                f"exp_manager.checkpoint_callback_params.monitor: {monitor!r} is not logged. "
                f"Use one of {', '.join(_MONITORS)}."
            )
        monitor = monitor if self.data.val else None
        filename = options.pop("filename", None) or f"{manager.name}--{{{monitor}:.4f}}-{{epoch}}"
        _check_filename(str(filename))
        if monitor is None:  # nothing to compare by: keep the newest only
            filename, options["save_top_k"] = f"{manager.name}--{{step}}", 1
            options.setdefault("every_n_train_steps", max(1, self.length.validate_every // self.length.accumulate))
        if options.get("save_last") is None:
            options["save_last"] = True
        try:
            return NestCheckpoint(self.folder / "checkpoints", filename, monitor=monitor, nemo=nemo, **options)
        except (TypeError, ValueError, MisconfigurationException) as error:
            raise ConfigError(f"exp_manager.checkpoint_callback_params: {' '.join(str(error).split())}") from None

    def _written(self, path: str) -> Path | None:
        written = self.folder / "checkpoints" / Path(path).name
        return written if path and written.is_file() else None

    def _trainer(self, callbacks: list[Any], profiler: Profiler | None = None) -> Trainer:
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
        leave_signals_to_us(trainer)
        return trainer


def _check_gradients(model: nn.Module) -> None:
    """Raise ConfigError if something is to be trained that the loss does not depend on."""
    idle = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    if idle:
        raise ConfigError(f"the loss has no gradient for {idle[0]}{f' and {len(idle) - 1} more' if idle[1:] else ''}.")


def _check_filename(filename: str) -> None:
    """A checkpoint's name stays in its folder, and its numbers have a width that a name can have."""
    if Path(filename).is_absolute() or ".." in Path(filename).parts or not _FILENAME.fullmatch(filename):
        raise ConfigError(
            f"exp_manager.checkpoint_callback_params.filename: {filename[:100]!r} is no name such as "
            "run--{val_loss:.3f}-{step}."
        )


def experiment_folder(config: DictConfig) -> Path:
    """exp_manager's folder: exp_dir/name, without a version, as NeMo's when it may resume."""
    manager = config.exp_manager
    name = str(manager.name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(f"exp_manager.name: {name[:100]!r} leads out of exp_manager.exp_dir. Give a name.")
    return Path(user_path(str(manager.exp_dir or DEFAULT_EXP_DIR))) / name


@contextmanager
def _memory_explained() -> Iterator[None]:
    """A GPU that is too small for the run is no bug."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunFailedError(
            f"the GPU's memory is full: {str(error).splitlines()[0]} Lower model.train_ds.batch_size (and raise "
            "trainer.accumulate_grad_batches by as much) or model.train_ds.max_duration, or set "
            "trainer.precision=bf16-mixed."
        ) from None


def _is_first() -> bool:
    """Whether this is the first process of the run, the one that writes."""
    return not getattr(rank_zero_only, "rank", 0)


def _checkpoints_in(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


def _taken(folder: Path) -> ConfigError:
    return ConfigError(
        f"another run of nest is training in {folder}. Wait for it or stop it, then give the same command again; or "
        "give this one another exp_manager.name."
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the experiment's folder {folder} cannot be made: {error.strerror}. Set exp_manager.exp_dir."
        ) from None
    check_folder(folder)
