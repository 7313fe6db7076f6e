"""Reading audio, and finding out what is wrong with it."""

import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr

from nestcli.audio import load
from nestcli.audio.inspect import inspect_audio
from nestcli.audio.load import load_audio
from nestcli.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "audio"
RATE = 16000
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings are not here")
needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="the program sox is not installed")


def tone(seconds=1.0, rate=RATE, channels=1, level=0.3):
    times = np.arange(int(seconds * rate)) / rate
    columns = [level * np.sin(2 * math.pi * (220 + 110 * c) * times) for c in range(channels)]
    return np.stack(columns, axis=1) if channels > 1 else columns[0]


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


@pytest.fixture
def write(tmp_path):
    def make(name="a.wav", samples=None, rate=RATE, **how):
        path = tmp_path / name
        sf.write(path, tone(rate=rate) if samples is None else samples, rate, **how)
        return path

    return make


# --- load_audio


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.wav", {}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.flac", {}),
        ("a.aiff", {}),
        ("a.sph", {"format": "NIST", "subtype": "PCM_16"}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
    ],
)
def test_load_gives_what_soundfile_gives(write, name, how):
    path = write(name, **how)
    theirs, _ = sf.read(path, dtype="float32")
    ours = load_audio(path, sample_rate=RATE)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-7 if name == "a.mp3" else 0)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
def test_a_slice_is_the_same_part_of_the_whole(write, name):
    path = write(name, tone(3.0))
    whole = load_audio(path, sample_rate=RATE)
    offset, duration = 1.23456, 0.98765
    start, count = int(offset * RATE), int(duration * RATE)
    part = load_audio(path, sample_rate=RATE, offset=offset, duration=duration)
    np.testing.assert_allclose(part, whole[start : start + count], atol=1e-6)


@pytest.mark.parametrize("how", [{"bitrate_mode": "VARIABLE"}, {"bitrate_mode": "CONSTANT"}])
@pytest.mark.parametrize("level", [0.0, 0.9])
def test_mp3_decodes_the_same_in_slices_and_blocks(write, monkeypatch, how, level):
    """After a seek the decoder lacks earlier frames, and soundfile seeks after every read."""
    path = write("a.mp3", tone(8.0), **how, compression_level=level)
    whole, _ = sf.read(path, dtype="float32")
    for start in (5_000, 20_000, 50_001, 77_777):
        part = load_audio(path, sample_rate=RATE, offset=(start + 0.5) / RATE, duration=1.0)
        np.testing.assert_allclose(part, whole[start : start + RATE], atol=1e-5)
    monkeypatch.setattr(load, "_LOAD_BLOCK", 1000)
    np.testing.assert_allclose(load_audio(path, sample_rate=RATE), whole, atol=1e-5)


def test_channels_are_averaged_and_cancel(write):
    samples = tone(channels=3)
    path = write("a.wav", samples, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path, sample_rate=RATE), samples.mean(axis=1), atol=1e-6)
    opposite = np.stack([tone(), -tone()], axis=1)
    assert inspect_audio(write("b.wav", opposite, subtype="FLOAT")).reason == "silent"


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_other_rates_are_resampled_to_the_length_librosa_gives(write, rate):
    samples = tone(0.7123, rate).astype(np.float32)
    path = write("a.wav", samples, rate, subtype="FLOAT")
    ours = load_audio(path, sample_rate=RATE)
    assert len(ours) == math.ceil(len(samples) * (RATE / rate))
    theirs = soxr.resample(samples, rate, RATE, quality="HQ")
    np.testing.assert_array_equal(ours[: len(theirs)], theirs[: len(ours)])


def test_a_long_file_read_in_blocks_is_the_same(write, monkeypatch):
    path = write("a.wav", tone(2.0, channels=2))
    whole = load_audio(path, sample_rate=RATE)
    monkeypatch.setattr(load, "_LOAD_BLOCK", 1000)
    np.testing.assert_array_equal(load_audio(path, sample_rate=RATE), whole)
    part = load_audio(path, sample_rate=RATE, offset=0.5, duration=0.25)
    np.testing.assert_array_equal(part, whole[8000:12000])


