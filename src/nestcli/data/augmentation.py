"""Mixing noise and foreign speech into a batch, as array operations.

Pure functions of a batch and an explicit `random.Random`: nothing that came in is changed. From the same seed the
draws are those of NeMo's `SpeakerNoiseAugmentation` and `MultiSpeakerNoiseAugmentation`. Unless `nemo_exact` is set,
four things differ from NeMo in the result: an item that is not augmented stays clean and whole, segments never run
out, noise mode falls back to speech where there is no noise, and a mixture beyond full scale is turned down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nestcli.data.batch import NoiseBatch


@dataclass(frozen=True)
class AugmentationConfig:
    """A `batch_augmentor` block. Ratios of energies in dB, `prob` and rates as shares."""

    prob: float
    noise_ratio: float
    min_r_speech: float
    max_r_speech: float
    min_r_noise: float
    max_r_noise: float
    min_mix_rate: float
    max_mix_rate: float
    min_num_segments: int = 1
    max_num_segments: int = 1
    min_num_speakers: int = 1
    max_num_speakers: int = 1
    nemo_exact: bool = False

    def __post_init__(self) -> None:
        for key in ("prob", "noise_ratio", "min_mix_rate", "max_mix_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)} is not between 0 and 1.")
        for low, high in (
            ("min_r_speech", "max_r_speech"),
            ("min_r_noise", "max_r_noise"),
            ("min_mix_rate", "max_mix_rate"),
            ("min_num_segments", "max_num_segments"),
            ("min_num_speakers", "max_num_speakers"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}: {getattr(self, low)} is above {high}={getattr(self, high)}.")
        for key in ("min_num_segments", "min_num_speakers"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} must be at least 1.")


def mix_speakers_and_noise(batch: NoiseBatch, config: AugmentationConfig, rng: random.Random) -> NoiseBatch:
    """Mix segments of noise, or of several other speakers of the batch, into each item with probability `prob`.

    Source: arXiv:2408.13106 section 2.4; NeMo `MultiSpeakerNoiseAugmentation`. The ratio in dB holds over the whole
    item, not over the mixed part alone.
    """
    mixed: list[Tensor | None] = []
    for item in range(len(batch.audio)):
        mixed.append(None if rng.random() > config.prob else _scattered_segments(item, batch, config, rng))
    return _assembled(batch, mixed, config)


def mix_one_speaker_or_noise(batch: NoiseBatch, config: AugmentationConfig, rng: random.Random) -> NoiseBatch:
    """Mix one stretch of noise, or of one other speaker, into each item with probability `prob`.

    Source: NeMo `SpeakerNoiseAugmentation`. The ratio in dB is that of the item to the whole noise.
    """
    mixed: list[Tensor | None] = []
    for item in range(len(batch.audio)):
        mixed.append(None if rng.random() > config.prob else _one_stretch(item, batch, config, rng))
    return _assembled(batch, mixed, config)


def _assembled(batch: NoiseBatch, mixed: Sequence[Tensor | None], config: AugmentationConfig) -> NoiseBatch:
    if config.nemo_exact:  # an item without a mixture keeps its raw noise, and the noise's length
        noise = torch.stack([raw if new is None else new for raw, new in zip(batch.noise, mixed, strict=True)])
        changed = torch.tensor([new is not None for new in mixed])
        noise_len = torch.where(changed, batch.audio_len, batch.noise_len)
        return replace(
            batch,
            noise=noise,
            noise_len=noise_len,
            noisy_audio=batch.audio + noise,
            noisy_audio_len=noise_len,
        )
    silence = torch.zeros_like(batch.audio[0])
    noise = torch.stack([silence if new is None else new for new in mixed])
    noisy = batch.audio + noise
    peaks = noisy.abs().amax(dim=1, keepdim=True)
    noisy = torch.where((peaks > 1) & (noise != 0).any(dim=1, keepdim=True), noisy / peaks, noisy)
    return replace(batch, noise=noise, noise_len=batch.audio_len, noisy_audio=noisy, noisy_audio_len=batch.audio_len)


# ---- several segments and speakers -------------------------------------------------------------------------------


def _scattered_segments(item: int, batch: NoiseBatch, config: AugmentationConfig, rng: random.Random) -> Tensor | None:
    length = int(batch.audio_len[item])
    ranged = config.min_mix_rate < config.max_mix_rate
    rate = rng.uniform(config.min_mix_rate, config.max_mix_rate) if ranged else config.min_mix_rate
    mix_len = max(1, _share_of(length, rate))
    n_segments = rng.randint(config.min_num_segments, config.max_num_segments)
    n_speakers = min(rng.randint(config.min_num_speakers, config.max_num_speakers), len(batch.audio))
    segment_lens = _random_split(mix_len, n_segments, rng, always_draw=config.nemo_exact)
    source = _chosen_source(item, batch, config, rng)
    if source is None:
        return None
    ratio_db, is_noise = source
    segments = (
        _noise_segments(item, batch, segment_lens)
        if is_noise
        else _speech_segments(item, batch, segment_lens, n_speakers, rng)
    )
    signal = _placed(segments, batch.audio.size(1), length - mix_len, rng)
    return signal * _gain(batch.audio[item, :length], signal[:length], ratio_db)


def _share_of(length: int, rate: float) -> int:
    """⌊length * rate⌋ with the product in fp32, as NeMo has it: now and then one sample from the exact product."""
    return int(np.float32(length) * np.float32(rate))


def _random_split(total: int, n_parts: int, rng: random.Random, *, always_draw: bool) -> list[int]:
    """Lengths of parts when each of `total` samples chooses one of `n_parts`, in order of first appearance.

    Parts that no sample chose are absent. The draws are those of `rng.choices`, made by NumPy from the same
    Mersenne Twister, whose state is carried over and back.
    """
    if n_parts == 1 and not always_draw:
        return [total]
    version, state, gauss = rng.getstate()
    twister = np.random.RandomState()
    twister.set_state(("MT19937", np.array(state[:-1], dtype=np.uint32), state[-1], 0, 0.0))
    choices = (twister.random_sample(total) * n_parts).astype(np.int64)
    after = twister.get_state(legacy=False)["state"]
    rng.setstate((version, (*map(int, after["key"]), int(after["pos"])), gauss))
    parts, first, counts = np.unique(choices, return_index=True, return_counts=True)
    return [int(counts[i]) for i in np.argsort(first)] if len(parts) else []


def _chosen_source(
    item: int, batch: NoiseBatch, config: AugmentationConfig, rng: random.Random
) -> tuple[float, bool] | None:
    """The ratio in dB and whether noise is mixed (else speech); None if neither is to be had."""
    alone = len(batch.audio) == 1
    wants_noise = rng.random() < config.noise_ratio or alone
    if wants_noise and not config.nemo_exact and not bool(batch.noise[item, : batch.noise_len[item]].any()):
        if alone:
            return None
        wants_noise = False
    if wants_noise:
        return rng.uniform(config.min_r_noise, config.max_r_noise), True
    return rng.uniform(config.min_r_speech, config.max_r_speech), False


def _noise_segments(item: int, batch: NoiseBatch, segment_lens: Sequence[int]) -> list[Tensor]:
    """Consecutive slices of the item's noise, repeated to the width of the batch."""
    repeated = _tiled(batch.noise[item, : batch.noise_len[item]], batch.audio.size(1))
    return list(torch.split(repeated[: sum(segment_lens)], list(segment_lens)))


