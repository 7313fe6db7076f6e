"""Noise for the mixing: clips drawn from a manifest."""

from __future__ import annotations

import random

import numpy as np

from nestcli.data.audio import load_audio
from nestcli.data.batch import Samples
from nestcli.data.manifest import Manifest
from nestcli.errors import DataError

ATTEMPTS = 20
WHITE_NOISE_DB = (
    -90,
    -46,
)  # level of what stands in for a silent clip: an integer of dBFS, the upper end excluded


class NoisePool:
    """Draws clips of noise: any line with the same chance, then any place in it.

    Source: NeMo `sample_noise`. Unlike there, a clip stays inside the line's offset and duration, channels are
    averaged, and a clip counts as silent when it has no energy, not when its sum is zero.
    """

    def __init__(self, manifest: Manifest, sample_rate: int) -> None:
        self.manifest, self.sample_rate = manifest, sample_rate

    def draw(self, n_samples: int, rng: random.Random) -> Samples:
        """A clip of `n_samples`, or a whole shorter line. Raises DataError if 20 lines in a row cannot be read."""
        problem: DataError | None = None
        clip: Samples = np.zeros(0, np.float32)
        for _ in range(ATTEMPTS):
            try:
                clip = self._load(rng.randrange(len(self.manifest)), n_samples, rng)
            except DataError as error:
                problem = error
                continue
            if clip.any():
                return clip
        if len(clip) == 0 and problem is not None:
            raise DataError(f"none of {ATTEMPTS} noise files drawn can be read; the last: {problem}")
        return _white_noise(n_samples, rng)

    def _load(self, line: int, n_samples: int, rng: random.Random) -> Samples:
        entry = self.manifest.entry(line)
        wanted = n_samples / self.sample_rate
        offset, duration = entry.offset, entry.duration
        if duration > wanted:
            offset += rng.uniform(0, duration - wanted)
            duration = wanted
        clip = load_audio(entry.audio_filepath, sample_rate=self.sample_rate, offset=offset, duration=duration)
        return clip[:n_samples]


def _white_noise(n_samples: int, rng: random.Random) -> Samples:
    level_db = rng.randrange(*WHITE_NOISE_DB)
    generator = np.random.default_rng(rng.getrandbits(64))
    noise = generator.standard_normal(n_samples, dtype=np.float32)
    return noise * np.float32(10 ** (level_db / 20))
