"""`nest compare` as a function: run the sections in order; an error in one does not stop the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from nestcli.config import load_config
from nestcli.errors import NestError
from nestcli.parity.archive import checkpoint_section
from nestcli.parity.context import Context
from nestcli.parity.differences import known_differences
from nestcli.parity.inputs import masking_section, preprocessor_section, quantizer_section
from nestcli.parity.mixing import augmentation_section
from nestcli.parity.nemo import FACTS, Nemo, NemoRaisedError
from nestcli.parity.network import decoder_section, encoder_section, gradients_section, loss_section
from nestcli.parity.report import SECTIONS, Check, Report, Section
from nestcli.parity.structure import config_section, departures, parameters_section
from nestcli.parity.subject import Subject, audio_of_files, made_audio, make_batch, make_subject, with_nemo_behaviour
from nestcli.parity.training import training_section

_SECTIONS: dict[str, Callable[[Context, Section], None]] = {
    "config": config_section,
    "parameters": parameters_section,
    "preprocessor": preprocessor_section,
    "masking": masking_section,
    "quantizer": quantizer_section,
    "encoder": encoder_section,
    "decoder": decoder_section,
    "loss": loss_section,
    "gradients": gradients_section,
    "training": training_section,
    "augmentation": augmentation_section,
    "checkpoint": checkpoint_section,
}
assert tuple(_SECTIONS) == SECTIONS

RECORDED_MODEL = (
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=2", "model.num_classes=64",
    "model.code_dim=4", "model.encoder.subsampling_conv_channels=8", "model.encoder.ff_expansion_factor=2",
    "model.masking.block_size=16", "model.masking.mask_prob=0.04",
)  # fmt: skip
VERSION = "3.0.0"


@dataclass(frozen=True)
class Request:
    """A request to compare: a configuration, weights if it comes from a checkpoint, audio files, sections."""

    name: str
    config: DictConfig
    state: Mapping[str, Tensor] | None = None
    audio: Sequence[Path] = ()
    only: Sequence[str] = ()


def compare(request: Request, nemo: Nemo, started: Callable[[int, int, str], None] | None = None) -> Report:
    """Run the sections; call `started(number, total, name)` before each. Raises NestError."""
    context = live_context(request, nemo) if nemo.live else recorded_context(request, nemo)
    wanted = [name for name in SECTIONS if not request.only or name in request.only]
    sections = []
    for number, name in enumerate(wanted):
        if started is not None:
            started(number, len(wanted), name)
        sections.append(_run(name, context))
    return Report(
        config=request.name,
        nemo_version=nemo.version,
        live=nemo.live,
        sections=sections,
        known_differences=known_differences(context, prove=not request.only),
        notes=_notes(request, nemo),
    )


def live_context(request: Request, nemo: Nemo) -> Context:
    """Return the context for a live NeMo: the requested configuration, on the given or on synthetic audio."""
    rate = int(request.config.model.sample_rate)
    audio: list[np.ndarray] = audio_of_files(request.audio, rate) if request.audio else made_audio(rate)
    batch = make_batch(audio)

    def subject() -> Subject:
        return make_subject(request.name, request.config, request.state, batch)

    return Context(subject, nemo, request.name, request.config, augmentation_batches=200, augmentation_samples=8000)


def recorded_context(request: Request, nemo: Nemo) -> Context:
    """Return the context for a recording: its small model and audio; only `config` and `parameters` use the request."""
    config = load_config("small", RECORDED_MODEL)
    stored = load_file(FACTS / "subject.safetensors")
    state = {name.removeprefix("state."): value for name, value in stored.items() if name.startswith("state.")}
    batch = {name: stored[name] for name in ("clean", "clean_len", "noisy", "noisy_len")}

    def subject() -> Subject:
        return make_subject("the recorded model", config, state, batch)

    return Context(subject, nemo, request.name, request.config, augmentation_batches=24, augmentation_samples=600)


def _run(name: str, context: Context) -> Section:
    section = Section(name)
    try:
        _SECTIONS[name](context, section)
    except NestError:
        raise
    except NemoRaisedError as error:
        section.add(Check("NeMo answers", False, None, None, None, None, f"NeMo raised {error}"))
    except Exception as error:  # a bug on our side must be reported as such, wherever it occurs
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        section.add(Check("our side runs", False, None, None, None, None, where))
    return section


def _notes(request: Request, nemo: Nemo) -> list[str]:
    notes = []
    if not nemo.live:
        notes.append(
            f"Compared with facts recorded from NeMo {nemo.version}: its configuration file, the parameter tables of "
            "all presets, and what it computes with one small model. For your own configuration and audio, add --nemo."
        )
    elif nemo.version != VERSION:
        notes.append(f"This NeMo is {nemo.version}; nest follows {VERSION}.")
    notes += with_nemo_behaviour(request.config)[1]
    changed = departures(request.config)
    if changed:
        more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
        notes.append(f"{request.name} departs from NeMo's file in {', '.join(changed[:6])}{more}.")
    return notes
