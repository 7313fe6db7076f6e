"""Run training steps in a process with limited memory, to find out which batches fit."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from nestcli.bench.side import memory_of
from nestcli.bench.stepping import peak_memory, wait_for
from nestcli.data.dataset import NoiseBatch
from nestcli.errors import RunFailedError
from nestcli.model.module import NestModule
from nestcli.model.optim import build_optimizer
from nestcli.training.settings import Length, trainer_options

_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "out of memory")
# Of kernels whose index has 32 bits, on tensors of more than 2^31 elements: the sub-sampling's of a very large batch.
_TOO_LARGE = ("canuse32bitindexmath", "int_max", "32-bit index", "cudnn_status_not_supported")
_SHARE = {"cuda": 0.9, "cpu": 0.8}
_SMALL = (1, 1.0)  # clips, seconds of a first step, which allocates all permanent memory


class TrainingStep:
    """The model, its optimizer and the trainer's precision on one device, within `memory` bytes."""

    def __init__(self, config: DictConfig, device: str, memory: int) -> None:
        self.device, self.memory = torch.device(device), memory
        self.sample_rate = int(config.model.sample_rate)
        _limit(self.device, memory)
        one = {"devices": 1, "num_nodes": 1, "accelerator": "gpu" if self.device.type == "cuda" else "cpu"}
        config = OmegaConf.merge(config, {"trainer": one})  # type: ignore[assignment]
        options = trainer_options(config, Length(None, 1, 1, 1), validates=False)
        self.precision = Trainer(**options, logger=False, enable_checkpointing=False).precision_plugin
        self.clip = config.trainer.gradient_clip_val
        try:
            self.model = NestModule(config).model.to(self.device).train()
            self.optimizer = build_optimizer(self.model, config)
            self._step(*_SMALL)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunFailedError(f"the model and its optimizer alone need more than {memory >> 20:,} MiB.") from None

    def attempt(self, batch: int, seconds: float) -> dict[str, Any]:
        """Try a step; return if it fitted, its share of the free memory, its seconds, and its peak in bytes."""
        before = self._peak_after_reset()
        start = time.perf_counter()
        try:
            self._step(batch, seconds)
            wait_for(self.device)
        except (RuntimeError, MemoryError) as error:
            if not (is_out_of_memory(error) or is_too_large(error)):
                raise
            failed = True
        else:
            failed = False
        if failed:  # outside the except block, whose traceback keeps the tensors alive
            self.optimizer.zero_grad()
            self._free()
            self._step(*_SMALL)  # gradients stay between steps, so that the next trial needs memory for them too
            return {"fits": False}
        elapsed, peak = time.perf_counter() - start, peak_memory(self.device)
        self._free()
        used = (peak - before) / max(1, self.memory - before)
        return {"fits": True, "used": used, "seconds": elapsed, "peak": peak}

    def _step(self, clips: int, seconds: float) -> None:
        """Run a step in Lightning's order: the previous gradients are freed after the forward pass."""
        batch = _noise(clips, round(seconds * self.sample_rate)).to(self.device)
        with self.precision.forward_context():
            output = self.model(batch.audio, batch.audio_len, batch.noisy_audio, batch.noisy_audio_len)
        self.optimizer.zero_grad()
        scaler = getattr(self.precision, "scaler", None)
        (output.loss if scaler is None else scaler.scale(output.loss)).backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    # ---- memory ----

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            with suppress(OSError, AttributeError):  # glibc only
                ctypes.CDLL(None).malloc_trim(0)

    def _peak_after_reset(self) -> int:
        """Reset the peak; return the bytes in use now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return int(memory_of("self")["resident"])


def default_memory(device: str) -> int:
    """Return the bytes to use: 90% of a GPU's free memory, 80% of the free main memory. The rest is a margin."""
    if device == "cuda":
        return int(_SHARE[device] * torch.cuda.mem_get_info()[0])
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        available = int(rows["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(_SHARE[device] * available)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that an allocator, of any library, ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error).lower() for words in _NO_MEMORY)


def is_too_large(error: BaseException) -> bool:
    """Return True if an error means that a tensor has more elements than a kernel can count."""
    return any(words in str(error).lower() for words in _TOO_LARGE)


def _limit(device: torch.device, memory: int) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / total), device)
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (memory if hard < 0 else min(memory, hard), hard))


def _noise(clips: int, samples: int) -> NoiseBatch:
    """Return a batch of full-length clips, which takes the most memory in its bucket."""
    audio, noise = 0.1 * torch.randn(clips, samples), 0.1 * torch.randn(clips, samples)
    lengths = torch.full((clips,), samples)
    return NoiseBatch(audio, lengths, noise, lengths, audio + noise, lengths)
