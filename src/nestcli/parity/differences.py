"""Intentional differences from NeMo: NeMo's behaviour, ours, the switch between them, and a small proof.

A proof runs on both sides in well under a second and reports the results. With a recording, NeMo's part of it comes
from the recording.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
from torch import Tensor

from nestcli.config import load_config
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.utterance_audio import NoisePool
from nestcli.model.config import MaskingConfig, NestConfig, QuantizerConfig
from nestcli.model.masking import overlapping_blocks
from nestcli.model.nest import NestModel
from nestcli.model.quantizer import RandomProjectionQuantizer
from nestcli.parity.context import Context
from nestcli.parity.mixing import mixed_by_us
from nestcli.parity.nemo import NemoRaisedError, NotRecordedError
from nestcli.parity.report import KnownDifference
from nestcli.parity.subject import nemo_model_block, with_nemo_behaviour

_AUGMENTOR_SWITCH = "model.train_ds.batch_augmentor.nemo_exact=true"
_FEATURES_SWITCH = "model.preprocessor.nemo_exact=true"
_LOSS_SWITCH = "model.loss.nemo_exact=true"
_WIDTH = 8000  # samples of the batches made here


@dataclass(frozen=True)
class Proof:
    """The results of both sides, in words; `reproduced` is True if they confirm the difference."""

    shown: str
    reproduced: bool


@dataclass(frozen=True)
class _Entry:
    difference: KnownDifference
    prove: Callable[[Context], Proof] | None = None


def known_differences(context: Context, *, prove: bool) -> list[KnownDifference]:
    """Return every known difference, with its proof if it has one and `prove` is set."""
    return [_proved(entry, context) if prove and entry.prove else entry.difference for entry in ENTRIES]


def _proved(entry: _Entry, context: Context) -> KnownDifference:
    assert entry.prove is not None
    try:
        proof = entry.prove(context)
    except NotRecordedError:
        return entry.difference
    except NemoRaisedError as error:
        proof = Proof(f"NeMo raised {error}", reproduced=False)
    return replace(entry.difference, shown=proof.shown, reproduced=proof.reproduced)


# ---- augmentation ------------------------------------------------------------------------------------------------


def _tones(lengths: list[int], level: float) -> Tensor:
    rows = torch.zeros(len(lengths), _WIDTH)
    for number, length in enumerate(lengths):
        rows[number, :length] = level * torch.sin(torch.arange(length) * (0.05 + 0.02 * number))
    return rows


def _mixture(
    context: Context, arguments: dict[str, Any], lengths: list[int], noise_lengths: list[int], noise: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Return NeMo's facts and tensors, and our default mixture, for one batch."""
    case = {"class": "MultiSpeakerNoiseAugmentation", "seed": 1, "arguments": {**_ARGUMENTS, **arguments}}
    content = {"lengths": lengths, "noise_lengths": noise_lengths, "noise": round(float(noise.square().sum()), 3)}
    batch = {
        "audio": _tones(lengths, 0.3),
        "audio_len": torch.tensor(lengths),
        "noise": noise,
        "noise_len": torch.tensor(noise_lengths),
    }
    theirs = context.nemo.ask("augment", {"cases": [case], "batch": content}, {f"0.{k}": v for k, v in batch.items()})
    ours, _ = mixed_by_us(case, batch, exact=False)
    return theirs.facts["cases"][0], theirs.under("0."), ours


_ARGUMENTS = {
    "prob": 1.0, "noise_ratio": 1.0, "min_r_speech": -5.0, "max_r_speech": 5.0, "min_r_noise": 0.0, "max_r_noise": 0.0,
    "min_mix_rate": 0.5, "max_mix_rate": 0.5, "min_num_segments": 1, "max_num_segments": 1, "min_num_speakers": 1,
    "max_num_speakers": 1,
}  # fmt: skip


def _skipped_item(context: Context) -> Proof:
    noise = _tones([_WIDTH, 2000], 0.1)
    _, theirs, ours = _mixture(context, {"prob": 0.0}, [_WIDTH, _WIDTH], [_WIDTH, 2000], noise)
    energy, their_len = float(theirs["noise"].square().mean()), theirs["noisy_audio_len"].tolist()
    our_energy, our_len = float(ours.noise.square().mean()), ours.noisy_audio_len.tolist()
    shown = f"noise energy: NeMo {energy:.2g}, ours {our_energy:.2g}; lengths: NeMo {their_len}, ours {our_len}"
    return Proof(shown, energy > 0 and our_energy == 0 and their_len != our_len == [_WIDTH, _WIDTH])


def _edited_batch(context: Context) -> Proof:
    facts, _, _ = _mixture(context, {}, [_WIDTH, 6000], [3000, 3000], _tones([3000, 3000], 0.1))
    changed = facts["caller_changed"]
    return Proof(f"changed in the caller's batch: NeMo {', '.join(changed) or 'nothing'}; ours nothing", bool(changed))


