"""The sections `config` and `parameters`: compare the configuration file and the structure of the model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from nestcli.config import BASE, leaves, load_config, raw_config, resolved
from nestcli.model.count import skeleton
from nestcli.model.nest import NestModel
from nestcli.parity.context import Context
from nestcli.parity.nemo import FACTS, NotRecordedError
from nestcli.parity.report import Check, Section, close, equal, same_entries, worst
from nestcli.parity.subject import nemo_model_block, with_nemo_behaviour

# The table at the top of NeMo's file: the presets that NeMo has too.
SIZES: dict[str, dict[str, Any]] = json.loads((FACTS / "presets.json").read_text(encoding="utf-8"))
_ROUNDING = 1e-9  # tolerance for float64 sums of equal values in a different order


# ---- config ------------------------------------------------------------------------------------------------------


def config_section(context: Context, section: Section) -> None:
    """Compare every key of NeMo's nest_fast-conformer.yaml, and the sizes of the models listed at its top."""
    theirs, source = _file_of_nemo(context)
    ours = dict(leaves(raw_config(BASE)))
    blocks = list(dict.fromkeys(_block(key) for key in [*theirs, *ours]))
    for block in blocks:
        sides = ({key: value for key, value in side.items() if _block(key) == block} for side in (ours, theirs))
        section.add(same_entries(block, *sides, note=source))
    for preset, sizes in SIZES.items():
        chosen = load_config(preset).model.encoder
        section.add(same_entries(f"sizes of {preset}", {key: chosen[key] for key in sizes}, sizes))


def departures(config: DictConfig) -> list[str]:
    """Return the model settings whose values in a configuration differ from NeMo's file."""
    base, chosen = dict(leaves(resolved(load_config(BASE)))), dict(leaves(resolved(config)))
    elsewhere = ("model.train_ds", "model.validation_ds", "model.optim")
    follows = {key for key, value in leaves(raw_config(BASE)) if isinstance(value, str) and "${" in value}
    changed = [key for key in base if key.startswith("model.") and chosen.get(key) != base[key] and key not in follows]
    return [f"{key}={chosen.get(key)}" for key in changed if not key.startswith(elsewhere)]


def _file_of_nemo(context: Context) -> tuple[dict[str, Any], str]:
    if context.nemo.live:
        shipped = context.nemo.ask("shipped_yaml").facts["yaml"]
        if shipped is not None:
            return dict(leaves(shipped)), "against the file of this NeMo"
    recorded = json.loads((FACTS / "config.json").read_text(encoding="utf-8"))
    return dict(
        leaves(recorded)
    ), "against the recorded keys and values of 3.0.0's file, which its wheel does not contain"


def _block(key: str) -> str:
    parts = key.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


# ---- parameters --------------------------------------------------------------------------------------------------


def parameters_section(context: Context, section: Section) -> None:
    """Compare names, shapes, types, order and counts for every preset and the configuration, and initial weights."""
    for preset in SIZES:
        section.add(*_same_structure(context, preset, load_config(preset)))
    if context.name not in SIZES or _is_changed(context):
        try:
            section.add(*_same_structure(context, context.name, context.config))
        except NotRecordedError:
            note = "not recorded for this configuration; --nemo compares it with a live NeMo"
            section.add(Check(context.name, True, _total(skeleton(context.config)), None, note=note))
    section.add(_initial_weights(context))


def _is_changed(context: Context) -> bool:
    return nemo_model_block(context.config) != nemo_model_block(load_config(context.name))


def _same_structure(context: Context, name: str, config: DictConfig) -> Iterable[Check]:
    config, _ = with_nemo_behaviour(config)
    theirs = context.nemo.ask("structure", {"model": nemo_model_block(config)}).facts
    model = skeleton(config)
    entries = {key: [list(value.shape), str(value.dtype)[6:]] for key, value in model.state_dict().items()}
    sizes = {key: [value.numel(), value.requires_grad] for key, value in model.named_parameters()}
    their_sizes = {key: [count, trainable] for key, count, trainable in theirs["parameters"]}
    their_entries = {key: [shape, kind] for key, shape, kind in theirs["entries"]}
    yield same_entries(f"{name}: names, shapes, types and order of the state dict", entries, their_entries)
    yield same_entries(f"{name}: parameters, trainable or frozen", sizes, their_sizes)
    yield same_entries(f"{name}: numbers by module", _sums(sizes, 1), _sums(their_sizes, 1))
    layers, their_layers = _sums(sizes, 3), _sums(their_sizes, 3)
    yield same_entries(f"{name}: numbers by layer", layers, their_layers)
    yield equal(f"{name}: number of parameters", _total(model), sum(count for count, _ in their_sizes.values()))


def _total(model: NestModel) -> int:
    return sum(value.numel() for value in model.parameters())


def _sums(sizes: Mapping[str, Any], depth: int) -> dict[str, int]:
    """Return the number of parameters by the first parts of their names, such as encoder.layers.3."""
    sums: Counter[str] = Counter()
    for name, (count, _) in sizes.items():
        sums[".".join(re.split(r"\.", name)[:depth])] += count
    return dict(sums)


def _initial_weights(context: Context) -> Check:
    """Compare initial weights from the same seed: digests show bit equality, sums work across different processors."""
    ours, theirs = context.subject.initial, context.built.facts["weights"]
    names = same_entries("initial weights", dict.fromkeys(ours), dict.fromkeys(theirs))
    if not names.passed:
        return names
    equal_bits = sum(ours[name][2] == theirs[name][2] for name in ours)
    checks = [
        close(name, torch.tensor(ours[name][:2]), torch.tensor(theirs[name][:2]), _ROUNDING, relative=True)
        for name in ours
    ]
    return worst(
        "initial weights from the same seed", checks, note=f"{equal_bits} of {len(ours)} tensors equal to the last bit"
    )
