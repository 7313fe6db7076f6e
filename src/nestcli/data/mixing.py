"""Mixing noise and other speech into an utterance, as array operations.

The functions take sounds and an explicit `random.Random`, and do not change their inputs. They request noise only when
an item needs it, and only as much as they use. Nothing here imports torch, so that processes start fast.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nestcli.audio.load import Samples
from nestcli.checks import within

NoiseOf = Callable[[int, int], Samples]  # (item, samples): noise for the item, or all of it if shorter


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece that was mixed in; places in samples. `source` is another item of the batch, None for noise.

    It starts at `source_start` of the source. A source that is shorter than the piece is repeated.
    """

    start: int
    length: int
    source: int | None
    source_start: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """The changes to one item: the ratio in dB of its energy to that of the pieces over the whole item, the factor on
    the pieces, and the factor on the result if it was beyond full scale."""

    mode: Literal["noise", "speech"]
    ratio_db: float
    segments: tuple[Segment, ...]
    gain: float
    scale: float = 1.0


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
        within(self, 0, 1, "prob", "noise_ratio", "min_mix_rate", "max_mix_rate")
        within(self, -200, 200, "min_r_speech", "max_r_speech", "min_r_noise", "max_r_noise")
        within(self, 1, 10_000, "min_num_segments", "max_num_segments", "min_num_speakers", "max_num_speakers")
        for low, high in (
            ("min_r_speech", "max_r_speech"),
            ("min_r_noise", "max_r_noise"),
            ("min_mix_rate", "max_mix_rate"),
            ("min_num_segments", "max_num_segments"),
            ("min_num_speakers", "max_num_speakers"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low}: {getattr(self, low)} is above {high}={getattr(self, high)}.")


def mix_into(
    sounds: Sequence[Samples],
    config: AugmentationConfig,
    rng: random.Random,
    noise_of: NoiseOf,
    *,
    one_stretch: bool = False,
) -> tuple[Samples, Samples, Mixture | None]:
    """Mix noise or the other sounds into the first one; return the added sound, the result, and the changes.

    Sounds are read only when needed. The added sound is not scaled down with the result.
    """
    clean = sounds[0]
    given = Given(sounds, len(clean), noise_of, config, rng)
    noise, noisy = np.zeros_like(clean)[None], clean.copy()[None]
    pieces = None
    if rng.random() <= config.prob:
        pieces = (one_stretch_of if one_stretch else scattered_segments)(0, given)
    done = None if pieces is None else mix_in(0, given, pieces, noise, noisy)
    return noise[0], noisy[0], done


@dataclass(frozen=True)
class Given:
    """The speech of a batch, the width of its rows, and the source of its noise."""

    speech: Sequence[Samples]
    width: int
    noise_of: NoiseOf
    config: AugmentationConfig
    rng: random.Random


@dataclass(frozen=True)
class Pieces:
    """The sounds to mix into one item, their places there and in their sources, and the energy behind the ratio."""

    is_noise: bool
    ratio_db: float
    sounds: list[Samples]
    segments: list[Segment]
    energy: float  # mean of squares


def mix_in(item: int, given: Given, pieces: Pieces, noise: Samples | None, noisy: Samples) -> Mixture:
    """Add the pieces to the item's row of noisy audio, and write them into its row of noise if that is kept."""
    speech = given.speech[item]
    gain = _gain(_energy(speech), pieces.energy, pieces.ratio_db)
    if noise is not None:
        noise[item] = 0
    segments = zip(pieces.segments, pieces.sounds, strict=True) if gain > 0 else ()  # 0 * NaN would be NaN
    for segment, sound in segments:
        place = slice(segment.start, segment.start + segment.length)
        scaled = sound * np.float32(gain)
        noisy[item, place] += scaled
        if noise is not None:
            noise[item, place] = scaled
    scale = 1.0
    if gain > 0 and not given.config.nemo_exact:
        row = noisy[item, : len(speech)]
        peak = float(max(row.max(), -row.min()))
        if peak > 1:
            row /= np.float32(peak)
            scale = 1 / peak
    mode: Literal["noise", "speech"] = "noise" if pieces.is_noise else "speech"
    return Mixture(mode, pieces.ratio_db, tuple(pieces.segments), gain, scale)


# ---- several segments and speakers -------------------------------------------------------------------------------


def scattered_segments(item: int, given: Given) -> Pieces | None:
    config, rng, length = given.config, given.rng, len(given.speech[item])
    ranged = config.min_mix_rate < config.max_mix_rate
    rate = rng.uniform(config.min_mix_rate, config.max_mix_rate) if ranged else config.min_mix_rate
    mix_len = max(1, _share_of(length, rate))
    n_segments = rng.randint(config.min_num_segments, config.max_num_segments)
    n_speakers = min(rng.randint(config.min_num_speakers, config.max_num_speakers), len(given.speech))
    segment_lens = _random_split(mix_len, n_segments, rng, always_draw=config.nemo_exact)
    source = _chosen_source(item, given, mix_len)
    if source is None:
        return None
    ratio_db, clip = source
    if clip is not None:
        sources = _noise_segments(clip, segment_lens)
    else:
        sources = _speech_segments(item, given, segment_lens, n_speakers)
    starts = _places(segment_lens, length - mix_len, rng)
    sounds = [sound for sound, _, _ in sources]
    segments = [
        Segment(start, len(sound), other, source_start)
        for start, (sound, other, source_start) in zip(starts, sources, strict=True)
    ]
    energy = sum(_energy(sound) * len(sound) for sound in sounds) / length
    return Pieces(clip is not None, ratio_db, sounds, segments, energy)


def _share_of(length: int, rate: float) -> int:
    """Return ⌊length * rate⌋ with the product in fp32, as in NeMo: sometimes one sample off the exact product."""
    return int(np.float32(length) * np.float32(rate))


def _random_split(total: int, n_parts: int, rng: random.Random, *, always_draw: bool) -> list[int]:
    """Return the lengths of the parts if each of `total` samples chose one of `n_parts`, in order of appearance.

    Parts that no sample chose are absent. `always_draw` consumes the same draws as `rng.choices` for every sample.
    """
    if always_draw:
        return _tallied(total, n_parts, rng)
    if n_parts == 1:
        return [total]
    # the same distribution: first the counts, then the order of appearance, in which large parts tend to be first
    generator = np.random.default_rng(rng.getrandbits(64))
    counts = generator.multinomial(total, np.full(n_parts, 1 / n_parts))
    counts = counts[counts > 0]
    order = generator.choice(len(counts), size=len(counts), replace=False, p=counts / total)
    return [int(count) for count in counts[order]]


def _tallied(total: int, n_parts: int, rng: random.Random) -> list[int]:
    """Draw a part for each sample with NumPy, from the state of Python's Mersenne Twister, and write the state back."""
    version, state, gauss = rng.getstate()
    twister = np.random.RandomState()
    twister.set_state(("MT19937", np.array(state[:-1], dtype=np.uint32), state[-1], 0, 0.0))
    drawn = twister.random_sample(total)
    after = twister.get_state(legacy=False)["state"]
    rng.setstate((version, (*map(int, after["key"]), int(after["pos"])), gauss))
    drawn *= n_parts
    choices = drawn.astype(np.intp)
    counts, first = np.bincount(choices, minlength=n_parts), np.full(n_parts, total)
    first[choices[::-1]] = np.arange(total)[::-1]  # of several values for one place, the last one remains
    return [int(counts[part]) for part in np.argsort(first) if counts[part]]


def _chosen_source(item: int, given: Given, wanted: int) -> tuple[float, Samples | None] | None:
    """Return the ratio in dB and `wanted` samples of noise (None for speech); None if neither is available."""
    config, rng, alone = given.config, given.rng, len(given.speech) == 1
    if rng.random() < config.noise_ratio or alone:
        clip = given.noise_of(item, wanted)
        if config.nemo_exact or is_audible(clip):
            return rng.uniform(config.min_r_noise, config.max_r_noise), clip
        if alone:
            return None
    return rng.uniform(config.min_r_speech, config.max_r_speech), None


_Source = tuple[Samples, int | None, int]  # a piece, its item (None: noise), and its start there


def _noise_segments(clip: Samples, segment_lens: Sequence[int]) -> list[_Source]:
    """Return consecutive slices of the noise, which is repeated if it is too short."""
    repeated = _tiled(clip, sum(segment_lens))
    pieces: list[_Source] = []
    start = 0
    for length in segment_lens:
        pieces.append((repeated[start : start + length], None, start % max(1, len(clip))))
        start += length
    return pieces


def _speech_segments(item: int, given: Given, segment_lens: Sequence[int], n_speakers: int) -> list[_Source]:
    """Return slices of other items: each speaker once, then any of them."""
    rng = given.rng
    others = [other for other in range(len(given.speech)) if other != item]
    speakers = rng.sample(others, k=min(n_speakers, len(others)))
    pieces: list[_Source] = []
    turn = 0
    for wanted in segment_lens:
        speech, start = given.speech[speakers[turn]], 0
        if wanted > len(speech):
            piece = _tiled(speech, wanted)
        else:
            start = rng.randint(0, len(speech) - wanted - 1) if len(speech) > wanted else 0
            piece = speech[start : start + wanted]
        pieces.append((piece, speakers[turn], start))
        turn += 1
        if turn >= len(speakers):
            turn = rng.randint(0, len(speakers) - 1)
    return pieces


def _places(lengths: Sequence[int], slack: int, rng: random.Random) -> list[int]:
    """Return random starts of segments in their order, without overlap; `slack` is the length that they leave free."""
    starts = []
    low, high = 0, slack
    for length in lengths:
        start = rng.randint(low, high - 1) if low < high else low
        starts.append(start)
        low = start + length
        high += length
    return starts


# ---- one stretch ---------------------------------------------------------------------------------------------------


def one_stretch_of(item: int, given: Given) -> Pieces | None:
    config, rng, length = given.config, given.rng, len(given.speech[item])
    shortest, longest = (_share_of(length, rate) for rate in (config.min_mix_rate, config.max_mix_rate))
    if config.min_mix_rate < config.max_mix_rate:
        mix_len = rng.randint(shortest, max(shortest, longest - 1))
    else:
        mix_len = max(1, shortest)
    start = rng.randint(0, length - mix_len - 1) if mix_len < length else 0
    source = _chosen_source(item, given, given.width)
    if source is None:
        return None
    ratio_db, sound = source
    is_noise, other = sound is not None, None
    if sound is None:
        other = rng.choice([other for other in range(len(given.speech)) if other != item])
        sound = given.speech[other]
    if len(sound) <= mix_len:
        sound, sound_start = _tiled(sound, mix_len), 0
    else:
        sound_start = rng.randint(0, len(sound) - mix_len - 1)
    piece = sound[sound_start : sound_start + mix_len]
    return Pieces(is_noise, ratio_db, [piece], [Segment(start, mix_len, other, sound_start)], _energy(sound))


# ---- shared ----------------------------------------------------------------------------------------------------------


def is_audible(sound: Samples) -> bool:
    """Return True if any sample is not zero; for nearly every sound, the first ones suffice."""
    return bool(sound[:1024].any() or sound.any())


def _tiled(sound: Samples, width: int) -> Samples:
    """Return the sound repeated or cut to `width` samples."""
    if len(sound) == 0:
        return np.zeros(width, np.float32)
    return np.resize(sound, width) if len(sound) < width else sound[:width]


def _gain(speech_energy: float, sound_energy: float, ratio_db: float) -> float:
    """Return the factor that puts a sound's mean energy `ratio_db` below that of the speech; 0 if impossible."""
    if not (sound_energy > 0 and math.isfinite(sound_energy) and math.isfinite(speech_energy)):
        return 0.0
    return math.sqrt(speech_energy / (10 ** (ratio_db / 10) * sound_energy))


_ROW = 256  # samples summed in float32 by NumPy's own loops: BLAS might split them among threads


def _energy(sound: Samples) -> float:
    """Return the mean of the squares, to 1e-7; the same with any number of threads."""
    if not len(sound):
        return 0.0
    whole = len(sound) // _ROW * _ROW
    rows, rest = sound[:whole].reshape(-1, _ROW), sound[whole:]
    with np.errstate(over="ignore"):  # the callers check that the energy is finite
        total = np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64) + np.square(rest).sum(dtype=np.float64)
    return float(total) / len(sound)