def _empty_segment(context: Context) -> Proof:
    arguments = {"min_num_segments": 5, "max_num_segments": 5, "min_mix_rate": 0.0005, "max_mix_rate": 0.0005}
    facts, _, ours = _mixture(context, arguments, [_WIDTH, _WIDTH], [_WIDTH, _WIDTH], _tones([_WIDTH, _WIDTH], 0.1))
    error = facts.get("error")
    mixed = int((ours.noise != 0).sum())
    return Proof(f"NeMo: {error or 'no error'}; ours mixes {mixed} samples", error is not None and mixed > 0)


def _no_noise(context: Context) -> Proof:
    _, theirs, ours = _mixture(context, {}, [_WIDTH, 6000], [_WIDTH, 6000], torch.zeros(2, _WIDTH))
    silent, mixed = not theirs["noise"].any(), bool(ours.noise.any())
    return Proof(
        f"mixed in: NeMo {'nothing' if silent else 'something'}, ours {'speech' if mixed else 'nothing'}",
        silent and mixed,
    )


def _full_scale(context: Context) -> Proof:
    loud = {"min_r_noise": -25.0, "max_r_noise": -25.0}
    _, theirs, ours = _mixture(context, loud, [_WIDTH, _WIDTH], [_WIDTH, _WIDTH], _tones([_WIDTH, _WIDTH], 0.5))
    peak, our_peak = float(theirs["noisy_audio"].abs().max()), float(ours.noisy_audio.abs().max())
    return Proof(f"peak: NeMo {peak:.2f}, ours {our_peak:.2f}", peak > 1.0 >= our_peak)


# ---- noise -------------------------------------------------------------------------------------------------------


def _noise_with_offset(context: Context) -> Proof:
    """Draw clips from a file of which the manifest declares only the second half, recognisable by its mean."""
    if not context.nemo.live:
        raise NotRecordedError("sample_noise")
    rate, draws = 16000, 8
    samples = 0.05 * np.random.default_rng(3).standard_normal(4 * rate) + 0.1
    samples[2 * rate :] += 0.2
    with tempfile.TemporaryDirectory() as folder:
        path, manifest = Path(folder) / "noise.wav", Path(folder) / "noise.json"
        sf.write(path, samples, rate, subtype="FLOAT")
        line = {"audio_filepath": str(path), "duration": 2.0, "offset": 2.0}
        manifest.write_text(json.dumps(line) + "\n", encoding="utf-8")
        theirs = context.nemo.ask("sample_noise", {"line": line, "seed": 0, "draws": draws, "samples": rate})
        pool, rng = NoisePool(read_manifests(str(manifest)), rate), random.Random(0)
        ours = [pool.draw(rate, rng).samples for _ in range(draws)]
    inside, theirs_inside = (
        sum(float(clip.mean()) > 0.25 for clip in side) for side in (ours, theirs.tensors.values())
    )
    shown = f"clips from the declared half: NeMo {theirs_inside} of {draws}, ours {inside} of {draws}"
    return Proof(shown, theirs_inside < inside == draws)


# ---- the model ---------------------------------------------------------------------------------------------------


def _dither(context: Context) -> Proof:
    _ = context.built
    batch = context.subject.batch
    audio = {"audio": batch["clean"], "audio_len": batch["clean_len"]}
    theirs = context.nemo.ask("features", {"train": True, "seed": 7}, audio).facts["caller_changed_by"]
    ours = _default_model(context).train()
    given = batch["clean"].clone()
    ours.preprocessor(given, batch["clean_len"])
    changed = float((given - batch["clean"]).abs().max())
    return Proof(f"the caller's waveform moved by: NeMo {theirs:.1e}, ours {changed:.1e}", theirs > 0 == changed)


def _silence(context: Context) -> Proof:
    _ = context.built
    audio = {"audio": torch.zeros(1, 32000), "audio_len": torch.tensor([32000])}
    theirs = context.nemo.ask("features", {"train": False, "seed": 7, "silence": True}, audio)["features"]
    ours, _ = _default_model(context).eval().preprocessor(audio["audio"], audio["audio_len"])
    largest, our_largest = float(theirs.abs().max()), float(ours.abs().max())
    return Proof(f"largest feature of silence: NeMo {largest:.2g}, ours {our_largest:.2g}", largest > 0 == our_largest)


def _nothing_selected(context: Context) -> Proof:
    """Compute the loss of an utterance that is shorter than a masking block."""
    _ = context.built
    masking = context.subject.model.mask_processor.config
    if not masking.allow_overlap or masking.block_size < 8:
        raise NotRecordedError("forward")  # these settings mask a part of every utterance
    samples = (masking.block_size - 1) * context.subject.model.preprocessor.config.hop_length
    length = torch.tensor([samples])
    batch = {"clean": context.subject.batch["clean"][:1, :samples], "clean_len": length}
    batch |= {"noisy": batch["clean"], "noisy_len": length}
    theirs = float(context.nemo.ask("forward", {"train": False, "seed": 1, "samples": samples}, batch)["loss"])
    ours = float(_default_model(context).eval()(*batch.values()).loss.detach())
    return Proof(f"loss: NeMo {theirs}, ours {ours:g}", math.isnan(theirs) and ours == 0.0)


