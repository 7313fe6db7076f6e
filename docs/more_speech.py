"""More speech for a small pretraining: synthetic voices, or real recordings at other speeds and through other channels.

python docs/more_speech.py voices OUT HOURS VOICES    hours of English by as many voices of eSpeak NG
python docs/more_speech.py copies OUT COPIES MANIFEST    copies of every line of a manifest

Writes OUT/SPEAKER/*.flac, for `nest prepare-data`; the same words give the same files.
Needs `pip install "nestcli[demo]"`.
"""

import json
import math
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from nestcli.demo.corpus import ENGLISH, LOUDEST_PEAK, FloatArray, at_level, room, write_flac
from nestcli.demo.synthesis import SAMPLE_RATE, Synthesizer, Voice, variants

SEED = 1
ACCENTS = ["en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc"]
HARDLY_HUMAN = {"whisper", "whisperf", "Demonic", "croak", "fast", "Tweaky"}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SENTENCES = ENGLISH.strip().splitlines()
EDGES = np.array([0, 125, 250, 500, 1000, 2000, 4000, 8000])  # Hz
SPEEDS = math.log(0.82), math.log(1.22)


def voices(out: Path, hours: float, number: int) -> None:
    """Voices of random accent, timbre, pitch and pace, each with the same share of the hours."""
    synthesizer, seconds = Synthesizer(), 0.0
    human = [each for each in variants() if each not in HARDLY_HUMAN and "robo" not in each.lower()]
    for index in range(number):
        rng = np.random.default_rng([SEED, index])
        voice = _drawn(f"voice{index:03d}", human, rng)
        for utterance in count():
            said = _coloured(_said(synthesizer, voice, rng), rng)
            said = at_level(said, rng.uniform(-32, -18)) + room(rng, len(said))
            seconds += write_flac(out / voice.name / f"{voice.name}_{utterance:03d}.flac", said)
            if seconds >= hours * 3600 * (index + 1) / number:
                break


def _drawn(name: str, human: list[str], rng: np.random.Generator) -> Voice:
    language, variant = str(rng.choice(ACCENTS)), str(rng.choice(human))
    pitch, rate, pitch_range = int(rng.integers(25, 75)), int(rng.integers(130, 200)), int(rng.integers(25, 75))
    return Voice(name, language, variant, pitch, rate, pitch_range)


def _said(synthesizer: Synthesizer, voice: Voice, rng: np.random.Generator) -> FloatArray:
    """One sentence or two, or, three times in ten, up to seven numbers."""
    pitch, rate = int(voice.pitch + rng.integers(-4, 5)), round(voice.rate * rng.uniform(0.9, 1.1))
    tuned = replace(voice, pitch=pitch, rate=rate)
    if rng.random() < 0.3:
        return synthesizer.speak(", ".join(rng.choice(NUMBERS, rng.integers(1, 8))), tuned)
    return synthesizer.speak(" ".join(rng.choice(SENTENCES, rng.integers(1, 3), replace=False)), tuned)


def copies(out: Path, number: int, manifest: Path) -> None:
    """Each line `number` times: faster or slower, pitch and all, by up to a fifth, and coloured."""
    for index, line in enumerate(manifest.read_text().splitlines()):
        row = json.loads(line)
        start, frames = (round(row.get(key, 0) * SAMPLE_RATE) for key in ("offset", "duration"))
        speech, _ = sf.read(row["audio_filepath"], start=start, frames=frames)
        for copy in range(number):
            rng = np.random.default_rng([SEED, index, copy])
            speed = math.exp(rng.uniform(*SPEEDS))
            other = _coloured(soxr.resample(speech, SAMPLE_RATE * speed, SAMPLE_RATE, quality="HQ"), rng)
            other *= min(1, LOUDEST_PEAK / abs(other).max())
            write_flac(out / f"speed{copy}_{row['speaker']}" / f"{index:05d}_{copy}.flac", other)


def _coloured(speech: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Through a smooth random response of 4 dB of deviation; every third without what is above 3.9 kHz."""
    hertz = np.fft.rfftfreq(len(speech), 1 / SAMPLE_RATE)
    decibels = np.interp(np.log(hertz + 60), np.log(EDGES + 60), rng.normal(0, 4, len(EDGES)))
    spectrum = np.fft.rfft(speech) * 10 ** (decibels / 20)
    if rng.random() < 1 / 3:
        spectrum[hertz > 3900] = 0
    return np.fft.irfft(spectrum, len(speech))


if __name__ == "__main__":
    what, folder, *given = sys.argv[1:]
    if what == "voices":
        voices(Path(folder), float(given[0]), int(given[1]))
    else:
        copies(Path(folder), int(given[0]), Path(given[1]))
