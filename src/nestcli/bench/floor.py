"""Lower bound for the time of any loader: read the same files with plain calls, and mix them with one multiply-add."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile as sf
from omegaconf import DictConfig

from nestcli.audio.load import Samples
from nestcli.bench.material import Material, read_material
from nestcli.data.utterance_audio import duration_of

_GAIN = np.float32(0.3)
_AT_MOST = 4096  # maximum number of utterances


@dataclass(frozen=True, slots=True)
class Read:
    """An excerpt of speech and one of noise, in sample frames of their files; `seconds` is the length of the speech."""

    speech: str
    speech_start: int
    speech_frames: int
    noise: str | None
    noise_start: int
    noise_frames: int
    seconds: float


def chosen_reads(config: dict[str, Any], seed: int = 0) -> list[Read]:
    """Return utterances in random order, each with a random noise line and offset. All random draws happen here."""
    material = read_material(DictConfig(config))
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(material.speech))[:_AT_MOST]
    return [_read(material, int(item), rng) for item in order]


def _read(material: Material, item: int, rng: np.random.Generator) -> Read:
    speech = material.speech.entry(item)
    rate = sf.info(speech.audio_filepath).samplerate
    start, frames = int(speech.offset * rate), int(speech.duration * rate)
    if material.noise is None:
        return Read(speech.audio_filepath, start, frames, None, 0, 0, frames / rate)
    noise = material.noise.entry(int(rng.integers(len(material.noise))))
    noise_rate = sf.info(noise.audio_filepath).samplerate
    seconds = duration_of(noise)
    spare = max(0.0, seconds - frames / rate)
    noise_start = int((noise.offset + rng.uniform(0, spare)) * noise_rate)
    noise_frames = int(min(seconds, frames / rate) * noise_rate)
    return Read(speech.audio_filepath, start, frames, noise.audio_filepath, noise_start, noise_frames, frames / rate)


def read_and_mix(reads: list[Read], seconds: float) -> dict[str, Any]:
    """Read and mix one utterance after another for `seconds`; return the seconds of audio and the time by stage."""
    stages = {"read speech": 0.0, "read noise": 0.0, "mix": 0.0}
    audio, number, start, processor = 0.0, 0, time.perf_counter(), time.process_time()
    end = start
    while end - start < seconds:
        read = reads[number % len(reads)]
        began = time.perf_counter()
        speech = _samples(read.speech, read.speech_start, read.speech_frames)
        has_speech = time.perf_counter()
        noise = _samples(read.noise, read.noise_start, read.noise_frames) if read.noise else speech
        has_noise = time.perf_counter()
        length = min(len(speech), len(noise))
        noisy = speech.copy()
        noisy[:length] += _GAIN * noise[:length]
        end = time.perf_counter()
        stages["read speech"] += has_speech - began
        stages["read noise"] += has_noise - has_speech
        stages["mix"] += end - has_noise
        audio += read.seconds
        number += 1
    return {
        "audio_seconds": audio,
        "utterances": number,
        "seconds": end - start,
        "processor_seconds": time.process_time() - processor,
        "stages": stages,
    }


def _samples(path: str, start: int, frames: int) -> Samples:
    samples: Samples
    samples, _ = sf.read(path, frames=frames, start=start, dtype="float32")
    return samples if samples.ndim == 1 else samples[:, 0]
