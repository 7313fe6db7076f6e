"""Noise for a probe: each utterance gets noise over its whole length, the same for every system and in every run."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from nestcli.audio.load import Samples
from nestcli.data.mixing import AugmentationConfig, mix_into
from nestcli.data.utterance_audio import NoisePool


@dataclass(frozen=True)
class AddedNoise:
    """Mixes a clip from the pool into an utterance, `snr` dB below it."""

    pool: NoisePool
    snr: float

    def __call__(self, samples: Samples) -> Samples:
        """Return the noisy utterance (N,). Its own samples seed the draw: order and paths do not matter."""
        rng = random.Random(zlib.crc32(samples.tobytes()))  # noqa: S311  # not for secrets
        config = AugmentationConfig(
            prob=1, noise_ratio=1, min_r_speech=0, max_r_speech=0, min_r_noise=self.snr, max_r_noise=self.snr,
            min_mix_rate=1, max_mix_rate=1,
        )  # fmt: skip
        _, noisy, _ = mix_into([samples], config, rng, lambda _item, wanted: self.pool.draw(wanted, rng).samples)
        return noisy
