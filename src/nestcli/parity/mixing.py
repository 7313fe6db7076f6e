"""The section `augmentation`: compare noisy batches from the same seeds."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nestcli.data.dataset import NoiseBatch, mix_one_speaker_or_noise, mix_speakers_and_noise
from nestcli.data.mixing import AugmentationConfig
from nestcli.parity.context import Context
from nestcli.parity.report import Check, Section, close, equal, worst

SAMPLES = 1e-6  # tolerance, as a share of the peak, as the gains come from sums in a different order
_CLASSES = {
    "MultiSpeakerNoiseAugmentation": mix_speakers_and_noise,
    "SpeakerNoiseAugmentation": mix_one_speaker_or_noise,
}
_FOR_MANY = ("min_num_segments", "max_num_segments", "min_num_speakers", "max_num_speakers")


def augmentation_section(context: Context, section: Section) -> None:
    """Compare random batches in both classes with `nemo_exact`, for the configuration's and for random settings."""
    for name in _CLASSES:
        cases, batches = _cases(context, name)
        given = {f"{number}.{key}": value for number, batch in enumerate(batches) for key, value in batch.items()}
        theirs = context.nemo.ask("augment", {"cases": cases}, given)
        noises, audios, lengths, draws = [], [], [], []
        for number, (case, batch) in enumerate(zip(cases, batches, strict=True)):
            facts = theirs.facts["cases"][number]
            if "error" in facts:  # an empty segment crashes NeMo, see known_differences
                continue
            mixed, draw = mixed_by_us(case, batch)
            label = f"batch {number}"
            found = theirs.under(f"{number}.")
            noises.append(_same_sound(label, mixed.noise, found["noise"]))
            audios.append(_same_sound(label, mixed.noisy_audio, found["noisy_audio"]))
            lengths.append(equal(label, mixed.noisy_audio_len.tolist(), found["noisy_audio_len"].tolist()))
            draws.append(equal(label, draw, facts["next_draw"]))
        crashed = (
            f"{len(cases) - len(noises)} of {len(cases)} batches crash in NeMo" if len(noises) < len(cases) else None
        )
        for what, checks in (("noise", noises), ("noisy audio", audios), ("lengths", lengths), ("next draw", draws)):
            section.add(_gathered(f"{name}: {what} of {len(checks)} batches", checks, crashed))


def mixed_by_us(case: dict[str, Any], batch: dict[str, Tensor], *, exact: bool = True) -> tuple[NoiseBatch, float]:
    """Return our mixture of one case, and the generator's next draw after it."""
    config = AugmentationConfig(**{**case["arguments"], **_single(case), "nemo_exact": exact})
    rng = random.Random(case["seed"])
    audio, audio_len = batch["audio"], batch["audio_len"]
    given = NoiseBatch(audio, audio_len, batch["noise"], batch["noise_len"], audio, audio_len)
    return _CLASSES[case["class"]](given, config, rng), rng.random()


def _same_sound(name: str, ours: Tensor, nemo: Tensor) -> Check:
    return close(name, ours, nemo, SAMPLES * max(1.0, float(nemo.abs().max())))


def _single(case: dict[str, Any]) -> dict[str, int]:
    return {} if case["class"] == "MultiSpeakerNoiseAugmentation" else dict.fromkeys(_FOR_MANY, 1)


def _gathered(name: str, checks: list[Check], note: str | None) -> Check:
    return (
        worst(name, checks, note=note)
        if checks
        else Check(name, False, 0, 0, None, None, "NeMo crashed at every batch")
    )


def _cases(context: Context, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    cases, batches = [], []
    for number in range(context.augmentation_batches):
        choose = random.Random(f"{name}/{number}")
        cases.append({"class": name, "seed": number, "arguments": _arguments(context, name, choose, number)})
        batches.append(_batch(context, choose))
    return cases, batches


def _arguments(context: Context, name: str, choose: random.Random, number: int) -> dict[str, Any]:
    """Return the configuration's arguments for even numbers, random ones for odd numbers."""
    block = context.config.model.train_ds.get("batch_augmentor")
    keys = [key for key in asdict(_DEFAULTS) if key != "nemo_exact" and (name[0] == "M" or key not in _FOR_MANY)]
    if block is not None and number % 2 == 0:
        chosen = {key: block[key] for key in keys if key in block}
        return {key: asdict(_DEFAULTS)[key] for key in keys} | chosen
    low = round(choose.uniform(0.2, 0.6), 3)
    drawn = {
        "prob": choose.choice([0.5, 1.0]),
        "noise_ratio": choose.choice([0.0, 0.5, 1.0]),
        "min_r_speech": -5.0,
        "max_r_speech": 5.0,
        "min_r_noise": -5.0,
        "max_r_noise": 20.0,
        "min_mix_rate": low,
        "max_mix_rate": choose.choice([low, round(low + 0.3, 3)]),
        "min_num_segments": 1,
        "max_num_segments": choose.choice([1, 2, 4]),
        "min_num_speakers": 1,
        "max_num_speakers": choose.choice([1, 3]),
    }
    return {key: drawn[key] for key in keys}


_DEFAULTS = AugmentationConfig(0.5, 0.5, -5.0, 5.0, -5.0, 20.0, 0.5, 0.5)


def _batch(context: Context, choose: random.Random) -> dict[str, Tensor]:
    """Return a batch with cuts of the audio as speech and other, sometimes shorter, cuts as noise."""
    audio, lengths = context.subject.batch["clean"], context.subject.batch["clean_len"]
    width, items = context.augmentation_samples, choose.randint(2, 4)
    made = {key: torch.zeros(items, width) for key in ("audio", "noise")}
    sizes: dict[str, list[int]] = {"audio": [], "noise": []}
    for item in range(items):
        for key, shortest in (("audio", 0.6 if item else 1.0), ("noise", 0.2)):
            row = choose.randrange(len(audio))
            size = int(width * choose.uniform(shortest, 1.0))
            start = choose.randrange(max(1, int(lengths[row]) - size))
            cut = audio[row, start : start + size]
            made[key][item, : len(cut)] = cut
            sizes[key].append(size)
    return {
        "audio": made["audio"],
        "audio_len": torch.tensor(sizes["audio"]),
        "noise": made["noise"],
        "noise_len": torch.tensor(sizes["noise"]),
    }