def _default_model(context: Context) -> NestModel:
    """Return our model with our defaults instead of NeMo's behaviour."""
    config = context.subject.config.copy()
    config.model.preprocessor.nemo_exact = config.model.loss.nemo_exact = False
    model = NestModel(NestConfig.from_config(config))
    model.load_state_dict(context.subject.model.state_dict())
    return model


def _max_mask_ratio(context: Context) -> Proof:
    settings: dict[str, Any] = {"block_size": 40, "mask_prob": 0.05, "allow_overlap": True, "max_mask_ratio": 0.3}
    case = {"masking": settings, "frames": 800, "lengths": [800] * 4, "seed": 0}
    theirs = context.nemo.ask("masks", {"cases": [case]})["0"].double().mean()
    torch.manual_seed(0)
    ours = overlapping_blocks(torch.tensor([800] * 4), 800, MaskingConfig(feat_in=2, freeze=True, **settings))
    share, our_share = float(theirs), float(ours.double().mean())
    return Proof(f"masked with a limit of 30 %: NeMo {share:.0%}, ours {our_share:.0%}", share > 0.31 > our_share)


def _cosine(context: Context) -> Proof:
    settings = {
        "feat_in": 80, "code_dim": 16, "num_books": 1, "num_classes": 64, "dist_fn": "cosine", "freeze": True,
        "squeeze_single": False, "combine_time_steps": 8,
    }  # fmt: skip
    features = torch.sin(torch.arange(80 * 16.0)).view(1, 80, 16)
    error = context.nemo.ask("cosine", {"quantizer": settings, "seed": 0}, {"features": features}).facts["error"]
    torch.manual_seed(0)
    tokens = RandomProjectionQuantizer(QuantizerConfig(**settings))(features)  # type: ignore[arg-type]  # checked by the class
    return Proof(f"NeMo: {error or 'no error'}; ours: tokens {tokens.flatten().tolist()}", error is not None)


def _post_conv(context: Context) -> Proof:
    config = load_config("small", ["model.mask_position=post_conv", *_TINY])
    exact, _ = with_nemo_behaviour(config)
    exact.model.mask_position = "post_conv"
    batch = {name: value[:2] for name, value in context.subject.batch.items()}
    error = context.nemo.ask("post_conv", {"model": nemo_model_block(exact)}, batch).facts["error"]
    torch.manual_seed(0)
    with torch.no_grad():
        loss = float(NestModel(NestConfig.from_config(config)).eval()(*batch.values()).loss)
    return Proof(f"NeMo: {error or 'no error'}; ours: loss {loss:.3f}", error is not None and loss == loss)


_TINY = (
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8", "model.masking.mask_prob=0.1",
)  # fmt: skip


# ---- the list ----------------------------------------------------------------------------------------------------


def _entry(
    name: str, nemo: str, ours: str, switch: str | None, prove: Callable[[Context], Proof] | None = None
) -> _Entry:
    return _Entry(KnownDifference(name, nemo, ours, switch), prove)


ENTRIES = (
    _entry("an utterance that is not augmented", "its raw noise is added, and it takes the noise's length",
           "it stays clean and whole", _AUGMENTOR_SWITCH, _skipped_item),
    _entry("the caller's batch in augmentation", "noise and lengths are edited in place", "nothing is changed", None,
           _edited_batch),
    _entry("more segments than samples", "an empty segment raises IndexError", "empty segments are left out", None,
           _empty_segment),
    _entry("noise mode without noise", "mixes silence", "mixes speech", _AUGMENTOR_SWITCH, _no_noise),
    _entry("a mixture beyond full scale", "left as it is", "turned down to full scale", _AUGMENTOR_SWITCH, _full_scale),
    _entry("clips of noise", "ignore the manifest's offset; a negative mean counts as silence; stereo gives zeros",
           "stay inside offset and duration; silence has no energy; channels are averaged", None, _noise_with_offset),
    _entry("dither", "changes the caller's waveform in place", "leaves it alone", _FEATURES_SWITCH, _dither),
    _entry("a mel bin that never changes", "rounding noise, scaled up", "zeros", _FEATURES_SWITCH, _silence),
    _entry("a batch without a masked token", "loss NaN", "loss 0, gradients 0", _LOSS_SWITCH, _nothing_selected),
    _entry("max_mask_ratio", "accepted and ignored", "honoured where it is set", "model.masking.max_mask_ratio=null",
           _max_mask_ratio),
    _entry("the cosine quantizer", "raises a dtype error", "works", None, _cosine),
    _entry("mask_position: post_conv", "cannot run, or swaps time and frequency", "masks and learns as intended", None,
           _post_conv),
    _entry("the validation loss", "mean over batches, not synchronised over devices",
           "mean over masked tokens, over all devices", _LOSS_SWITCH),
    _entry("masks in validation", "different every time", "the same every time", None),
    _entry("tokens under mixed precision", "projected in the low precision", "computed in fp32", None),
    _entry("attention under 16-mixed", "inputs in fp32, fp16 replaced by bf16", "fp16; bf16-mixed avoids both", None),
    _entry("accumulation at an epoch's end", "a shorter one ends the epoch", "steps never straddle a cut", None),
)  # fmt: skip
