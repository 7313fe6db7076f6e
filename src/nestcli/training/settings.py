"""The blocks of a run's configuration, checked, and what they mean here: length, devices, the trainer's arguments."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf

from nestcli.checks import one_of, range_of, short, within
from nestcli.config import resolved, section
from nestcli.errors import ConfigError, MissingDependencyError
from nestcli.jobs.cores import available_cores
from nestcli.model.cost import peak_of

# Lightning's names. bf16-true is implemented by nest: Lightning's would convert waveforms and codebooks to bf16 too.
_PRECISIONS = {
    "32": "32-true",
    "32-true": "32-true",
    "16": "16-mixed",
    "16-mixed": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
    "bf16-true": "32-true",
}
# Keys of the trainer block that are not passed to Lightning: nest handles them, epochs included.
_NOT_PASSED = (
    "enable_checkpointing", "logger", "enable_progress_bar", "max_epochs", "max_steps", "limit_train_batches",
    "val_check_interval", "check_val_every_n_epoch",
)  # fmt: skip
_PROCESSES = 16  # number of processes that is always allowed on a CPU, even with fewer cores
_ENDLESS = 1 << 40  # steps of a run without a limit
_TIME = re.compile(r"\d{1,5}:\d\d:\d\d:\d\d")
_TIME_PARTS = ("weeks", "days", "hours", "minutes", "seconds")
_STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "fsdp2")


@dataclass(frozen=True)
class TrainerConfig:
    """The `trainer` block, checked; other keys in it have no effect."""

    devices: int | str | tuple[int, ...]
    num_nodes: int
    max_epochs: int | None
    max_steps: int | None
    val_check_interval: int | float | None  # None: Lightning's default, an epoch
    check_val_every_n_epoch: int | None
    accelerator: str
    strategy: str
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    precision: int | str
    log_every_n_steps: int
    sync_batchnorm: bool
    enable_progress_bar: bool | None
    num_sanity_val_steps: int | None
    enable_checkpointing: bool
    logger: bool | None
    benchmark: bool | None
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    deterministic: bool | str | None = None
    detect_anomaly: bool = False
    gradient_clip_algorithm: str | None = None
    max_time: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if str(self.precision) not in _PRECISIONS:
            raise ValueError(f"precision: {self.precision!r} is not one of {', '.join(_PRECISIONS)}.")
        if isinstance(self.devices, str) and self.devices not in ("auto", "-1"):
            raise ValueError(f"devices: {self.devices!r} must be a number, -1 for all, or a list such as [0,1].")
        if isinstance(self.devices, int) and not (self.devices == -1 or 1 <= self.devices <= 1 << 20):
            raise ValueError(f"devices: {short(self.devices)} must be at least 1, or -1 for all.")
        if isinstance(self.devices, tuple):
            within(self, 0, 1 << 10, "devices")
            if len(set(self.devices)) < len(self.devices):
                raise ValueError(f"devices: {list(self.devices)} names a device twice. Remove one.")
        within(self, 1, 1 << 20, "num_nodes", "accumulate_grad_batches")
        within(self, 1, 10**9, "log_every_n_steps", "check_val_every_n_epoch")
        within(self, 0, 1e9, "gradient_clip_val")
        within(self, -1, 10**9, "num_sanity_val_steps")
        for key in ("max_steps", "max_epochs"):
            if getattr(self, key) != -1:  # no limit
                within(self, 1, _ENDLESS, key)
        for key in ("val_check_interval", "limit_train_batches", "limit_val_batches"):
            _check_batches(key, getattr(self, key), least=0 if key == "limit_val_batches" else 1)
        if self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy: {self.strategy!r} is not one of {', '.join(_STRATEGIES)}.")
        if isinstance(self.deterministic, str) and self.deterministic != "warn":
            raise ValueError(f"deterministic: {self.deterministic!r} must be true, false or warn.")
        if self.gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(f"gradient_clip_algorithm: {self.gradient_clip_algorithm!r} must be norm or value.")
        for key in ("logger", "enable_checkpointing"):
            if getattr(self, key):
                raise ValueError(f"{key}: must be false, because exp_manager creates loggers and checkpoints.")
        _check_time(self.max_time)


def _check_batches(key: str, value: float | None, *, least: int) -> None:
    """Raise ValueError unless a value is a number of batches or a decimal share; `least` 0 allows none."""
    is_share, none = isinstance(value, float), least == 0 and value == 0
    if value is not None and not none and not (0 < value <= 1 if is_share else 1 <= value <= _ENDLESS):
        must = range_of(least, _ENDLESS)
        if is_share:
            must = (
                f"{range_of(0, 1, above=least > 0)}: a decimal point makes it a share; write batches as a whole number"
            )
        raise ValueError(f"{key}: {short(value)} must be {must}.")


def _check_time(time: str | dict[str, Any] | None) -> None:
    """Raise ValueError unless `max_time` has Lightning's form: DD:HH:MM:SS, or numbers of units by name."""
    if isinstance(time, str):
        usable = _TIME.fullmatch(time) is not None and time.strip("0:") != ""
    elif time is None:
        usable = True
    else:
        numbers = [isinstance(each, int | float) and 0 <= each <= 1e6 for each in time.values()]
        usable = all(numbers) and any(time.values()) and set(time) <= set(_TIME_PARTS)
    if not usable:
        raise ValueError(
            f"max_time: {str(time)[:60]!r} must be a time such as 01:12:00:00 (days:hours:minutes:seconds)."
        )


