"""Cutting and converting: one pass, bounded memory, one name for one content."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.audio.load import load_audio, resampled, stream_audio
from nestcli.data.manifest import write_manifest
from nestcli.errors import DataError, RunFailedError
from nestcli.prepare.pipeline import PrepareOptions, prepare
from nestcli.prepare.segment import ShapeOptions, ShapeTask, _cut, _shape_one

RATE = 16000


def noise(seconds, seed=0, *, rate=RATE, channels=1):
    return 0.1 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels))


def rows(out, side="train"):
    return [json.loads(line) for line in (out / f"{side}_manifest.json").read_text().splitlines()]


def options(**changes):
    return PrepareOptions(**{"val_fraction": 0, "convert": True, "jobs": 1, **changes})


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("channel", [None, 1])
def test_blocks_are_what_load_audio_reads_at_once(tmp_path, rate, channel):
    """To the bit, over several blocks, from the middle of a file."""
    path = tmp_path / "a.wav"
    sf.write(path, noise(14, rate=rate, channels=2), rate)
    whole = load_audio(path, sample_rate=RATE, offset=0.3, duration=13.1, channel=channel)
    with stream_audio(path, offset=0.3, duration=13.1, channel=channel) as (file_rate, blocks):
        parts = list(resampled(blocks, file_rate, RATE))
    assert file_rate == rate
    assert len(parts) > 1 or rate < 11025
    assert np.array_equal(np.concatenate(parts), whole)


def test_streaming_names_what_is_wrong(tmp_path):
    sf.write(tmp_path / "a.wav", noise(1), RATE)
    for path, offset, said in (("gone.wav", 0, "no such file"), ("a.wav", 2.0, "no audio to read at 2 s")):
        with pytest.raises(DataError, match=said), stream_audio(tmp_path / path, offset=offset):
            pass


def test_converted_files_are_what_the_whole_would_give(tmp_path):
    (tmp_path / "in").mkdir()
    for name, rate in (("a.wav", 44100), ("b.flac", 16000)):
        sf.write(tmp_path / "in" / name, noise(2, rate=rate, channels=2), rate)
    prepare([tmp_path / "in"], tmp_path / "out", options())
    for row, name in zip(rows(tmp_path / "out"), ("a.wav", "b.flac"), strict=True):
        sf.write(tmp_path / "whole.flac", load_audio(tmp_path / "in" / name, sample_rate=RATE), RATE)
        assert np.array_equal(sf.read(row["audio_filepath"])[0], sf.read(tmp_path / "whole.flac")[0])


def test_16_bits_stay_what_they_are(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, RATE).astype(np.int16)
    samples[100:104] = 32767
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "a.wav", samples, RATE)
    prepare([tmp_path / "in"], tmp_path / "out", options())
    assert np.array_equal(sf.read(rows(tmp_path / "out")[0]["audio_filepath"], dtype="int16")[0], samples)


def test_a_long_recording_takes_no_more_memory_than_a_block(tmp_path):
    path = tmp_path / "long.wav"
    with sf.SoundFile(path, "w", 48000, 1) as sound:
        for _ in range(10):
            sound.write(np.tile(noise(1, rate=48000), (20, 1)))
    tracemalloc.start()
    with stream_audio(path) as (rate, blocks):
        pieces = sum(1 for _ in _cut(resampled(blocks, rate, RATE), 200.0, 10.0, RATE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pieces >= 20
    assert peak < 12e6  # bytes; all of it would be 51e6 as it is read and 38e6 more as it is decoded


@pytest.mark.parametrize("segment", [0.5, 1.0, 3.3, 7.0, 12.0])
def test_pieces_are_short_enough_and_all_there_is(segment):
    rng = np.random.default_rng(0)
    for _ in range(20):
        seconds = float(rng.uniform(0.05, 12))
        samples = noise(seconds, rate=1000)[:, 0].astype(np.float32)
        pieces = list(_cut([samples], len(samples) / 1000, segment, 1000))
        size = int(rng.integers(50, 3000))
        blocks = [samples[start : start + size] for start in range(0, len(samples), size)]
        in_blocks = list(_cut(blocks, len(samples) / 1000, segment, 1000))
        assert [len(piece) for piece in pieces] == [len(piece) for piece in in_blocks]
        assert np.array_equal(np.concatenate(in_blocks), samples)
        assert max(map(len, pieces)) <= segment * 1000
        assert len(pieces) == 1 or min(map(len, pieces)) >= 0.2 * segment * 1000


def test_a_wrongly_stated_length_does_not_make_longer_pieces():
    samples = noise(5, rate=1000)[:, 0].astype(np.float32)
    for stated in (0.5, 1.0, 4.9, 5.1, 9.0):
        pieces = list(_cut([samples], stated, 1.0, 1000))
        assert np.array_equal(np.concatenate(pieces), samples)
        assert max(map(len, pieces)) <= 1000


def durations_on_disk(out):
    made = [(row["duration"], sf.info(row["audio_filepath"]).duration) for row in rows(out)]
    assert all(abs(said - is_there) < 1e-4 for said, is_there in made)
    return [said for said, _ in made]


def test_going_back_to_other_pieces_finds_the_right_audio(tmp_path):
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "a.wav", noise(6), RATE)
    first, second, again = [
        (prepare([tmp_path / "in"], tmp_path / "out", options(segment=segment)), durations_on_disk(tmp_path / "out"))[1]
        for segment in (1.5, 2.5, 1.5)
    ]
    assert first == again != second


def test_a_source_that_changed_is_converted_again(tmp_path):
    (tmp_path / "in").mkdir()
    contents = []
    for seed in (0, 1):
        sf.write(tmp_path / "in" / "a.wav", noise(1, seed), RATE)
        prepare([tmp_path / "in"], tmp_path / "out", options(shards=1))
        contents.append(sf.read(rows(tmp_path / "out")[0]["audio_filepath"])[0])
        tar = (tmp_path / "out" / "train_shards" / "audio_0.tar").read_bytes()
        assert Path(rows(tmp_path / "out")[0]["audio_filepath"]).read_bytes() in tar
    assert not np.array_equal(*contents)


def test_parts_a_moment_apart_have_files_of_their_own(tmp_path):
    sf.write(tmp_path / "a.wav", noise(2), RATE)
    parts = [{"audio_filepath": "a.wav", "offset": offset, "duration": 1.0} for offset in (0.1, 0.1001, 0.1004)]
    write_manifest(tmp_path / "m.json", parts)
    prepare([tmp_path / "m.json"], tmp_path / "out", options())
    assert len({row["audio_filepath"] for row in rows(tmp_path / "out")}) == 3


def test_a_deleted_or_shortened_conversion_is_made_again(tmp_path):
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "a.wav", noise(2), RATE)
    prepare([tmp_path / "in"], tmp_path / "out", options())
    made = Path(rows(tmp_path / "out")[0]["audio_filepath"])
    content = made.read_bytes()
    for damage in (made.unlink, lambda: made.write_bytes(content[:-1])):
        damage()
        prepare([tmp_path / "in"], tmp_path / "out", options())
        assert made.read_bytes() == content


def test_a_folder_of_the_users_is_neither_passed_over_nor_written_to(tmp_path):
    (tmp_path / "audio").mkdir()
    sf.write(tmp_path / "audio" / "a.wav", noise(1), RATE)
    assert prepare([tmp_path], tmp_path, PrepareOptions(val_fraction=0)).accepted == 1
    with pytest.raises(DataError, match="already holds files that nest did not write"):
        prepare([tmp_path], tmp_path, options())
    assert [path.name for path in (tmp_path / "audio").iterdir()] == ["a.wav"]
    (tmp_path / "audio").rename(tmp_path / "mine")
    for _ in range(2):  # files that the first run converted are not inputs of the second
        assert prepare([tmp_path], tmp_path, options()).accepted == 1


def test_a_folder_that_cannot_be_written_to_ends_the_run(tmp_path):
    """It is not taken for a fault of the recording."""
    sf.write(tmp_path / "a.wav", noise(1), RATE)
    (tmp_path / "file").touch()
    task = ShapeTask(str(tmp_path / "a.wav"), 0.0, 1.0, "a", ShapeOptions(folder=str(tmp_path / "file")))
    with pytest.raises(RunFailedError, match=r"cannot be written: .* Run the same command again"):
        _shape_one(task)
    assert isinstance(_shape_one(replace(task, path=str(tmp_path / "gone.wav")))[1], str)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"segment": float("inf")}, "pieces of inf s"),
        ({"segment": 0.0}, "pieces of 0 s"),
        ({"sample_rate": 0}, "Hz, not 0; give --sample-rate"),
        ({"channel": -1}, "channel -1 does not exist"),
    ],
)
def test_options_that_make_no_sense(tmp_path, changes, said):
    sf.write(tmp_path / "a.wav", noise(1), RATE)
    with pytest.raises(DataError, match=said):
        prepare([tmp_path / "a.wav"], tmp_path / "out", options(**changes))
