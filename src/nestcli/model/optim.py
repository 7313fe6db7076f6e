"""Optimiser and learning rate: AdamW in one parameter group, Noam annealing."""

from __future__ import annotations

import math

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nestcli.config import section
from nestcli.model.config import OptimizerConfig, ScheduleConfig


class NoamAnnealing(LRScheduler):
    """Noam annealing: lr(s) = factor * d_model^-0.5 * min(s^-0.5, s * warmup^-1.5).

    The rate is at least `min_lr` after the warm-up. Steps 0 and 1 have the same rate.
    Source: Attention Is All You Need (arXiv:1706.03762 section 5.3); NeMo `NoamAnnealing`.
    """

    def __init__(self, optimizer: Optimizer, *, d_model: int, warmup_steps: int, min_lr: float) -> None:
        self.d_model, self.warmup_steps, self.min_lr = d_model, warmup_steps, min_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        step = max(1, self.last_epoch)
        rising = step * self.warmup_steps**-1.5 if self.warmup_steps else math.inf
        share = self.d_model**-0.5 * min(step**-0.5, rising)
        floor = self.min_lr if step > self.warmup_steps else 0.0
        return [max(factor * share, floor) for factor in self.base_lrs]


def build_optimizer(model: nn.Module, config: DictConfig) -> AdamW:
    """Build AdamW with every parameter in one group, as in NeMo: biases, norms and frozen parameters included."""
    optim = section(OptimizerConfig, config, "model.optim")
    parameters = list(model.parameters())
    clips_scaled = bool(config.trainer.gradient_clip_val) and "mixed" in str(config.trainer.precision)
    fused = not clips_scaled  # Lightning refuses fused AdamW with clipping in 16-mixed
    beta1, beta2 = optim.betas
    return AdamW(parameters, lr=optim.lr, betas=(beta1, beta2), weight_decay=optim.weight_decay, fused=fused)


def build_schedule(optimizer: Optimizer, config: DictConfig, max_steps: int) -> NoamAnnealing:
    """Build Noam annealing, stepped once per optimiser step."""
    sched = section(ScheduleConfig, config, "model.optim.sched")
    return NoamAnnealing(optimizer, d_model=sched.d_model, warmup_steps=sched.warmup(max_steps), min_lr=sched.min_lr)
