"""Our side of a comparison: the model, its weights and a batch of audio.

Axes: B batch, N samples, D mel bins, T feature frames.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nestcli.audio.load import load_audio
from nestcli.config import resolved
from nestcli.errors import DataError
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel, check_memory
from nestcli.parity.worker import checksums

SEED = 20
LONGEST = 6.0  # seconds of audio taken from a file
SHORTEST = 1.5
LENGTHS = (1.0, 0.74, 0.55, 0.3)  # shares of a single file, to get utterances of different lengths
_DRAWS = "model.encoder.dropout_draws"
_NEMO_BEHAVIOUR = {
    "model.preprocessor.nemo_exact": True,
    "model.loss.nemo_exact": True,
    "model.encoder.conv_norm_ignore_padding": False,
    "model.masking.max_mask_ratio": None,
    "model.mask_position": "pre_conv",
    "model.encoder.backend": "nest",
    _DRAWS: "torch",
}


@dataclass
class Subject:
    """Our model in fp32 on the CPU, and the batch that both sides receive."""

    name: str
    config: DictConfig  # with the switches that restore NeMo's behaviour
    model: NestModel
    nemo_model: dict[str, Any]  # the `model` block for NeMo
    batch: dict[str, Tensor]  # clean, clean_len, noisy, noisy_len
    initial: dict[str, Any]  # checksums of the initial weights

    @property
    def waveforms(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(self.batch.values())  # type: ignore[return-value]  # four, as made by `make_batch`

    def fresh(self, *, train: bool) -> NestModel:
        """Return a copy of the model, because training mode changes running statistics."""
        return copy.deepcopy(self.model).train(train)


def make_subject(
    name: str, config: DictConfig, state: Mapping[str, Tensor] | None, batch: dict[str, Tensor]
) -> Subject:
    """Build a model with the weights of a checkpoint, or with initial ones moved away from zeros and ones."""
    config, _ = with_nemo_behaviour(config)
    torch.manual_seed(SEED)
    nest = NestConfig.from_config(config)
    check_memory(nest)
    model = NestModel(nest)
    initial = checksums(model.state_dict())
    if state is None:
        unsettle(model)
    else:
        model.load_state_dict(state, strict=True)
    return Subject(name, config, model, nemo_model_block(config), batch, initial)


def with_nemo_behaviour(config: DictConfig) -> tuple[DictConfig, list[str]]:
    """Return the configuration with NeMo's behaviour restored, and notes on user settings that this overrides."""
    exact, notes = copy.deepcopy(config), []
    if OmegaConf.select(config, "model.encoder.compile") and not OmegaConf.select(config, _DRAWS):
        config = copy.deepcopy(config)
        OmegaConf.update(config, _DRAWS, "hash", force_add=True)  # compiled models use this by default
    for key, value in _NEMO_BEHAVIOUR.items():
        chosen = OmegaConf.select(config, key)
        if not key.endswith("nemo_exact"):
            if chosen is None or chosen == value:
                continue
            notes.append(f"{key}={chosen} has no counterpart in NeMo 3.0.0; compared with {key}={value}.")
        OmegaConf.update(exact, key, value, force_add=True)
    return exact, notes


def nemo_model_block(config: DictConfig) -> dict[str, Any]:
    """Return the `model` block for NeMo's constructors: without data, optimiser and keys of our own."""
    model = dict(resolved(config)["model"])
    for key in ("train_ds", "validation_ds", "test_ds", "optim"):
        model.pop(key, None)
    for block, keys in _OURS_ALONE.items():
        model[block] = {key: value for key, value in model[block].items() if key not in keys}
    return model


_OURS_ALONE = {
    "preprocessor": ("nemo_exact",),
    "loss": ("nemo_exact",),
    "encoder": ("conv_norm_ignore_padding", "backend", "compile", "dropout_draws"),
    "masking": ("max_mask_ratio",),
    "quantizer": ("init",),
}


@torch.no_grad()
def unsettle(model: NestModel) -> None:
    """Move every value that starts at 0 or 1, so that a comparison notices if one is not used."""
    generator = torch.Generator().manual_seed(SEED)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            value.fill_(3)  # num_batches_tracked
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith(("pos_bias_u", "pos_bias_v", "running_mean")):
            value.copy_(0.3 * noise)
        elif name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif re.search(r"\.(norm_\w+|batch_norm)\.(weight|bias)$", name):
            value.add_(0.2 * noise)


# ---- audio -------------------------------------------------------------------------------------------------------


def make_batch(clean: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Return waveforms padded to the longest, and a noisy version with the next one mixed into their middle."""
    width = max(len(row) for row in clean)
    clean_BN = torch.zeros(len(clean), width)
    for row, samples in zip(clean_BN, clean, strict=True):
        row[: len(samples)] = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    lengths_B = torch.tensor([len(row) for row in clean])
    noisy_BN = clean_BN.clone()
    for number, length in enumerate(lengths_B.tolist()):
        other = clean_BN[(number + 1) % len(clean)].flip(0)
        middle = slice(length // 4, 3 * length // 4)
        noisy_BN[number, middle] += 0.4 * other[middle]
    return {"clean": clean_BN, "clean_len": lengths_B, "noisy": noisy_BN, "noisy_len": lengths_B.clone()}


def audio_of_files(paths: Sequence[Path], sample_rate: int) -> list[np.ndarray]:
    """Load up to eight utterances: one per file, or four of unequal lengths from a single file. Raises DataError."""
    sounds = []
    for path in paths[:8]:
        sound = load_audio(str(path), sample_rate=sample_rate, offset=0.0, duration=LONGEST)
        if len(sound) < SHORTEST * sample_rate:
            raise DataError(f"{path} is shorter than {SHORTEST} s: too short for a comparison. Give a longer file.")
        sounds.append(sound)
    if len(sounds) > 1:
        return sounds
    return [sounds[0][: max(int(share * len(sounds[0])), sample_rate // 2)] for share in LENGTHS]


def made_audio(sample_rate: int, seconds: Sequence[float] = (5.2, 3.9, 2.6, 1.4)) -> list[np.ndarray]:
    """Return synthetic speech-like utterances: a voice whose pitch and formants move, hiss, and pauses."""
    generator = np.random.default_rng(SEED)
    return [_utterance(int(length * sample_rate), sample_rate, generator) for length in seconds]


def _utterance(n_samples: int, sample_rate: int, generator: np.random.Generator) -> np.ndarray:
    time = np.arange(n_samples) / sample_rate
    pitch = generator.uniform(90, 220) * (1 + 0.2 * np.sin(2 * np.pi * generator.uniform(0.3, 0.9) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    formants = [
        centre * (1 + 0.3 * np.sin(2 * np.pi * generator.uniform(1, 4) * time + generator.uniform(0, 6)))
        for centre in (500.0, 1500.0, 2600.0)
    ]
    voice = np.zeros(n_samples)
    for harmonic in range(1, 30):
        level = sum(np.exp(-(((harmonic * pitch - formant) / 180.0) ** 2)) for formant in formants)
        voice += level * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * time + generator.uniform(0, 6)) + 0.4, 0, None)
    sound = 0.08 * syllables * voice + 0.003 * generator.standard_normal(n_samples)
    return sound.astype(np.float32)