@dataclass(frozen=True)
class NestBlock:
    """The `nest` block, checked: the handling of bad steps and of a collapse, and how a GPU multiplies."""

    max_bad_steps: int | None = 10  # within 100 steps; None: bad steps update the model
    explode_factor: float | None = 10.0  # times the usual loss; None: only NaN and infinity are bad
    stop_on_collapse: bool = False
    collapse_lines: int = 20  # consecutive logged lines after which a run counts as collapsed
    matmul_precision: str | None = None  # of products and convolutions in fp32; None: PyTorch's defaults
    peak_flops: float | None = None  # operations per second of one device; None: from a table of GPUs

    def __post_init__(self) -> None:
        within(self, 1, 100, "max_bad_steps")
        within(self, 1, 1e9, "explode_factor", above=True)
        within(self, 1, 10**9, "collapse_lines")
        within(self, 0, 1e18, "peak_flops", above=True)
        one_of(self, "matmul_precision", None, "highest", "high", "medium")

    @classmethod
    def of(cls, config: DictConfig) -> NestBlock:
        """Return the block, or the defaults if the configuration has none. Raises ConfigError."""
        return cls() if config.get("nest") is None else section(cls, config, "nest")

    def use_matmul_precision(self) -> None:
        """Choose for this process how products and convolutions in fp32 are rounded, by PyTorch's three names."""
        if self.matmul_precision is not None:
            torch.set_float32_matmul_precision(self.matmul_precision)
            torch.backends.cudnn.allow_tf32 = self.matmul_precision != "highest"


@dataclass(frozen=True)
class ManagerConfig:
    """The `exp_manager` block, checked."""

    exp_dir: str | None
    name: str
    create_tensorboard_logger: bool
    create_checkpoint_callback: bool
    resume_if_exists: bool
    resume_ignore_no_checkpoint: bool
    create_wandb_logger: bool


@dataclass(frozen=True)
class CheckpointConfig:
    """The `exp_manager.checkpoint_callback_params` block, checked."""

    monitor: str
    mode: str
    save_top_k: int
    always_save_nemo: bool
    filename: str | None = None
    every_n_epochs: int | None = None
    every_n_train_steps: int | None = None
    save_last: bool | str | None = None
    verbose: bool = False
    auto_insert_metric_name: bool = True

    def __post_init__(self) -> None:
        within(self, -1, 10**6, "save_top_k")
        within(self, 0, 10**12, "every_n_train_steps", "every_n_epochs")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode: {self.mode!r} must be min or max.")
        if self.every_n_epochs not in (None, 0, 1):
            raise ValueError(
                f"every_n_epochs: {self.every_n_epochs} is not supported: a run is one sequence of batches. "
                "Set every_n_train_steps, or trainer.val_check_interval."
            )
        if isinstance(self.save_last, str) and self.save_last != "link":
            raise ValueError(f"save_last: {self.save_last!r} must be true, false or link.")
        if self.save_last is False and self.save_top_k == 0:
            raise ValueError(
                "save_top_k: 0 with save_last=false writes no checkpoint. Raise it, or set save_last=true. To keep no "
                "checkpoints, set exp_manager.create_checkpoint_callback=false."
            )