def _speech_segments(
    item: int, batch: NoiseBatch, segment_lens: Sequence[int], n_speakers: int, rng: random.Random
) -> list[Tensor]:
    """Slices of other items, each speaker once and then any of them."""
    others = [other for other in range(len(batch.audio)) if other != item]
    speakers = rng.sample(others, k=min(n_speakers, len(others)))
    segments, turn = [], 0
    for wanted in segment_lens:
        speech = batch.audio[speakers[turn], : batch.audio_len[speakers[turn]]]
        if wanted > len(speech):
            segments.append(_tiled(speech, wanted))
        else:
            start = rng.randint(0, len(speech) - wanted - 1) if len(speech) > wanted else 0
            segments.append(speech[start : start + wanted])
        turn += 1
        if turn >= len(speakers):
            turn = rng.randint(0, len(speakers) - 1)
    return segments


def _placed(segments: Sequence[Tensor], width: int, slack: int, rng: random.Random) -> Tensor:
    """Segments in their order at random places of a signal of `width` samples; `slack` is what they leave free."""
    signal = torch.zeros(width)
    low, high = 0, slack
    for segment in segments:
        start = rng.randint(low, high - 1) if low < high else low
        signal[start : start + len(segment)] = segment
        low = start + len(segment)
        high += len(segment)
    return signal


# ---- one stretch ---------------------------------------------------------------------------------------------------


def _one_stretch(item: int, batch: NoiseBatch, config: AugmentationConfig, rng: random.Random) -> Tensor | None:
    length = int(batch.audio_len[item])
    shortest, longest = (_share_of(length, rate) for rate in (config.min_mix_rate, config.max_mix_rate))
    if config.min_mix_rate < config.max_mix_rate:
        mix_len = rng.randint(shortest, max(shortest, longest - 1))
    else:
        mix_len = max(1, shortest)
    start = rng.randint(0, length - mix_len - 1) if mix_len < length else 0
    source = _chosen_source(item, batch, config, rng)
    if source is None:
        return None
    ratio_db, is_noise = source
    if is_noise:
        sound = batch.noise[item, : batch.noise_len[item]]
    else:
        other = rng.choice([other for other in range(len(batch.audio)) if other != item])
        sound = batch.audio[other, : batch.audio_len[other]]
    if len(sound) <= mix_len:
        sound, sound_start = _tiled(sound, mix_len), 0
    else:
        sound_start = rng.randint(0, len(sound) - mix_len - 1)
    signal = torch.zeros(batch.audio.size(1))
    signal[start : start + mix_len] = sound[sound_start : sound_start + mix_len]
    return signal * _gain(batch.audio[item, :length], sound, ratio_db)


# ---- shared ----------------------------------------------------------------------------------------------------------


def _tiled(sound: Tensor, width: int) -> Tensor:
    """The sound repeated to `width` samples, or cut to it."""
    if len(sound) == 0:
        return torch.zeros(width)
    return sound.repeat(width // len(sound) + 1)[:width] if len(sound) < width else sound[:width]


def _gain(speech: Tensor, sound: Tensor, ratio_db: float) -> float:
    """The factor that puts the mean energy of `sound` `ratio_db` below that of `speech`; 0 if it is silent."""
    sound_energy = _mean_energy(sound)
    return math.sqrt(_mean_energy(speech) / (10 ** (ratio_db / 10) * sound_energy)) if sound_energy > 0 else 0.0


def _mean_energy(sound: Tensor) -> float:
    """In float64 and by NumPy, whose sum does not depend on the number of threads as PyTorch's does."""
    return float(np.square(sound.numpy(), dtype=np.float64).mean())
