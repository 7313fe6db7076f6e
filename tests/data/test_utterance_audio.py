"""Noise clips: their files, the substitute for silence, and NeMo's draws from NumPy's generator."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from conftest import GOLDEN
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.utterance_audio import NoisePool
from nestcli.errors import DataError

RATE = 16000
RECORDED = json.loads((GOLDEN / "noise_draws.json").read_text())["cases"]


def pool_of(folder: Path, lines: list[dict]) -> NoisePool:
    path = folder / "noise.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return NoisePool(read_manifests(str(path)), RATE)


def one_file(folder: Path, samples: np.ndarray, **line) -> NoisePool:
    sf.write(folder / "n.wav", samples, RATE, subtype="FLOAT")
    return pool_of(folder, [{"audio_filepath": "n.wav", "duration": len(samples) / RATE, **line}])


@pytest.fixture(scope="module")
def recorded_noise(tmp_path_factory) -> NoisePool:
    """The files of `write_sounds` in tests/golden/record_nemo.py."""
    folder = tmp_path_factory.mktemp("noise")
    lines = []
    for number, (seconds, level, shift) in enumerate(
        ((0.5, 3000, 0), (2, 900, 40), (5, 200, 0), (3, 0, 0), (3, 90, -700))
    ):
        places = np.arange(int(seconds * RATE), dtype=np.int64)
        samples = (places * (places + 7 * number + 3) % 2039 - 1019) * level // 1019 + shift
        sf.write(folder / f"{number}.wav", samples.astype(np.int16), RATE, subtype="PCM_16")
        lines.append({"audio_filepath": f"{number}.wav", "duration": float(seconds)})
    lines[2] |= {"offset": 1.5, "duration": 3.5}
    lines[0] |= {"offset": 0.1, "duration": 0.3}
    return pool_of(folder, [*lines, {"audio_filepath": "gone.wav", "duration": 4.0}])


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['seed']}-{case['samples']}")
def test_draws_like_nemo_are_the_recorded_ones(recorded_noise: NoisePool, case: dict) -> None:
    state = np.random.RandomState(case["seed"])
    for length, total, energy, first, last in case["clips"]:
        clip = recorded_noise.draw_like_nemo(case["samples"], state).samples
        exact = clip.astype(np.float64)
        assert clip.dtype == np.float32
        assert (len(clip), exact[0], exact[-1]) == (length, first, last)
        assert exact.sum() == pytest.approx(total, rel=1e-9, abs=1e-9)
        assert (exact**2).sum() == pytest.approx(energy, rel=1e-9)
    assert state.random_sample() == case["next_draw"], "another number of draws than NeMo"


def test_like_nemo_nothing_readable_is_silence(tmp_path: Path) -> None:
    pool = pool_of(tmp_path, [{"audio_filepath": "gone.wav", "duration": 4.0}])
    clip = pool.draw_like_nemo(100, np.random.RandomState(0))
    assert (len(clip.samples), clip.line) == (100, None)
    assert not clip.samples.any()
    assert len(pool.take_skipped()) == 20


def test_a_clip_says_where_it_is_from(tmp_path: Path) -> None:
    ramp = np.arange(1, 3 * RATE + 1, dtype=np.float32) / (4 * RATE)
    pool, rng = one_file(tmp_path, ramp, offset=1.0, duration=1.5), random.Random(0)
    starts = set()
    for _ in range(50):
        clip = pool.draw(RATE, rng)
        start = int(clip.offset * RATE)
        assert np.array_equal(clip.samples, ramp[start : start + RATE])
        assert RATE <= start <= 1.5 * RATE
        starts.add(start)
    assert len(starts) > 40
    assert clip.line == 0


def test_the_beginning_of_a_clip_is_that_of_the_whole(tmp_path: Path) -> None:
    pool = one_file(tmp_path, np.random.default_rng(0).standard_normal(3 * RATE))
    for seed in range(20):
        whole, part = (pool.draw(RATE, random.Random(seed), keep) for keep in (None, 777 * seed + 1))
        assert np.array_equal(whole.samples[: 777 * seed + 1], part.samples)
        assert whole.offset == part.offset


def test_a_short_line_is_given_whole(tmp_path: Path) -> None:
    pool = one_file(tmp_path, np.ones(500, np.float32) / 3)
    assert len(pool.draw(RATE, random.Random(0)).samples) == 500


def test_silence_is_replaced_by_faint_noise_and_an_offset_of_zero_sum_is_not(tmp_path: Path) -> None:
    clip = one_file(tmp_path, np.zeros(2 * RATE)).draw(RATE, random.Random(0))
    level = 10 * np.log10((clip.samples**2).mean())
    assert -91 < level < -45
    assert clip.line is None
    below = np.full(2 * RATE, -0.02, np.float32)  # NeMo tries such a file 100 times
    assert np.array_equal(one_file(tmp_path, below).draw(RATE, random.Random(0)).samples, below[:RATE])
    balanced = np.tile(np.float32([0.5, -0.5]), RATE)
    assert one_file(tmp_path, balanced).draw(RATE, random.Random(0)).line == 0


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = np.full(RATE, 0.5, np.float32), np.full(RATE, 0.25, np.float32)
    clip = one_file(tmp_path, np.stack([left, right], axis=1)).draw(100, random.Random(0))
    assert np.allclose(clip.samples, 0.375)


def test_lines_that_cannot_be_read_are_passed_over_and_told(tmp_path: Path) -> None:
    sf.write(tmp_path / "n.wav", np.full(RATE, 0.5), RATE)
    lines = [{"audio_filepath": name, "duration": 1.0} for name in ("gone.wav", "n.wav")]
    pool, rng = pool_of(tmp_path, lines), random.Random(0)
    assert all(pool.draw(100, rng).line == 1 for _ in range(20))
    skipped = pool.take_skipped()
    assert skipped
    assert {each.audio for each in skipped} == {"gone.wav"}
    assert pool.take_skipped() == []
    with pytest.raises(DataError, match="none of 20 noise files"):
        NoisePool(replace(pool.manifest.select([0])), RATE).draw(100, rng)


@pytest.mark.parametrize("line", [{}, {"offset": 1.0}, {"duration": None}])
def test_a_line_without_a_duration_is_all_of_its_file(tmp_path: Path, line: dict) -> None:
    samples = (np.arange(4 * RATE) / (4 * RATE)).astype(np.float32)
    start = line.get("offset", 0.0)
    stated = one_file(tmp_path, samples, offset=start, duration=4 - start)
    (tmp_path / "short.json").write_text(json.dumps({"audio_filepath": "n.wav", **line}) + "\n")
    pool = NoisePool(read_manifests(str(tmp_path / "short.json"), require_duration=False), RATE)
    for seed in range(20):
        clip, expected = pool.draw(RATE, random.Random(seed)), stated.draw(RATE, random.Random(seed))
        assert clip.offset == expected.offset
        assert np.array_equal(clip.samples, expected.samples)
    assert np.array_equal(pool.draw(9 * RATE, random.Random(0)).samples, samples[int(start * RATE) :])
    assert np.isnan(pool.manifest.durations).all(), "others read the same manifest"


def test_like_nemo_a_line_without_a_duration_is_read_from_its_beginning(tmp_path: Path) -> None:
    samples = np.linspace(0.1, 0.9, 4 * RATE, dtype=np.float32)
    sf.write(tmp_path / "n.wav", samples, RATE, subtype="FLOAT")
    (tmp_path / "noise.json").write_text(json.dumps({"audio_filepath": "n.wav", "offset": 0.5}) + "\n")
    pool = NoisePool(read_manifests(str(tmp_path / "noise.json"), require_duration=False), RATE)
    state = np.random.RandomState(0)
    clip = pool.draw_like_nemo(RATE, state)
    assert np.array_equal(clip.samples, samples[RATE // 2 : RATE // 2 + RATE])
    expected = np.random.RandomState(0)
    expected.randint(1)
    assert state.random_sample() == expected.random_sample(), "NeMo draws no place in such a file"


def test_noise_without_a_duration_whose_file_is_gone_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "noise.json").write_text('{"audio_filepath": "gone.wav"}\n')
    pool = NoisePool(read_manifests(str(tmp_path / "noise.json"), require_duration=False), RATE)
    with pytest.raises(DataError, match=r"none of 20 noise files drawn can be read.*no such file"):
        pool.draw(RATE, random.Random(0))
