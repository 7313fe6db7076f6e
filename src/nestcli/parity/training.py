"""The section `training`: the same optimiser steps on both sides, from the same weights on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from nestcli.config import resolved
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel
from nestcli.model.optim import build_optimizer, build_schedule
from nestcli.parity.context import Context
from nestcli.parity.network import stirred
from nestcli.parity.report import ROUNDINGS, Check, Section, close_in_norm, equal, same_entries, worst
from nestcli.parity.subject import nemo_model_block
from nestcli.parity.worker import optimizer_settings

STEPS = 20
LOSS, WEIGHTS = 1e-5, 1e-4  # tolerances, relative
_WARMUP, _PEAK = 8, 2e-4  # chosen so that twenty steps cover the rise and the fall, and the weights move
_BATCHES = 4
_SECONDS = 2.5  # of each utterance


def training_section(context: Context, section: Section) -> None:
    """Compare twenty steps without dropout: losses, learning rates, and the weights afterwards."""
    subject = context.subject
    _ = context.built
    config = _without_dropout(subject.config)
    batches = _batches(subject.batch, int(subject.config.model.sample_rate))
    seeds = [100 + step for step in range(STEPS)]
    request = {
        "model": nemo_model_block(config),
        "optim": resolved(config)["model"]["optim"],
        "seeds": seeds,
        "batches": len(batches),
    }
    given = {f"{number}.{name}": value for number, batch in enumerate(batches) for name, value in batch.items()}
    theirs = context.nemo.ask("train", request, given)
    model, losses, rates, settings = _trained(config, subject.model, batches, seeds)

    section.add(same_entries("optimiser and its settings", settings, theirs.facts["settings"]))
    section.add(equal("learning rates", rates, theirs.facts["rates"]))
    stirred_model, stirred_losses, *_ = _trained(config, stirred(subject.fresh(train=True)), batches, seeds)
    section.add(_same_losses(losses, stirred_losses, theirs.facts["losses"]))
    states = (model.state_dict(), stirred_model.state_dict(), theirs.under("state."))
    section.add(*_same_weights(*states, _moved(model, subject.model)))


def _without_dropout(config: DictConfig) -> DictConfig:
    config = copy.deepcopy(config)
    for key in ("dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att", "stochastic_depth_drop_prob"):
        config.model.encoder[key] = 0.0
    sched = config.model.optim.sched
    sched.warmup_steps, sched.warmup_ratio = _WARMUP, None
    sched.min_lr = 1e-6
    config.model.optim.lr = _PEAK * float(sched.d_model * _WARMUP) ** 0.5
    return config


def _batches(batch: dict[str, Tensor], sample_rate: int) -> list[dict[str, Tensor]]:
    """Return small batches of two utterances each, cut at different places."""
    made = []
    longest = int(_SECONDS * sample_rate)
    for number in range(_BATCHES):
        rows = [number % len(batch["clean"]), (number + 1) % len(batch["clean"])]
        start = 400 * number
        cut: dict[str, Tensor] = {}
        for side in ("clean", "noisy"):
            cut[side] = batch[side][rows, start : start + longest]
            cut[f"{side}_len"] = (batch[f"{side}_len"][rows] - start).clamp(1600, cut[side].size(1))
        made.append(cut)
    return made


def _trained(
    config: DictConfig, model: NestModel, batches: list[dict[str, Tensor]], seeds: list[int]
) -> tuple[NestModel, list[float], list[float], dict[str, Any]]:
    """Run our training step, written out: forward, backward, AdamW, Noam annealing."""
    ours = NestModel(NestConfig.from_config(config))
    ours.load_state_dict(model.state_dict())
    ours.train()
    optimizer = build_optimizer(ours, config)
    schedule = build_schedule(optimizer, config, len(seeds))
    settings = optimizer_settings(optimizer)
    losses, rates = [], []
    for number, seed in enumerate(seeds):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        batch = batches[number % len(batches)]
        torch.manual_seed(seed)
        output = ours(*(batch[name].clone() for name in ("clean", "clean_len", "noisy", "noisy_len")))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(output.loss.detach()))
    return ours, losses, rates, settings


def _same_losses(ours: list[float], stirred_ours: list[float], theirs: list[float]) -> Check:
    """Compare losses as shares of NeMo's loss; allow ten times our own rounding so far where that is more."""
    ours_S, stirred_S, theirs_S = (torch.tensor(side, dtype=torch.float64) for side in (ours, stirred_ours, theirs))
    rounding_S = (ours_S - stirred_S).abs().cummax(0).values
    shares_S = (ours_S - theirs_S).abs() / torch.maximum(theirs_S, ROUNDINGS * rounding_S / LOSS)
    beyond = (~(shares_S <= LOSS)).nonzero().flatten().tolist()  # NaN is beyond, too
    step = beyond[0] if beyond else int(shares_S.argmax())
    where = f"first at step {step}: ours {ours[step]:.7g}, NeMo's {theirs[step]:.7g}" if beyond else None
    note = f"loss from {ours[0]:.3f} to {ours[-1]:.3f}; our own rounding moves it by {float(rounding_S.max()):.1e}"
    name = f"losses of {STEPS} steps"
    return Check(name, not beyond, ours[step], theirs[step], float(shares_S[step]), LOSS, where, note)


def _same_weights(
    ours: Mapping[str, Tensor], moved: Mapping[str, Tensor], theirs: Mapping[str, Tensor], note: str
) -> list[Check]:
    """Compare all weights and running statistics, together and one by one.

    `moved` are ours after a run from weights changed in their last bits. Adam divides by the gradient's size, so it
    turns rounding into full steps where a gradient is almost zero.
    """
    names = [name for name, value in ours.items() if value.is_floating_point()]
    checks, decided = [], []
    for name in names:
        rounding = float((moved[name].double() - ours[name].double()).norm())
        if ROUNDINGS * rounding > WEIGHTS * float(ours[name].double().norm()):
            decided.append(name)
        checks.append(close_in_norm(name, ours[name], theirs[name], WEIGHTS, rounding=rounding))
    firm = [name for name in names if name not in decided]
    ours_W, theirs_W = (torch.cat([side[name].flatten().double() for name in firm]) for side in (ours, theirs))
    label = f"rounding decides {len(decided)}, such as {decided[0]}" if decided else None
    return [
        close_in_norm("weights and running statistics, together", ours_W, theirs_W, WEIGHTS, note=note),
        worst("weights and running statistics, one by one", checks, note=label),
    ]


def _moved(after: NestModel, before: NestModel) -> str:
    sides = [torch.cat([value.detach().flatten() for value in model.encoder.parameters()]) for model in (after, before)]
    return f"the encoder's weights moved by {float((sides[0] - sides[1]).norm() / sides[1].norm()):.1%}"
