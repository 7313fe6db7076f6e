"""Training steps of the presets: time, utilisation, memory and waits; options: `plain` or `compiled`.

A step is that of `nest pretrain` without a loader and without Lightning's loop: forward, backward, fused AdamW.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from measure import Facts, Task, free_memory, noted_waits, peak, start_peak, wait_for
from torch.profiler import ProfilerActivity, profile

from nestcli.config import load_config
from nestcli.model.config import NestConfig
from nestcli.model.cost import batch_work, peak_of
from nestcli.model.module import NestModule
from nestcli.model.optim import build_optimizer
from nestcli.training.settings import Length, NestBlock, trainer_options

BF16, TF32 = "bf16-mixed", "tf32"
_KERNELS = 15
THIN = (
    "model.encoder.d_model=32", "model.encoder.n_heads=2", "model.encoder.n_layers=2", "model.num_classes=64",
    "model.encoder.subsampling_conv_channels=16",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Batches in seconds of audio, by preset and precision in the order in which they are measured."""

    groups: tuple[tuple[str, str, tuple[float, ...]], ...]
    clip_seconds: float
    steps: int
    seconds: float  # maximum of the timed steps of a row
    words: tuple[str, ...] = ()


FULL = Sizes(
    (
        ("large", BF16, (600,)), ("small", BF16, (1200, 600, 300)), ("large", BF16, (1200, 300)),
        ("large", TF32, (600, 1200, 300)), ("small", TF32, (1200, 600, 300)),
    ),
    clip_seconds=15.0, steps=10, seconds=1.5,
)  # fmt: skip
TOY = Sizes(
    (("large", BF16, (6,)), ("small", TF32, (3,))), clip_seconds=1.5, steps=2, seconds=0.5, words=THIN
)  # fmt: skip


class Stepper:
    """A model with its optimizer, and steps on a batch of noise."""

    def __init__(self, task: Task, preset: str, precision: str, *, compiled: bool, words: Sequence[str]) -> None:
        torch.set_float32_matmul_precision("highest")  # the defaults, which an earlier model may have changed
        torch.backends.cudnn.allow_tf32 = True
        keys = ["nest.matmul_precision=high"] if precision == TF32 else [f"trainer.precision={precision}"]
        config = load_config(
            preset, [*keys, f"model.encoder.compile={str(compiled).lower()}", *task.accelerator, *words]
        )
        NestBlock.of(config).use_matmul_precision()
        options = trainer_options(config, Length(None, 1, 1, 1), validates=False)
        self.device, self.precision = task.device, precision
        self.forward_context = Trainer(**options, logger=False, enable_checkpointing=False).precision_plugin
        self.nest = NestConfig.from_config(config)
        self.model = NestModule(config).model.to(self.device).train()
        self.optimizer = build_optimizer(self.model, config)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self._number = 0

    def draw(self, seconds: float, clip_seconds: float) -> None:
        """Draw a batch of noise, and drop what a step that ran out of memory has left."""
        self.optimizer.zero_grad()
        clips, samples = round(seconds / clip_seconds), round(clip_seconds * self.nest.preprocessor.sample_rate)
        self.clean_BN = 0.1 * torch.randn(clips, samples, device=self.device)
        self.noisy_BN = self.clean_BN + 0.05 * torch.randn_like(self.clean_BN)
        self.len_B = torch.full((clips,), samples, device=self.device)

    def step(self) -> Any:
        self._number += 1
        torch.manual_seed(self._number)
        with self.forward_context.forward_context():
            output = self.model(self.clean_BN, self.len_B, self.noisy_BN, self.len_B)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output

    def work(self, output: Any) -> float:
        """Return the floating-point operations of a step."""
        clips, samples = self.clean_BN.shape
        selected = int(output.selected) / self.nest.quantizer.num_books
        return sum(part.step for part in batch_work(self.nest, samples, clips, selected).values())


def measured(stepper: Stepper, sizes: Sizes, seconds: float) -> Facts:
    """Measure steps on one batch: time, utilisation, peak memory, waits of the host."""
    device = stepper.device
    stepper.draw(seconds, sizes.clip_seconds)
    start_peak(device)
    began = time.perf_counter()
    stepper.step()
    wait_for(device)
    first = time.perf_counter() - began
    stepper.step()
    with noted_waits(device) as waits:
        output = stepper.step()
    taken: list[float] = []
    while len(taken) < sizes.steps and sum(taken) < sizes.seconds:
        wait_for(device)
        began = time.perf_counter()
        output = stepper.step()
        wait_for(device)
        taken.append(time.perf_counter() - began)
    step = statistics.median(taken)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    sheet = peak_of(name, stepper.precision, tf32=stepper.precision == TF32)
    return {
        "step_seconds": step,
        "audio_per_second": seconds / step,
        "mfu": stepper.work(output) / step / sheet if sheet else None,
        "peak_bytes": peak(device),
        "waits": len(waits),
        "waited_for": sorted(set(waits)),
        "first_step_seconds": first,
        "loss": float(output.loss.detach()),
    }


def profiled(stepper: Stepper) -> Facts:
    """Return the kernels that take most of a step's time; operators on a processor."""
    on_gpu = stepper.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        stepper.step()
        wait_for(stepper.device)
    times: dict[str, tuple[float, int]] = {}
    for event in record.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0 and (not on_gpu or "CUDA" in str(event.device_type)):
            times[event.key] = (own / 1e6, event.count)
    total = sum(seconds for seconds, _ in times.values())
    first = sorted(times.items(), key=lambda each: -each[1][0])[:_KERNELS]
    return {
        "kernels": [
            {"name": name[:120], "seconds": seconds, "share": seconds / total, "calls": calls}
            for name, (seconds, calls) in first
        ],
        "kernel_seconds": total,
    }


def main() -> None:
    task = Task.given()
    sizes, compiled = TOY if task.rehearse else FULL, "compiled" in task.options
    kept: dict[tuple[str, str], Stepper] = {}
    groups = sizes.groups[:1] if task.rehearse and compiled else sizes.groups  # one compilation is enough to rehearse
    for number, (preset, precision, batches) in enumerate(groups):
        for seconds in batches:
            name = f"{preset} {precision} {'compiled' if compiled else 'plain'} {seconds:g} s"

            def row(preset: str = preset, precision: str = precision, seconds: float = seconds) -> Facts:
                if (preset, precision) not in kept:
                    kept.clear()  # one model at a time, so that the peak is its own
                    free_memory(task.device)
                    kept[preset, precision] = Stepper(task, preset, precision, compiled=compiled, words=sizes.words)
                return measured(kept[preset, precision], sizes, seconds)

            task.measure(name, row)
        if number == 0 and not compiled and kept:
            task.measure(f"profile of {name}", lambda: profiled(next(iter(kept.values()))))


if __name__ == "__main__":
    main()
