"""Synthetic audio for measurements without a manifest: sounds with the level and rhythm of speech, and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from nestcli.audio.load import Samples
from nestcli.data.manifest import write_manifest

RATE = 16_000  # Hz
_SYLLABLES = 4.0  # per second


def make_bench_corpus(
    folder: Path,
    *,
    speech: int = 60,
    noise: int = 16,
    seconds: tuple[float, float] = (5.0, 20.0),
    noise_seconds: tuple[float, float] = (20.0, 30.0),
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write 16 kHz, 16-bit FLAC files, and return the paths of the speech manifest and the noise manifest."""
    rng = np.random.default_rng(seed)
    manifests = []
    for kind, count, (shortest, longest) in (("speech", speech, seconds), ("noise", noise, noise_seconds)):
        lengths = rng.uniform(shortest, longest, count)
        rows = [_written(folder / kind, number, float(length), kind, rng) for number, length in enumerate(lengths)]
        manifests.append(folder / f"{kind}.json")
        write_manifest(manifests[-1], rows)
    return manifests[0], manifests[1]


def _written(folder: Path, number: int, seconds: float, kind: str, rng: np.random.Generator) -> dict[str, Any]:
    path = folder / f"{kind}-{number:04d}.flac"
    folder.mkdir(parents=True, exist_ok=True)
    samples = _sound(round(seconds * RATE), kind == "speech", rng)
    sf.write(path, samples, RATE, subtype="PCM_16")
    return {"audio_filepath": str(path), "duration": len(samples) / RATE}


def _sound(count: int, has_syllables: bool, rng: np.random.Generator) -> Samples:
    """Return noise whose spectrum falls by 6 dB per octave: FLAC compresses it about as well as speech."""
    length = 1 << (count - 1).bit_length()  # the FFT of other lengths is far slower
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum /= np.maximum(1.0, np.arange(len(spectrum)) * (RATE / length / 200))  # flat below 200 Hz
    sound = np.fft.irfft(spectrum, length)[:count]
    if has_syllables:
        phase = 2 * np.pi * (_SYLLABLES * np.arange(count) / RATE + rng.random())
        sound *= 0.01 + np.square(np.sin(phase / 2))
    samples: Samples = (0.3 * sound / np.abs(sound).max()).astype(np.float32)
    return samples
