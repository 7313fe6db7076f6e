"""Audio: any part of any file equals what soundfile reads; damage is found, or the declared length is there."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import soxr
from hypothesis import given
from hypothesis import strategies as st

from fuzz.strategies import bounded, damaged
from nestcli.audio.inspect import inspect_audio
from nestcli.audio.load import load_audio, resampled, stream_audio
from nestcli.errors import DataError

FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "PCM_24"),
    ("WAV", "PCM_32"),
    ("WAV", "FLOAT"),
    ("WAV", "DOUBLE"),
    ("WAV", "PCM_U8"),
    ("WAV", "ULAW"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("AIFF", "PCM_16"),
    ("AU", "PCM_16"),
    ("W64", "FLOAT"),
    ("NIST", "PCM_16"),
    ("CAF", "PCM_24"),
    ("RF64", "PCM_16"),
]
LOSSY = [("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("OGG", "OPUS")]
RATES = [8000, 16000, 22050, 44100, 48000]
PAGE = (Path(__file__).parents[2] / "docs" / "prepare-data.md").read_text()
# the words in the first column of its tables: reasons, and some others
TABLE = [
    word for line in PAGE.splitlines() if line.startswith("| `") for word in re.findall(r"`(\w+)`", line.split("|")[1])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audio")


def noise(frames: int, channels: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels))


def reference(path: Path, rate: int, offset: float, duration: float | None) -> np.ndarray[Any, Any]:
    """Read the whole file with soundfile, then cut, average and resample it in one piece."""
    samples, own_rate = sf.read(path, dtype="float32", always_2d=True)
    start = int(offset * own_rate)
    mono = samples[start : None if duration is None else start + int(duration * own_rate)].mean(axis=1)
    if own_rate == rate:
        return mono
    length = math.ceil(len(mono) * (rate / own_rate))
    made = soxr.resample(mono, own_rate, rate, quality="HQ")
    return np.pad(made, (0, max(0, length - len(made))))[:length]


@given(
    kind=st.sampled_from(FORMATS),
    own_rate=st.sampled_from(RATES),
    rate=st.sampled_from([16000, 8000]),
    channels=st.integers(1, 3),
    frames=st.integers(1, 30_000),
    offset=st.floats(0, 1),
    part=st.none() | st.floats(0.001, 2),
)
@bounded(120)
def test_a_part_of_a_file_is_what_soundfile_reads(
    folder: Path,
    kind: tuple[str, str],
    own_rate: int,
    rate: int,
    channels: int,
    frames: int,
    offset: float,
    part: float | None,
) -> None:
    path = folder / "part.bin"
    sf.write(path, noise(frames, channels), own_rate, format=kind[0], subtype=kind[1])
    expected = reference(path, rate, offset, part)
    try:
        found = load_audio(path, sample_rate=rate, offset=offset, duration=part)
    except DataError as error:
        assert str(path) in str(error)
        assert int(offset * own_rate) >= frames or (part is not None and int(part * own_rate) == 0)
        return
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-6)
    with stream_audio(path, offset=offset, duration=part) as (stream_rate, blocks):
        pieces = list(resampled(blocks, stream_rate, rate))
    assert np.array_equal(np.concatenate(pieces), found)


@given(
    kind=st.sampled_from(FORMATS + LOSSY),
    own_rate=st.sampled_from([8000, 16000, 48000]),
    channels=st.integers(1, 2),
    frames=st.integers(1, 20_000),
)
@bounded(60)
def test_a_whole_file_is_accepted_with_its_declared_length(
    folder: Path, kind: tuple[str, str], own_rate: int, channels: int, frames: int
) -> None:
    path = folder / "whole.bin"
    sf.write(path, noise(frames, channels), own_rate, format=kind[0], subtype=kind[1])
    report = inspect_audio(path)
    declared = sf.info(path)
    assert (report.sample_rate, report.channels) == (declared.samplerate, declared.channels)
    assert report.reason is None, report
    assert report.frames == (declared.frames if kind in LOSSY else frames)
    assert len(load_audio(path, sample_rate=own_rate)) == report.frames


def stored(kind: tuple[str, str], frames: int = 3000, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, noise(frames, channels), 16000, format=kind[0], subtype=kind[1])
    return buffer.getvalue()


WHOLE = {kind: stored(kind) for kind in FORMATS + LOSSY}


@given(kind=st.sampled_from(FORMATS + LOSSY), content=st.data())
@bounded(250)
def test_damage_is_found_or_what_is_declared_is_there(
    folder: Path, kind: tuple[str, str], content: st.DataObject
) -> None:
    path = folder / "damaged.bin"
    path.write_bytes(content.draw(damaged(WHOLE[kind], [(0, 64)])))
    report = inspect_audio(path)
    if report.reason is not None:
        assert report.reason in TABLE
        assert report.detail
    if report.reason is None:
        assert math.isfinite(report.peak)
        assert 0 < report.frames <= 10 * 3000 * 16  # no more than the bytes can hold
        assert report.frames == sf.info(path).frames or kind in LOSSY
    try:
        samples = load_audio(path, sample_rate=report.sample_rate or 16000)
    except DataError as error:
        assert str(path) in str(error)
        assert report.reason is not None
        return
    assert samples.ndim == 1
    if report.reason is None:
        assert len(samples) == report.frames
        assert np.isfinite(samples).all()


@given(
    kind=st.sampled_from(
        [kind for kind in FORMATS if kind[0] in ("WAV", "FLAC", "AIFF", "NIST", "CAF", "AU", "W64", "RF64")]
    ),
    share=st.floats(0, 0.97),
)
@bounded(80)
def test_a_file_that_is_cut_off_is_never_accepted(folder: Path, kind: tuple[str, str], share: float) -> None:
    path = folder / "cut.bin"
    path.write_bytes(WHOLE[kind][: int(share * len(WHOLE[kind]))])
    assert inspect_audio(path).reason in ("truncated", "empty", "unreadable", "bad_rate", "silent")


@given(
    content=st.binary(max_size=200)
    | st.binary(max_size=60).map(lambda rest: b"RIFF\xff\xff\0\0WAVEfmt " + rest)
    | st.binary(max_size=60).map(lambda rest: b"fLaC\0\0\0\x22" + rest)
    | st.binary(max_size=60).map(lambda rest: b"OggS\0\2" + rest)
)
@bounded(120)
def test_any_bytes_have_a_reason(folder: Path, content: bytes) -> None:
    path = folder / "bytes.wav"
    path.write_bytes(content)
    report = inspect_audio(path)
    assert report.reason in TABLE or (report.reason is None and report.frames > 0)