@dataclass(frozen=True)
class Length:
    """The length of a run in optimiser steps and batches, from whichever keys state it.

    Lightning trains one long epoch: its counters that restart in every epoch are wrong after a resume.
    """

    steps: int | None  # None: no limit
    accumulate: int
    batches_per_epoch: int  # of all processes together
    validate_every: int  # batches of each process

    @property
    def batches(self) -> int:
        """Batches of each process, always a multiple of `accumulate`."""
        return (_ENDLESS if self.steps is None else self.steps) * self.accumulate

    @classmethod
    def of(cls, trainer: DictConfig, batches_per_epoch: int, processes: int = 1) -> Length:
        """Compute it from trainer.max_steps, max_epochs, val_check_interval and related keys. Raises ConfigError."""
        limit = trainer.get("limit_train_batches")
        if limit is not None:  # as in Lightning, a number counts the batches of each process
            limit = round(limit * batches_per_epoch) if isinstance(limit, float) else limit * processes
            batches_per_epoch = max(1, min(batches_per_epoch, limit))
        accumulate = int(trainer.accumulate_grad_batches)
        ends = []
        if trainer.max_steps is not None and trainer.max_steps >= 0:
            ends.append(int(trainer.max_steps))
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            batches = int(trainer.max_epochs) * batches_per_epoch
            if 0 < batches < accumulate * processes:
                raise ConfigError(
                    f"trainer.max_epochs={trainer.max_epochs}: {batches} batches are fewer than the "
                    f"trainer.accumulate_grad_batches={accumulate} of one step"
                    f"{f' on {processes} devices' if processes > 1 else ''}. Raise the first or lower the second."
                )
            ends.append(batches // (accumulate * processes))
        interval = 1.0 if trainer.val_check_interval is None else trainer.val_check_interval
        if isinstance(interval, float):
            in_all = interval * batches_per_epoch * int(trainer.check_val_every_n_epoch or 1)
            interval = max(1, round(in_all / processes))
        return cls(min(ends) if ends else None, accumulate, batches_per_epoch, int(interval))


def trainer_options(config: DictConfig, length: Length, *, validates: bool) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer. Raises ConfigError."""
    passed_on = {field.name for field in fields(TrainerConfig)} - set(_NOT_PASSED)
    options = {key: value for key, value in resolved(config.trainer).items() if key in passed_on}
    processes = n_processes(config)
    options.update(
        accelerator=accelerator(config),
        devices=_devices(config),
        precision=_PRECISIONS[str(options["precision"])],
        strategy=_strategy(config, processes),
        sync_batchnorm=bool(options["sync_batchnorm"]) and processes > 1 and accelerator(config) == "gpu",
        limit_val_batches=options.get("limit_val_batches", 1.0) if validates else 0,
        max_epochs=-1,
        max_steps=-1 if length.steps is None else length.steps,
        val_check_interval=length.validate_every,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return options


def _strategy(config: DictConfig, processes: int) -> str | Strategy:
    name = str(config.trainer.strategy)
    if processes == 1:
        return "auto"
    if name == "fsdp2":
        from nestcli.training.sharding import ShardedStrategy

        return ShardedStrategy(processes)
    return name


def accelerator(config: DictConfig) -> str:
    """Return gpu or cpu. Raises ConfigError if this machine lacks the one that is asked for."""
    wanted = str(config.trainer.accelerator)
    if wanted in ("auto", "gpu", "cuda"):
        if torch.cuda.is_available():
            return "gpu"
        if wanted != "auto":
            raise ConfigError(f"trainer.accelerator={wanted}: no usable GPU was found. Set trainer.accelerator=cpu.")
        return "cpu"
    if wanted != "cpu":
        raise ConfigError(f"trainer.accelerator: {wanted!r} must be auto, gpu or cpu.")
    return wanted


def peak_operations(config: DictConfig) -> float | None:
    """Return the operations per second of a device by `nest.peak_flops`, or by its data sheet; None if unknown."""
    block = NestBlock.of(config)
    if block.peak_flops is not None or accelerator(config) == "cpu":
        return block.peak_flops
    name = torch.cuda.get_device_name(first_device(config))
    return peak_of(name, str(config.trainer.precision), tf32=block.matmul_precision in ("high", "medium"))


def first_device(config: DictConfig) -> torch.device:
    """Return the device of the first process: of `trainer.devices=[1,3]`, GPU 1. Raises ConfigError."""
    if accelerator(config) == "cpu":
        return torch.device("cpu")
    devices = section(TrainerConfig, config, "trainer").devices
    return torch.device("cuda", devices[0] if isinstance(devices, tuple) else 0)


def check_compiler(config: DictConfig) -> None:
    """Raise MissingDependencyError if layers should be compiled and this machine lacks what torch.compile needs."""
    if not config.model.encoder.get("compile"):
        return
    compiler = os.environ.get("CXX") or "g++"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking = [
        what
        for what, there in (
            (f"a C++ compiler ({compiler})", shutil.which(compiler) is not None or shutil.which("clang++") is not None),
            (f"Python's headers ({header})", header.is_file()),
            ("Triton", accelerator(config) == "cpu" or find_spec("triton") is not None),
        )
        if not there
    ]
    if lacking:
        raise MissingDependencyError(
            f"model.encoder.compile: torch.compile needs {' and '.join(lacking)}, not found here. Install them "
            "(Debian: apt-get install g++ python3-dev), or set model.encoder.compile=false."
        )


def _devices(config: DictConfig) -> Any:
    devices = config.trainer.devices
    devices = OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices
    if accelerator(config) == "gpu":
        return devices
    count = len(devices) if isinstance(devices, list) else 1 if devices in (-1, "-1", "auto") else int(str(devices))
    most = max(_PROCESSES, available_cores())
    if count > most:
        raise ConfigError(
            f"trainer.devices: {count:,} processes on a CPU with {available_cores()} usable cores. Set at most {most}."
        )
    return count


def n_processes(config: DictConfig) -> int:
    """Return the number of processes on all nodes together."""
    devices = _devices(config)
    if isinstance(devices, list):
        count = len(devices)
    else:
        count = torch.cuda.device_count() if devices in (-1, "-1", "auto") else int(devices)
    return count * int(config.trainer.num_nodes)


def device_name(config: DictConfig) -> str:
    """Describe the devices for display."""
    if accelerator(config) == "gpu":
        return f"{n_processes(config)} x {torch.cuda.get_device_name(first_device(config))}"
    return f"{accelerator(config)}, {torch.get_num_threads()} threads"