def test_duration_beyond_the_end_gives_what_there_is(write):
    assert len(load_audio(write(), sample_rate=RATE, offset=0.5, duration=9.0)) == RATE // 2


@pytest.mark.parametrize("offset", [1.0, 5.0])
def test_offset_at_or_beyond_the_end_is_an_error(write, offset):
    path = write()
    with pytest.raises(DataError, match="the file lasts 1 s") as error:
        load_audio(path, sample_rate=RATE, offset=offset)
    assert str(path) in str(error.value)
    assert "prepare-data" in str(error.value)


@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "html", "empty", "header only", "many channels"])
def test_what_cannot_be_read_is_a_data_error(tmp_path, write, what):
    path = tmp_path / "bad.wav"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "html":
        path.write_text("<html><body>404</body></html>" * 50)
    elif what == "empty":
        path.touch()
    elif what == "header only":
        write("bad.wav", np.zeros(0))
    elif what == "many channels":
        write("bad.wav", np.full((100, 64), 0.1))
    with pytest.raises(DataError, match=r"bad\.wav"):
        load_audio(path, sample_rate=RATE)


@pytest.mark.parametrize(
    "name", ["-", "-n", "|touch x", "a b'\"$(touch x).wav", "new\nline.wav", "*.wav", "é.wav", "a.raw"]
)
def test_names_are_taken_literally(tmp_path, write, monkeypatch, name):
    shutil.move(write("plain.wav"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(load_audio(name, sample_rate=RATE)) == RATE
    assert inspect_audio(name).reason is None
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_name_that_is_not_utf8_is_read(tmp_path, write):
    path = write().rename(tmp_path / os.fsdecode(b"\xe9.wav"))
    assert len(load_audio(path, sample_rate=RATE)) == RATE


def test_no_descriptor_is_left_open(tmp_path, write):
    good, bad = write(), tmp_path / "bad.wav"
    bad.write_bytes(b"nothing")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        inspect_audio(good), inspect_audio(bad), inspect_audio(tmp_path), load_audio(good, sample_rate=8000)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# --- inspect_audio


def test_a_good_file_is_measured(write):
    report = inspect_audio(write("a.wav", tone(1.5, 44100, 2), 44100))
    assert (report.sample_rate, report.channels, report.frames) == (44100, 2, 66150)
    assert report.duration == pytest.approx(1.5)
    assert report.reason is None
    assert report.detail == ""
    mono = tone(1.5, 44100, 2).mean(axis=1)
    assert report.peak == pytest.approx(np.abs(mono).max(), abs=1e-3)
    assert report.rms_db == pytest.approx(10 * np.log10(np.mean(mono**2)), abs=0.01)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.wav", {}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"format": "WAVEX"}),
        ("a.wav", {"endian": "BIG"}),
        ("a.aiff", {}),
        ("a.sph", {"format": "NIST", "subtype": "PCM_16"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.opus", {"format": "OGG", "subtype": "OPUS"}),
        ("a.mp3", {}),
        ("a.au", {}),
        ("a.au", {"endian": "LITTLE"}),
        ("a.w64", {}),
        ("a.rf64", {}),
        ("a.caf", {"subtype": "PCM_16"}),
        ("a.voc", {"subtype": "PCM_16"}),
    ],
)
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_half_a_file_is_noticed(write, name, how, share):
    rng = np.random.default_rng(0)
    path = write(name, 0.1 * rng.standard_normal(5 * RATE), **how)
    report = inspect_audio(cut(path, share))
    # libsndfile itself finds out that much of a CAF is missing
    assert report.reason == (None if share == 1.0 else "unreadable" if "malformed" in report.detail else "truncated")


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.0])
def test_a_short_mp3_without_its_last_tenth_is_noticed(write, rate, seconds):
    path = write("a.mp3", 0.1 * np.random.default_rng(0).standard_normal(int(seconds * rate)), rate)
    content = path.read_bytes()
    for behind in (b"", b"TAG" + bytes(125)):
        path.write_bytes(content + behind)
        assert inspect_audio(path).reason is None
    assert inspect_audio(cut(path, 0.9 * len(content) / path.stat().st_size)).reason == "truncated"


