"""The section `checkpoint`: exchange .nemo files in both directions and compare the models."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nestcli.checkpoint.nemo import read_nemo, write_nemo
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel, NestOutput
from nestcli.parity.context import Context
from nestcli.parity.report import Check, Section, close, equal, same_entries, worst
from nestcli.parity.subject import with_nemo_behaviour

LOSS = 1e-6  # tolerance, relative
_SEED = 13


def checkpoint_section(context: Context, section: Section) -> None:
    """Check that we restore NeMo's archive, and NeMo ours, with the same weights and loss."""
    subject = context.subject
    _ = context.built
    reference = _loss(subject.model, subject.waveforms)
    state = dict(subject.model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nemo.nemo"
        context.nemo.ask("save")["archive"].numpy().tofile(path)
        config, restored = read_nemo(path)
        config, _notes = with_nemo_behaviour(config)
        model = NestModel(NestConfig.from_config(config))
        model.load_state_dict(restored, strict=True)
        section.add(same_entries("NeMo's archive: names and order", dict.fromkeys(state), dict.fromkeys(restored)))
        section.add(worst("NeMo's archive: weights", [close(key, restored[key], state[key], 0.0) for key in state]))
        section.add(_same_loss("NeMo's archive: loss", _loss(model, subject.waveforms), reference))

        ours = Path(folder) / "ours.nemo"
        write_nemo(ours, subject.config, state)
        section.add(_ours_in_nemo(context, ours, reference) if context.nemo.live else _ours_again(ours, state))


def _ours_in_nemo(context: Context, path: Path, reference: Tensor) -> Check:
    archive = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    theirs = context.nemo.ask("restore", {"seed": _SEED}, {"archive": archive, **context.subject.batch})
    differing = equal("weights", [], theirs.facts["differing"])
    loss = _same_loss("our archive in NeMo: weights and loss", reference, theirs["loss"].reshape(()))
    return loss if differing.passed else Check(loss.name, False, 0, len(differing.nemo), None, 0.0, differing.where)


def _ours_again(path: Path, state: dict[str, Tensor]) -> Check:
    _, restored = read_nemo(path)
    checks = [close(name, restored[name], state[name], 0.0) for name in state]
    return worst("our archive: weights", checks, note="read back by us; a live NeMo restores it with --nemo")


@torch.no_grad()
def _loss(model: NestModel, waveforms: tuple[Tensor, ...]) -> Tensor:
    model.eval()
    torch.manual_seed(_SEED)
    output: NestOutput = model(*(value.clone() for value in waveforms))
    return output.loss


def _same_loss(name: str, ours: Tensor, nemo: Tensor) -> Check:
    return close(name, ours, nemo, LOSS, relative=True)
