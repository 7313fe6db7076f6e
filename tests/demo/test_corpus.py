"""The synthetic corpus: the same every time, varied, and shaped like speech rather than like tones."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile as sf

from nestcli.demo import corpus
from nestcli.demo.corpus import CorpusSummary, make_corpus
from nestcli.demo.synthesis import SAMPLE_RATE, Synthesizer, Voice
from nestcli.errors import MissingDependencyError

espeakng_loader = pytest.importorskip("espeakng_loader")

LOW = Voice("low", "en-us", "m3")
HIGH = Voice("high", "en-us", "f2")
SENTENCE = "She counted seven cats in the park, and I saw two."

Waveform = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def synthesizer() -> Synthesizer:
    return Synthesizer()


@pytest.fixture(scope="module")
def heard() -> list[tuple[int, int]]:
    """The arguments of the calls of `progress` while `made` was made."""
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, heard: list[tuple[int, int]]) -> CorpusSummary:
    folder = tmp_path_factory.mktemp("corpus")
    return make_corpus(folder, minutes=1.5, seed=3, progress=lambda done, total: heard.append((done, total)))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.flac"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def power_spectrum(waveform: Waveform, rate: float) -> tuple[Waveform, Waveform]:
    window = np.hanning(len(waveform))
    return np.fft.rfftfreq(len(waveform), 1 / rate), np.abs(np.fft.rfft(window * waveform)) ** 2


def share(waveform: Waveform, rate: float, band: tuple[float, float], of: tuple[float, float]) -> float:
    """The share of the power between two frequencies in the power between two others."""
    frequencies, power = power_spectrum(waveform, rate)
    inside, total = (power[(frequencies >= low) & (frequencies < high)].sum() for low, high in (band, of))
    return float(inside / total)


def envelope(waveform: Waveform) -> Waveform:
    """Loudness in frames of 10 ms, its mean removed."""
    frames = waveform[: len(waveform) // 160 * 160].reshape(-1, 160)
    loudness = np.sqrt(np.mean(frames**2, axis=1))
    return loudness - loudness.mean()


def pitch(waveform: Waveform) -> float:
    """The median over loud frames of the strongest period between 60 and 400 Hz, in Hz."""
    found = []
    for start in range(0, len(waveform) - 1024, 320):
        frame = waveform[start : start + 1024] * np.hanning(1024)
        if np.abs(frame).max() > 0.1:
            lags = np.correlate(frame, frame, "full")[1023:][40:267]
            found.append(SAMPLE_RATE / (40 + lags.argmax()))
    return float(np.median(found))


def test_same_voice_repeats_identically_whatever_was_said_between(synthesizer: Synthesizer) -> None:
    first = synthesizer.speak(SENTENCE, LOW)
    synthesizer.speak("Something else.", HIGH)
    assert np.array_equal(first, synthesizer.speak(SENTENCE, LOW))
    assert np.array_equal(first, Synthesizer().speak(SENTENCE, LOW))


@pytest.mark.parametrize("voice", corpus.VOICES, ids=lambda voice: voice.name)
def test_every_speaker_repeats_identically(synthesizer: Synthesizer, voice: Voice) -> None:
    sentence = corpus.SENTENCES.get(voice.language, corpus.ENGLISH).split(".")[0]
    assert np.array_equal(synthesizer.speak(sentence, voice), synthesizer.speak(sentence, voice))


def test_speech_is_float32_of_a_plausible_length(synthesizer: Synthesizer) -> None:
    speech = synthesizer.speak(SENTENCE, LOW)
    assert speech.dtype == np.float32
    assert 2 < len(speech) / SAMPLE_RATE < 5
    assert 0.1 < np.abs(speech).max() < 1


def test_voices_differ_in_pitch_and_colour(synthesizer: Synthesizer) -> None:
    low, high = synthesizer.speak(SENTENCE, LOW), synthesizer.speak(SENTENCE, HIGH)
    assert 80 < pitch(low) < 140 < pitch(high) < 260
    above_4_khz = [share(speech, SAMPLE_RATE, (4000, 8000), (0, 8000)) for speech in (low, high)]
    assert above_4_khz[1] > 1.2 * above_4_khz[0]


@pytest.mark.parametrize(
    ("change", "bounds"), [({"pitch": 70}, (1.1, 1.6)), ({"rate": 200}, (0.9, 1.1))], ids=["pitch", "rate"]
)
def test_pitch_parameter_moves_the_pitch(
    synthesizer: Synthesizer, change: dict[str, int], bounds: tuple[float, float]
) -> None:
    plain = synthesizer.speak(SENTENCE, LOW)
    changed = synthesizer.speak(SENTENCE, replace(LOW, **change))
    assert bounds[0] < pitch(changed) / pitch(plain) < bounds[1]
    assert (len(changed) < 0.95 * len(plain)) == ("rate" in change)


@pytest.mark.parametrize("voice", [LOW, HIGH], ids=lambda voice: voice.name)
def test_speech_has_the_spectrum_and_the_rhythm_of_speech(synthesizer: Synthesizer, voice: Voice) -> None:
    sentences = corpus.ENGLISH.strip().splitlines()[:3]
    speech = synthesizer.speak(" ".join(sentences), voice)
    assert share(speech, SAMPLE_RATE, (0, 4000), (0, 8000)) > 0.9
    assert share(envelope(speech), 100, (3, 8), (0.5, 50)) > 0.3  # syllables a second


def test_steady_tones_fail_the_rhythm_that_speech_passes() -> None:
    seconds = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    beeps = 0.3 * np.sin(2 * np.pi * 440 * seconds) * (seconds % 1 < 0.5)
    assert share(envelope(beeps), 100, (3, 8), (0.5, 50)) < 0.2


@pytest.mark.parametrize("part", ["language", "variant"])
def test_unknown_voice_is_named(synthesizer: Synthesizer, part: str) -> None:
    with pytest.raises(ValueError, match=rf"'low'.*{part} 'nowhere'"):
        synthesizer.speak(SENTENCE, replace(LOW, **{part: "nowhere"}))


def test_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingDependencyError, match=r"espeakng-loader.*nestcli\[demo\]"):
        Synthesizer()


def test_missing_data_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(MissingDependencyError, match="phontab is missing"):
        Synthesizer()


@pytest.mark.parametrize("folder", ["two words", "x" * 200], ids=["space", "long"])
def test_data_may_lie_under_any_path(
    synthesizer: Synthesizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str
) -> None:
    there = tmp_path / folder / "espeak-ng-data"
    there.parent.mkdir()
    there.symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(there))
    assert np.array_equal(Synthesizer().speak(SENTENCE, LOW), synthesizer.speak(SENTENCE, LOW))


def test_every_sentence_fits_into_an_utterance(synthesizer: Synthesizer) -> None:
    longest_pause = 0.4
    limit = corpus.LONGEST - corpus.SHORTEST - longest_pause  # then one more after a short one fits too
    slowest = [replace(voice, rate=round(0.93 * voice.rate)) for voice in corpus.VOICES]
    speakers = {min((v for v in slowest if v.language == lang), key=lambda v: v.rate) for lang in corpus.SENTENCES}
    speakers.add(min(slowest, key=lambda voice: voice.rate))
    for voice in speakers:
        for sentence in corpus.SENTENCES.get(voice.language, corpus.ENGLISH).strip().splitlines():
            assert 1 < len(synthesizer.speak(sentence, voice)) / SAMPLE_RATE < limit, sentence


def test_corpus_is_the_same_for_the_same_seed(made: CorpusSummary, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    make_corpus(again, minutes=1.5, seed=3)
    make_corpus(other, minutes=0.1, seed=4)
    assert digests(again) == digests(made.speech.parent)
    assert set(digests(again).values()).isdisjoint(digests(other).values())


def test_corpus_has_many_speakers_with_utterances_of_2_to_8_seconds(made: CorpusSummary) -> None:
    assert len(made.speakers) >= 12
    assert sorted(made.speakers) == sorted(folder.name for folder in made.speech.iterdir())
    for file in made.speech.rglob("*.flac"):
        info = sf.info(file)
        assert file.name.startswith(f"{file.parent.name}_")
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 2 <= info.duration <= 8


def test_summary_counts_what_was_written(made: CorpusSummary) -> None:
    for folder, files, seconds in (
        (made.speech, made.utterances, made.speech_seconds),
        (made.noise, made.noise_files, made.noise_seconds),
    ):
        durations = [sf.info(file).duration for file in folder.rglob("*.flac")]
        assert len(durations) == files
        assert sum(durations) == pytest.approx(seconds)
    assert 90 <= made.speech_seconds < 90 + len(made.speakers)


def test_noises_are_of_many_kinds_and_10_to_20_seconds(made: CorpusSummary) -> None:
    kinds = {folder.name for folder in made.noise.iterdir()}
    assert kinds == {"white", "pink", "brown", "hum", "rain", "machine", "babble"}
    assert all(10 <= sf.info(file).duration <= 20 for file in made.noise.rglob("*.flac"))


def test_nothing_clips_and_nothing_is_silent(made: CorpusSummary) -> None:
    for file in [*made.speech.rglob("*.flac"), *made.noise.rglob("*.flac")]:
        waveform, _ = sf.read(file)
        assert np.abs(waveform).max() < 0.95, file
        assert -32 < 10 * np.log10(np.mean(waveform**2)) < -18, file


@pytest.mark.parametrize(("slope", "decibels"), [(0, 0), (1, -3.01), (2, -6.02)])
def test_coloured_noise_falls_by_its_slope_an_octave(slope: float, decibels: float) -> None:
    noise = corpus.coloured(np.random.default_rng(0), 20 * SAMPLE_RATE, slope)
    frequencies, power = power_spectrum(noise, SAMPLE_RATE)
    octaves = [power[(frequencies >= low) & (frequencies < 2 * low)].mean() for low in (250, 500, 1000, 2000)]
    assert np.diff(10 * np.log10(octaves)) == pytest.approx([decibels] * 3, abs=0.3)


def test_progress_counts_seconds_up_to_the_length_asked_for(made: CorpusSummary, heard: list[tuple[int, int]]) -> None:
    assert len(heard) == made.utterances
    assert heard == sorted(heard)
    assert heard[-1] == (90, 90)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_length_must_be_positive(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ValueError, match="minutes"):
        make_corpus(tmp_path, minutes=minutes, seed=0)