def test_a_flac_that_states_no_length_is_whole(write):
    """Encoders that write into a pipe cannot go back to state the length."""
    path = write("a.flac", 0.1 * np.random.default_rng(0).standard_normal(3 * RATE))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    report = inspect_audio(path)
    assert (report.reason, report.frames) == (None, 3 * RATE)
    assert load.audio_duration(path) == (3.0, "", "")
    assert len(load_audio(path, sample_rate=RATE)) == 3 * RATE
    assert inspect_audio(cut(path)).reason == "truncated"


def test_an_au_from_a_pipe_is_whole(write):
    path = write("a.au")
    content = bytearray(path.read_bytes())
    content[8:12] = b"\xff" * 4
    path.write_bytes(content)
    assert inspect_audio(path).reason is None


def test_a_socket_is_no_file(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a.wav"))
        assert inspect_audio(tmp_path / "a.wav").reason == "not_a_file"


def test_a_wav_with_trailing_chunks_or_a_pipes_header_is_whole(write):
    path = write()
    content = bytearray(path.read_bytes())
    path.write_bytes(content + b"LIST\x04\x00\x00\x00INFO")
    assert inspect_audio(path).reason is None
    for unknown in (b"\xff\xff\xff\xff", b"\x00\xf0\xff\x7f"):
        position = content.index(b"data")
        content[position + 4 : position + 8] = unknown
        path.write_bytes(content)
        report = inspect_audio(path)
        assert (report.reason, report.frames) == (None, RATE)


def test_a_header_that_declares_2_to_the_36_frames_takes_no_memory(write):
    path = write("a.flac")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the 36 bits of STREAMINFO's number of samples
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    assert sf.info(path).frames == 2**36 - 1
    report = inspect_audio(path)
    assert report.reason in ("truncated", "unreadable")
    assert len(load_audio(path, sample_rate=RATE, duration=0.5)) == RATE // 2


def test_a_flac_damaged_in_the_middle_is_unreadable(write):
    path = write("a.flac", 0.1 * np.random.default_rng(0).standard_normal(10 * RATE))
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 500] = bytes(500)
    path.write_bytes(content)
    report = inspect_audio(path)
    assert (report.reason, "damaged" in report.detail) == ("unreadable", True)


def test_an_mp3_without_its_length_is_not_quietly_cut(write):
    silence_first = np.concatenate([np.zeros(RATE), 0.3 * np.random.default_rng(0).standard_normal(8 * RATE)])
    path = write("a.mp3", silence_first, bitrate_mode="VARIABLE")
    content = path.read_bytes()
    second_frame = content.index(content[:2], 4)
    path.write_bytes(content[second_frame:])
    report = inspect_audio(path)
    assert report.frames > 8.9 * RATE or report.reason == "truncated"


@pytest.mark.parametrize(
    ("samples", "rate", "reason"),
    [
        (np.zeros(RATE), RATE, "silent"),
        (np.full(RATE, 1e-6), RATE, "silent"),
        (np.r_[tone(), np.nan], RATE, "not_finite"),
        (np.r_[tone(), np.inf], RATE, "not_finite"),
        (np.zeros(0), RATE, "empty"),
        (tone(), 999, "bad_rate"),
        (tone(), 2**31 - 1, "bad_rate"),
        (np.full((100, 33), 0.1), RATE, "too_many_channels"),
        (np.full((100, 32), 0.1), RATE, None),
        (tone(), 1000, None),
        (tone(), 768_000, None),
    ],
)
def test_reasons(write, samples, rate, reason):
    report = inspect_audio(write("a.wav", samples, rate, subtype="FLOAT"))
    assert report.reason == reason
    assert bool(report.detail) == (reason is not None)


