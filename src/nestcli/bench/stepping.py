"""Training steps for timing: a model, its optimizer and one batch, without a loader and without Lightning's loop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nestcli.bench.side import memory_of
from nestcli.data.datamodule import NestDataModule
from nestcli.errors import NestError
from nestcli.model.config import NestConfig
from nestcli.model.cost import batch_work
from nestcli.model.module import NestModule
from nestcli.model.nest import NestOutput
from nestcli.model.optim import build_optimizer
from nestcli.training.settings import Length, NestBlock, trainer_options

_KINDS = {  # PyTorch operators by kind, for the profile of a step
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise"),
    "convolutions": ("convolution",),
    "compiled layers": ("CompiledFxGraph", "CompiledFunction", "triton_", "cpp_fused"),
    "random numbers": ("bernoulli", "rand", "normal_", "uniform_"),
    "optimiser": ("adamw", "AdamW"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::_to_copy", "aten::stack"),
}
# Rows and columns of the matrix products that measure the device's speed, and the maximum seconds of one.
_SMALLEST_PRODUCT, _LARGEST_PRODUCT, _PRODUCT_SECONDS = 256, 16384, 0.2


class Stepper:
    """Runs steps of the configuration's model in its precision, on `device`.

    If the files `weights` and `batch` do not exist, the weights and a batch of `clips` of `seconds` each are drawn from
    a seed and written there, so that both sides of a comparison read the same values.
    """

    def __init__(self, parameters: dict[str, Any]) -> None:
        config = DictConfig(parameters["config"])
        self.device = torch.device(parameters["device"])
        NestBlock.of(config).use_matmul_precision()
        one = {"devices": 1, "num_nodes": 1, "accelerator": "gpu" if self.device.type == "cuda" else "cpu"}
        fixed = {"lr": parameters["learning_rate"]}
        config = OmegaConf.merge(config, {"trainer": one, "model": {"optim": fixed}})  # type: ignore[assignment]
        assert isinstance(config, DictConfig)
        self.config = config
        options = trainer_options(config, Length(None, 1, 1, 1), validates=False)
        self.precision = Trainer(**options, logger=False, enable_checkpointing=False).precision_plugin
        self.nest = NestConfig.from_config(config)
        self.model = NestModule(config).model
        weights, batch = Path(parameters["weights"]), Path(parameters["batch"])
        if not weights.exists():
            save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, weights)
        if not batch.exists():
            save_file(_drawn(parameters["clips"], parameters["seconds"], self.nest), batch)
        self.model.load_state_dict(load_file(weights))
        self.model = self.model.to(self.device).train()
        self.batch = {name: value.to(self.device) for name, value in load_file(batch).items()}
        self.optimizer = build_optimizer(self.model, config)

    def step(self, seed: int) -> float:
        """Run forward, backward and update; return the loss."""
        torch.manual_seed(seed)
        output = self._updated(*(self.batch[name] for name in ("clean", "clean_len", "noisy", "noisy_len")))
        self._selected = int(output.selected)
        return float(output.loss.detach())

    def fed(self, steps: int) -> dict[str, float]:
        """Run steps on batches from the training loader, after one to start it; return seconds and seconds of audio."""
        data = NestDataModule(self.config)
        data.batches, data.device = steps + 1, self.device
        samples, start = torch.zeros((), dtype=torch.int64, device=self.device), 0.0
        for number, made in enumerate(data.train_dataloader()):
            if isinstance(made, NestError):
                raise made
            batch = made.to(self.device)
            self._updated(batch.audio, batch.audio_len, batch.noisy_audio, batch.noisy_audio_len)
            if number == 0:
                wait_for(self.device)
                start = time.perf_counter()
            else:
                samples += batch.audio_len.sum()  # read at the end: it would make every step wait
        wait_for(self.device)
        return {"seconds": time.perf_counter() - start, "audio_seconds": int(samples) / data.sample_rate}

    def _updated(self, *waveforms: Tensor) -> NestOutput:
        with self.precision.forward_context():
            output: NestOutput = self.model(*waveforms)
        output.loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()  # as in training: frees the gradients' memory for the next forward pass
        return output

    def tokens(self, features_BDT: Tensor) -> Tensor:
        tokens: Tensor = self.model.quantizer(features_BDT)
        return tokens

    def facts(self) -> dict[str, Any]:
        return {
            "threads": torch.get_num_threads(),
            "seconds_of_audio": float(self.batch["clean_len"].sum()) / self.nest.preprocessor.sample_rate,
        }

    def profile(self) -> dict[str, Any]:
        """Return a step's seconds by kind of operator, its floating-point operations, and the device's speed."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as record:
            self.step(0)
        spent = dict.fromkeys([*_KINDS, "everything else"], 0.0)
        for event in record.key_averages():
            kind = next((kind for kind, names in _KINDS.items() if any(name in event.key for name in names)), None)
            own = event.self_device_time_total if self.device.type == "cuda" else event.self_cpu_time_total
            spent[kind or "everything else"] += own / 1e6
        peak = peak_memory(self.device)
        clips, samples = self.batch["clean"].shape
        work = batch_work(self.nest, samples, clips, self._selected / self.nest.quantizer.num_books)
        return {
            "seconds_by_kind": spent,
            "floating_point_operations": sum(part.step for part in work.values()),
            "device_operations_a_second": self._fastest(),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "peak_memory_bytes": peak,
        }

    def _fastest(self) -> float:
        """Measure floating-point operations per second of a large matrix product in the precision of training."""
        with self.precision.forward_context():
            dtype = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        dtype = dtype or self.model.decoder.layer.weight.dtype
        size, best, shortest = _SMALLEST_PRODUCT, 0.0, 0.0
        while size <= _LARGEST_PRODUCT and 8 * shortest < _PRODUCT_SECONDS:  # some CPUs take minutes in fp16
            factor = torch.randn(size, size, device=self.device).to(dtype)
            shortest = min(self._seconds_of_product(factor) for _ in range(5))
            best = max(best, 2 * size**3 / shortest)
            size *= 2
        return best

    def _seconds_of_product(self, factor: Tensor) -> float:
        wait_for(self.device)
        start = time.perf_counter()
        _ = factor @ factor
        wait_for(self.device)
        return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Return the largest number of bytes in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(memory_of("self")["peak"])  # type: ignore[no-untyped-call]


def wait_for(device: torch.device) -> None:
    """Wait until the GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _drawn(clips: int, seconds: float, nest: NestConfig) -> dict[str, Tensor]:
    """Draw a batch of noise and features from a fixed seed: the cost of a step does not depend on the content."""
    generator = torch.Generator().manual_seed(0)
    samples = round(seconds * nest.preprocessor.sample_rate)
    clean = 0.1 * torch.randn(clips, samples, generator=generator)
    noisy = clean + 0.05 * torch.randn(clips, samples, generator=generator)
    lengths = torch.full((clips,), samples)
    steps = nest.quantizer.combine_time_steps
    frames = -(-samples // nest.preprocessor.hop_length // steps) * steps
    features = torch.randn(clips, nest.quantizer.feat_in, frames, generator=generator)  # full windows, without padding
    return {"clean": clean, "clean_len": lengths, "noisy": noisy, "noisy_len": lengths.clone(), "features": features}
