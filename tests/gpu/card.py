"""Marks of the tests for a GPU, and training steps for them; they also run on a processor (NEST_GPU_TESTS=cpu)."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lightning.pytorch import Trainer

from nestcli.config import load_config
from nestcli.model import fast, quantizer
from nestcli.model.module import NestModule
from nestcli.model.optim import build_optimizer
from nestcli.training.settings import Length, trainer_options

MARKS = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # on a GPU, PyTorch, Triton and Lightning give warnings of their own
]
REHEARSED = os.environ.get("NEST_GPU_TESTS") == "cpu"
THIN = [
    "model.encoder.d_model=32", "model.encoder.n_heads=2", "model.num_classes=64",
    "model.encoder.subsampling_conv_channels=16",
]  # fmt: skip


@cache
def measures() -> ModuleType:
    """Return docs/gpu/measure.py."""
    path = Path(__file__).parents[2] / "docs" / "gpu" / "measure.py"
    spec = importlib.util.spec_from_file_location("gpu_measure", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys_of(device: torch.device) -> list[str]:
    return ["trainer.devices=1", f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}"]


def choose_gpu_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a processor take the variants of a GPU, so that a rehearsal compares two ways of computing."""
    for module in (fast, quantizer):
        monkeypatch.setattr(module, "on_a_gpu", lambda _: True)


class Steps:
    """Training steps of a preset, as `nest pretrain` takes them, on three clips of noise."""

    def __init__(self, device: torch.device, preset: str, words: Sequence[str]) -> None:
        config = load_config(preset, [*keys_of(device), *words])
        options = trainer_options(config, Length(None, 1, 1, 1), validates=False)
        self.precision = Trainer(**options, logger=False, enable_checkpointing=False).precision_plugin
        self.model = NestModule(config).model.to(device).train()
        self.optimizer = build_optimizer(self.model, config)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        drawn = torch.Generator().manual_seed(5)
        self.clean = (0.1 * torch.randn(3, 64_000, generator=drawn)).to(device)
        self.noisy = self.clean + (0.05 * torch.randn(3, 64_000, generator=drawn)).to(device)
        self.lengths = torch.tensor([64_000, 60_000, 40_000]).to(device)

    def forward(self, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with self.precision.forward_context():
            return self.model(self.clean, self.lengths, self.noisy, self.lengths).loss

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