def test_reasons_for_what_is_no_audio(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "html.wav").write_text("<html>" * 100)
    (tmp_path / "noise.gsm").write_text("<html>" * 100)
    (tmp_path / "link.wav").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    reasons = {
        "empty.wav": "empty",
        "html.wav": "unreadable",
        "noise.gsm": "unreadable",
        "link.wav": "missing",
        "pipe.wav": "not_a_file",
        "gone.wav": "missing",
        "html.wav/x.wav": "missing",
        ".": "not_a_file",
    }
    assert {name: inspect_audio(tmp_path / name).reason for name in reasons} == reasons
    assert inspect_audio("/dev/zero").reason == "not_a_file"
    assert inspect_audio("nul\0byte.wav").reason == "unreadable"


@needs_shared
def test_every_odd_file_is_read_or_rejected_for_its_reason():
    expected = {
        "alexa_128.flac": "unreadable",
        "missing_wav_header.wav": "unreadable",
        "testing.m4a": "unreadable",
        "null.wav": "empty",
    }
    lines = (SHARED / "odd" / "manifest.tsv").read_text().splitlines()[1:]
    names = [line.split("\t")[0].removeprefix("odd/") for line in lines]
    assert len(names) == 14
    for name in names:
        report = inspect_audio(SHARED / "odd" / name)
        assert report.reason == expected.get(name), f"{name}: {report}"
        if report.reason is None:
            samples = load_audio(SHARED / "odd" / name, sample_rate=RATE)
            assert len(samples) / RATE == pytest.approx(report.duration, abs=0.01)


# --- SoX


def by_sox(source, target):
    subprocess.run(["sox", str(source), "-r", "8000", str(target)], check=True, capture_output=True)
    return target


@needs_sox
@pytest.mark.parametrize(("kind", "name"), [("amr-nb", "a.amr"), ("gsm", "-a.gsm"), ("wv", "|a $(x)*.wv")])
def test_sox_reads_what_libsndfile_does_not(write, tmp_path, monkeypatch, kind, name):
    written = tmp_path / f"written.{kind}"
    try:
        by_sox(write("plain.wav", tone(2.0)), written)
    except subprocess.CalledProcessError:
        pytest.skip(f"this sox cannot write {kind}")
    (tmp_path / "folder").mkdir()
    shutil.move(written, tmp_path / "folder" / name)
    monkeypatch.chdir(tmp_path / "folder")
    report = inspect_audio(name)
    assert (report.reason, report.sample_rate) == (None, 8000)
    assert len(load_audio(name, sample_rate=RATE, offset=0.5, duration=1.0)) == RATE
    assert [path.name for path in Path().iterdir()] == [name]


@needs_sox
def test_a_file_that_sox_fails_on_is_unreadable(write, tmp_path):
    path = cut(by_sox(write("plain.wav", tone(2.0)), tmp_path / "a.wv"))
    report = inspect_audio(path)
    assert (report.reason, "SoX" in report.detail) == ("unreadable", True)


def test_without_sox_the_remedy_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "a.amr"
    path.write_bytes(b"#!AMR\n" + bytes(100))
    report = inspect_audio(path)
    assert report.reason == "unreadable"
    assert "install" in report.detail
    assert "ffmpeg" in report.detail
    assert capfd.readouterr() == ("", "")


def test_reading_ordinary_audio_does_not_import_sox(write):
    code = (
        "import sys; from nestcli.audio.inspect import inspect_audio;"
        f"assert inspect_audio({str(write())!r}).reason is None; assert 'sox' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
