"""The noise pool: clips of noise drawn at random from a manifest."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from nestcli.audio.load import Samples, reason_of
from nestcli.data.manifest import Entry, Manifest
from nestcli.data.mixing import is_audible
from nestcli.data.utterance_audio import Skipped, duration_of, read_audio
from nestcli.errors import DataError
from nestcli.jobs.activity import Noted

ATTEMPTS = 20
_NEMO_PLACES = 100  # places tried in one file
WHITE_NOISE_DB = (-90, -46)  # replaces silent clips: an integer in dBFS, upper end excluded


@dataclass(frozen=True, slots=True)
class Clip:
    """Noise and its origin: a line of the manifest (None: generated), and the offset in its file in seconds."""

    samples: Samples
    line: int | None
    offset: float


class NoisePool:
    """Draws clips of noise: each line with the same probability, then any place in it.

    Source: NeMo `sample_noise`. Unlike NeMo, a clip stays inside the line's offset and duration, channels are averaged,
    and a clip is silent if it has no energy, not if its sum is zero. For a line without a duration, the whole file
    after its offset counts; NeMo takes the beginning of the file. Lines that cannot be read are skipped;
    `take_skipped` returns them.
    """

    def __init__(self, manifest: Manifest, sample_rate: int) -> None:
        self.manifest, self.sample_rate = manifest, sample_rate
        self._skipped: list[Skipped] = []
        self._durations = manifest.durations.copy()  # completed by those that were looked up

    def draw(self, n_samples: int, rng: random.Random, keep: int | None = None) -> Clip:
        """Return a clip of `n_samples`, or a whole shorter line; with `keep`, only its first samples.

        Raises DataError if 20 lines in a row cannot be read.
        """
        clip: Clip | None = None
        problem: DataError | None = None
        for _ in range(ATTEMPTS):
            line = rng.randrange(len(self.manifest))
            try:
                with Noted(self.manifest, line) as entry:
                    clip = self._load(entry, line, n_samples, rng, n_samples if keep is None else min(keep, n_samples))
            except DataError as error:
                problem = error
                self._skipped.append(Skipped(self.manifest.where(line), str(error), self._path(line), reason_of(error)))
                continue
            if is_audible(clip.samples):
                return clip
        if clip is None and problem is not None:
            raise DataError(f"none of {ATTEMPTS} noise files drawn can be read; the last: {problem}")
        return Clip(_white_noise(n_samples, rng)[:keep], None, 0.0)

    def draw_like_nemo(self, n_samples: int, state: np.random.RandomState) -> Clip:
        """Return the clip that NeMo's `sample_noise` draws from the same state of NumPy's generator, for mono files.

        NeMo ignores the line's offset when it draws a place, and treats a clip as silent if its sum is not above 0.
        """
        for _ in range(ATTEMPTS):
            line = int(state.randint(len(self.manifest)))
            try:
                with Noted(self.manifest, line) as entry:
                    clip = self._load_like_nemo(entry, line, n_samples, state)
            except DataError as error:
                self._skipped.append(Skipped(self.manifest.where(line), str(error), self._path(line), reason_of(error)))
                continue
            if _running_sum(clip.samples) == 0:
                level_db = state.randint(*WHITE_NOISE_DB, dtype="int32")
                white = state.randn(len(clip.samples)) * (10.0 ** (level_db / 20.0))
                clip = replace(clip, samples=(clip.samples + white).astype(np.float32))
            return replace(clip, samples=clip.samples[:n_samples])
        return Clip(np.zeros(n_samples, np.float32), None, 0.0)

    def take_skipped(self) -> list[Skipped]:
        """Return the lines that could not be read since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def _load_like_nemo(self, entry: Entry, line: int, n_samples: int, state: np.random.RandomState) -> Clip:
        wanted = n_samples / self.sample_rate
        if not entry.duration > wanted:  # nor if it is NaN: then the whole file is read, and cut afterwards
            return Clip(read_audio(entry, sample_rate=self.sample_rate), line, entry.offset)
        for _ in range(_NEMO_PLACES):
            offset = state.uniform(0, entry.duration - wanted)
            clip = Clip(read_audio(entry, sample_rate=self.sample_rate, offset=offset, duration=wanted), line, offset)
            if _running_sum(clip.samples) > 0:
                break
        return clip

    def _path(self, line: int) -> str:
        try:
            return self.manifest.entry(line).name
        except DataError:
            return ""

    def _load(self, entry: Entry, line: int, n_samples: int, rng: random.Random, keep: int) -> Clip:
        wanted = n_samples / self.sample_rate
        offset, duration = entry.offset, float(self._durations[line])
        if math.isnan(duration):
            duration = self._durations[line] = duration_of(entry)
        if duration > wanted:
            offset += rng.uniform(0, duration - wanted)
            duration = wanted
        kept = min(duration, (keep + 0.5) / self.sample_rate)  # the half protects against losing a sample to rounding
        samples = read_audio(entry, sample_rate=self.sample_rate, offset=offset, duration=kept)
        if not math.isfinite(float(samples.sum())):
            raise DataError(f"{entry.name}: some samples are not a number, or infinite. Leave it out of the manifest.")
        return Clip(samples[:keep], line, offset)


def _running_sum(samples: Samples) -> float:
    """Return the result of Python's `sum` over float32 samples, added one by one."""
    return float(np.add.accumulate(samples)[-1]) if len(samples) else 0.0


def _white_noise(n_samples: int, rng: random.Random) -> Samples:
    level_db = rng.randrange(*WHITE_NOISE_DB)
    generator = np.random.default_rng(rng.getrandbits(64))
    noise = generator.standard_normal(n_samples, dtype=np.float32)
    return noise * np.float32(10 ** (level_db / 20))
