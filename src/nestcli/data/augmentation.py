"""Mixing noise and foreign speech into a batch.

With `nemo_exact` the draws and the result are those of NeMo's `SpeakerNoiseAugmentation` and
`MultiSpeakerNoiseAugmentation` from the same seed. Without it an item that is not augmented stays clean and whole,
segments never run out, noise mode falls back to speech where there is no noise, a mixture beyond full scale is turned
down, and lengths of segments are drawn at once instead of sample by sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from nestcli.data.batch import Empty, NoiseBatch, Samples, empty
from nestcli.data.mixing import (
    AugmentationConfig,
    Given,
    Mixture,
    NoiseOf,
    Pieces,
    Segment,
    mix_in,
    one_stretch_of,
    scattered_segments,
)

__all__ = ["AugmentationConfig", "Mixture", "NoiseOf", "Segment", "mix_one_speaker_or_noise", "mix_speakers_and_noise"]


def mix_speakers_and_noise(
    batch: NoiseBatch,
    config: AugmentationConfig,
    rng: random.Random,
    noise_of: NoiseOf | None = None,
    record: list[Mixture | None] | None = None,
    empty: Empty = empty,
) -> NoiseBatch:
    """Mix segments of noise, or of several other speakers of the batch, into each item with probability `prob`.

    Noise is that of the batch, or what `noise_of` gives; then the result has none of its own. `record` takes what was
    done to every item, `empty` makes the array of the noisy audio. The ratio in dB holds over the whole item, not over
    the mixed part alone. Source: arXiv:2408.13106 section 2.4; NeMo `MultiSpeakerNoiseAugmentation`.
    """
    return _mixed(batch, config, rng, noise_of, record, empty, scattered_segments)


def mix_one_speaker_or_noise(
    batch: NoiseBatch,
    config: AugmentationConfig,
    rng: random.Random,
    noise_of: NoiseOf | None = None,
    record: list[Mixture | None] | None = None,
    empty: Empty = empty,
) -> NoiseBatch:
    """Mix one stretch of noise, or of one other speaker, into each item with probability `prob`.

    As `mix_speakers_and_noise`, but the ratio in dB is that of the item to the whole noise. Source: NeMo
    `SpeakerNoiseAugmentation`.
    """
    return _mixed(batch, config, rng, noise_of, record, empty, one_stretch_of)


def _mixed(
    batch: NoiseBatch,
    config: AugmentationConfig,
    rng: random.Random,
    noise_of: NoiseOf | None,
    record: list[Mixture | None] | None,
    empty: Empty,
    choose: Callable[[int, Given], Pieces | None],
) -> NoiseBatch:
    raw = batch.noise.numpy()
    raw_lengths = batch.noise_len.tolist()
    audio = batch.audio.numpy()
    given = Given(
        [row[:length] for row, length in zip(audio, batch.audio_len.tolist(), strict=True)],
        audio.shape[1],
        noise_of or (lambda item, count: raw[item, : min(count, raw_lengths[item])]),
        config,
        rng,
    )
    # an item that is left alone keeps its raw noise in NeMo, and the noise's length
    noise: Samples | None = None
    if noise_of is None:
        noise = raw.copy() if config.nemo_exact else np.zeros_like(audio)
    noisy = empty(audio.shape)
    noisy[:] = audio
    noise_len = batch.noise_len.clone() if config.nemo_exact else batch.audio_len
    for item in range(len(noisy)):
        pieces = None if rng.random() > config.prob else choose(item, given)
        done = None
        if pieces is not None:
            done = mix_in(item, given, pieces, noise, noisy)
            if config.nemo_exact:
                noise_len[item] = len(given.speech[item])
        elif config.nemo_exact and noise is not None:
            noisy[item] += noise[item]
        if record is not None:
            record.append(done)
    return replace(
        batch,
        noise=torch.empty(len(noisy), 0) if noise is None else torch.from_numpy(noise),
        noise_len=noise_len,
        noisy_audio=torch.from_numpy(noisy),
        noisy_audio_len=noise_len,
    )
