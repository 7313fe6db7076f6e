"""A file with more or less audio than its header or its manifest says is never accepted as intact."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.audio.inspect import inspect_audio
from nestcli.audio.load import AudioError, load_audio, reason_of, stated_slack
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.utterance_audio import read_audio
from nestcli.prepare.pipeline import PrepareOptions, prepare

RATE = 16000
G722 = struct.pack("<HHIIHHH", 0x28F, 1, RATE, 8000, 1, 4, 0)
PROGRAM = re.compile(r"`(ffmpeg|sox) [^`]*FILE[^`]*`")


def speech(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    times = np.arange(int(seconds * rate)) / rate
    tone = 0.1 * np.sin(2 * np.pi * 150 * times) * (1 + np.sin(6 * np.pi * times))
    return tone + np.random.default_rng(seed).normal(0, 0.02, len(times))


def encoded(folder: Path, seconds: float, seed: int = 0, rate: int = RATE, **how: object) -> bytes:
    """Return the bytes of a whole file."""
    path = folder / "whole"
    sf.write(path, speech(seconds, seed, rate), rate, **how)
    content = path.read_bytes()
    path.unlink()
    return content


def judged(path: Path) -> tuple[str | None, str]:
    """Return the reason of `inspect_audio`, and check that reading the whole file fails for the same one."""
    report = inspect_audio(path)
    if report.reason is None:
        assert len(load_audio(path, sample_rate=report.sample_rate)) == report.frames
    else:
        with pytest.raises(AudioError, match=re.escape(report.detail)) as error:
            load_audio(path, sample_rate=RATE)
        assert error.value.reason == report.reason
        assert PROGRAM.search(report.detail)
    return report.reason, report.detail


def patched(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


# --- several streams in one file


@pytest.mark.parametrize("lengths", [(3.0, 4.0), (1.0, 0.3), (2.0, 2.0), (0.5, 0.5)])
@pytest.mark.parametrize("how", [{"subtype": "VORBIS"}, {"subtype": "OPUS"}])
def test_chained_ogg_streams_are_found(tmp_path, how, lengths):
    first, second = (encoded(tmp_path, length, number, format="OGG", **how) for number, length in enumerate(lengths))
    path = tmp_path / "a.ogg"
    path.write_bytes(first)
    assert judged(path)[0] is None
    for content in (first + second, first + first, first + second + first):  # the same number twice, too
        path.write_bytes(content)
        reason, detail = judged(path)
        assert (reason, "several Ogg streams" in detail) == ("wrong_duration", True)


@pytest.mark.parametrize("lengths", [(3.0, 4.0), (60.0, 1.0), (2.0, 2.0), (0.3, 0.3)])
def test_joined_flacs_are_found(tmp_path, lengths):
    first, second = (encoded(tmp_path, length, number, format="FLAC") for number, length in enumerate(lengths))
    path = tmp_path / "a.flac"
    for content in (first + second, first + first):
        path.write_bytes(content)
        assert judged(path)[0] == "wrong_duration"
    for tag in (b"TAG" + bytes(range(125)), b"x" * 50_000):
        path.write_bytes(first + tag)
        assert judged(path)[0] is None


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_joined_mp3s_are_found(tmp_path, rate):
    first, second = (encoded(tmp_path, length, rate=rate, format="MP3") for length in (1.5, 1.0))
    bare = second[second.index(second[:2], 4) :]  # without the frame that states the length
    tag, id3 = b"TAG" + bytes(125), b"ID3\4\0\0\0\0\1\0" + bytes(128)
    path = tmp_path / "a.mp3"
    for content in (first + second, first + first, first + bare, first + tag + id3 + second, first + b"junk" + second):
        path.write_bytes(content)
        assert judged(path)[0] == "wrong_duration"
    for content in (first, id3 + first + tag):
        path.write_bytes(content)
        assert judged(path)[0] is None


def test_an_mp3_that_states_no_length_is_not_read_in_part(tmp_path):
    whole = encoded(tmp_path, 3.0, format="MP3")
    path = tmp_path / "a.mp3"
    path.write_bytes(whole[whole.index(whole[:2], 4) :])
    reason, detail = judged(path)
    assert reason == "wrong_duration"
    assert re.search(r"1\.\d\d of 3\.\d\d s would be read", detail)


# --- headers that declare too little


def halved(content: bytes, kind: str) -> bytes:
    """Return the same file with half of its length declared."""
    if kind in ("WAV", "WAVEX"):
        place = content.index(b"data") + 4
        return patched(content, place, struct.pack("<I", struct.unpack_from("<I", content, place)[0] // 2))
    if kind == "RF64":
        place = content.index(b"ds64") + 16
        return patched(content, place, struct.pack("<Q", struct.unpack_from("<Q", content, place)[0] // 2))
    if kind == "W64":
        place = content.index(b"data") + 16
        return patched(content, place, struct.pack("<Q", struct.unpack_from("<Q", content, place)[0] // 2))
    if kind == "AIFF":
        place = content.index(b"SSND") + 4
        return patched(content, place, struct.pack(">I", struct.unpack_from(">I", content, place)[0] // 2))
    if kind == "AU":
        return patched(content, 8, struct.pack(">I", struct.unpack_from(">I", content, 8)[0] // 2))
    if kind == "CAF":
        place = content.index(b"data") + 4
        return patched(content, place, struct.pack(">Q", struct.unpack_from(">Q", content, place)[0] // 2))
    if kind == "VOC":
        return patched(content, 27, (int.from_bytes(content[27:30], "little") // 2).to_bytes(3, "little"))
    if kind == "NIST":
        count = int(re.search(rb"sample_count -i (\d+)", content)[1])
        return content.replace(b"-i %d\n" % count, b"-i %0*d\n" % (len(str(count)), count // 2), 1)
    assert kind == "FLAC"
    return patched(content, 22, struct.pack(">I", struct.unpack_from(">I", content, 22)[0] // 2))


@pytest.mark.parametrize("seconds", [0.5, 1.5, 10.0])
@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("WAV", "PCM_16"), ("WAV", "ULAW"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24"),
        ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "ULAW"), ("AU", "PCM_16"), ("AU", "ALAW"),
        ("CAF", "PCM_16"), ("VOC", "PCM_16"), ("NIST", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
    ],
)  # fmt: skip
def test_half_the_length_is_declared(tmp_path, kind, subtype, seconds):
    content = encoded(tmp_path, seconds, rate=8000, format=kind, subtype=subtype)
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    assert judged(path)[0] is None
    path.write_bytes(halved(content, kind))
    reason, detail = judged(path)
    assert (reason, "more follows" in detail) == ("wrong_duration", True)


def riff(*chunks: tuple[bytes, int, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", size) + content for name, size, content in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


PCM = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)


def test_the_rest_behind_a_wav_is_judged_by_what_it_is(tmp_path):
    audio = (10_000 * speech(1.0)).astype("<i2").tobytes()
    path = tmp_path / "a.wav"

    def with_behind(behind: bytes, declared: int = len(audio)) -> str | None:
        path.write_bytes(riff((b"fmt ", 16, PCM), (b"data", declared, audio)) + behind)
        return judged(path)[0]

    listing = b"LIST" + struct.pack("<I", 60_000) + b"INFO" + b"x" * 59_996
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 5000, 1, 0) + bytes(8)
    for harmless in (
        b"", listing, b"id3 " + struct.pack("<I", 40_000) + b"\1" * 40_000, listing + listing, bytes(100_000),
        b"TAG" + b"\1" * 125, b"\1" * 5000 + ape, b"ID3\4\0\0\0\2\0\0" + b"\1" * 32_768, b"x" * 3000,
    ):  # fmt: skip
        assert with_behind(harmless) is None
    for more in (
        b"x" * 3300,
        audio,
        listing + audio,
        b"data" + struct.pack("<I", len(audio)) + audio,
        bytes(99) + audio,
    ):
        assert with_behind(more) in ("wrong_duration", "unreadable")
    assert with_behind(b"", 0) == "wrong_duration"  # a recorder that was switched off
    assert "sox --ignore-length" in judged(path)[1]


def test_a_part_in_the_middle_of_a_file_needs_no_look_at_its_end(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(halved(encoded(tmp_path, 10.0, format="WAV"), "WAV"))
    assert len(load_audio(path, sample_rate=RATE, offset=1.0, duration=2.0)) == 2 * RATE
    for offset, duration in ((1.0, 4.0), (0.0, None), (3.0, 9.0), (7.0, 1.0)):
        with pytest.raises(AudioError, match=r"declares 5\.00 s, and more follows") as error:
            load_audio(path, sample_rate=RATE, offset=offset, duration=duration)
        assert error.value.reason == "wrong_duration"


# --- formats of which a part looks like a whole


@pytest.mark.parametrize("kind", ["PAF", "AVR", "MAT4", "MAT5", "IRCAM", "SVX", "PVF", "MPC2K", "SDS", "XI", "WVE"])
def test_formats_that_cannot_be_checked_are_refused_with_a_remedy(tmp_path, kind):
    subtype = {"XI": "DPCM_16", "WVE": "ALAW"}.get(kind, "PCM_16")
    content = encoded(tmp_path, 1.0, rate=8000, format=kind, subtype=subtype)
    path = tmp_path / "a.bin"
    for share in (1.0, 0.5):
        path.write_bytes(content[: int(share * len(content))])
        report = inspect_audio(path)
        assert report.reason == "unreadable"
        assert PROGRAM.search(report.detail)


# --- manifests that promise too much


def test_a_promise_is_kept_but_for_rounding(tmp_path):
    assert [stated_slack(seconds) for seconds in (0.0, 1.0, 8.0, 100.0)] == pytest.approx([0.1, 0.15, 0.5, 0.5])
    sf.write(tmp_path / "a.wav", speech(4.0), RATE)
    lines = [(0.0, 4.0), (0.0, 4.29), (0.0, 4.33), (3.0, 1.14), (3.0, 1.16), (3.0, 2.0), (4.0, 1.0)]
    manifest = tmp_path / "m.json"
    manifest.write_text(
        "".join(json.dumps({"audio_filepath": "a.wav", "offset": o, "duration": d}) + "\n" for o, d in lines)
    )
    entries = read_manifests(str(manifest))
    found = []
    for number in range(len(lines)):
        try:
            found.append(len(read_audio(entries.entry(number), sample_rate=8000)) / 8000)
        except AudioError as error:
            found.append(error.reason)
    assert found == [4.0, 4.0, "truncated", 1.0, "truncated", "truncated", "empty"]
    done = prepare([manifest], tmp_path / "out", PrepareOptions(jobs=1, val_fraction=0.0))
    assert done.rejections == {"truncated": 4, "duplicate_path": 1}


# --- what cannot be read, and what to do


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.m4a", b"\0\0\0\x20ftypM4A " + bytes(100), "this is M4A, MP4 or 3GP, which ffmpeg reads"),
        ("a.wav", b"\0\0\0\x20ftypisom" + bytes(100), "this is M4A, MP4 or 3GP, which ffmpeg reads"),
        ("a.webm", b"\x1a\x45\xdf\xa3" + bytes(100), "this is WebM or Matroska"),
        ("a.aac", b"\xff\xf1\x50\x80" + bytes(100), "this is AAC"),
        ("a.wma", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + bytes(100), "this is WMA"),
        ("a.mp3", bytes(700) + b"\xff\xfb", "neither MP3 nor anything else"),
        ("a.wav", b"<!DOCTYPE html><html>403</html>", "this is an HTML page. Servers send one in place of a file"),
        ("a.wav", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ("a.wav", bytes(700), "this is nothing but zero bytes"),
            ("a.png", b"\x89PNG" + bytes(100), "this is a picture"),
            ("a.flac", b'{"audio_filepath": "a.wav"}\n', "this is JSON lines, as a manifest has"),
            ("a.wav", "a\nb\n".encode("utf-16"), "this is UTF-16 text"),
        ("a.spx", b"OggS\0\2" + bytes(21) + b"\x50Speex   1.2" + bytes(100), "Speex"),
        ("a.wav", riff((b"fmt ", 18, G722), (b"data", 99, bytes(99))), ""),
        ("a.wav", riff((b"fmt ", 16, PCM), (b"data", 100, bytes(100)), (b"data", 100, bytes(100))), ""),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_remedy(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    report = inspect_audio(tmp_path / name)
    assert report.reason == "unreadable"
    assert words in report.detail
    assert PROGRAM.search(report.detail) or re.match(r"this is .*\. [A-Z]", report.detail)


# --- samples that are not what they seem


@pytest.mark.parametrize("full", [128, 32768, 2**23, 2**31])
def test_float_samples_in_another_scale_are_told(tmp_path, full):
    path = tmp_path / "a.wav"
    sf.write(path, 3.5 * speech(1.0), RATE, subtype="FLOAT")
    assert inspect_audio(path).reason is None  # only loud
    sf.write(path, full * speech(1.0), RATE, subtype="FLOAT")
    report = inspect_audio(path)
    assert (report.reason, f"volume=1/{full} " in report.detail) == ("wrong_scale", True)


def test_channels_that_cancel_each_other_are_told(tmp_path):
    path = tmp_path / "a.wav"
    left = speech(1.0)
    sf.write(path, np.stack([left, -left], axis=1), RATE, subtype="FLOAT")
    report = inspect_audio(path)
    assert (report.reason, report.detail) == (
        "silent",
        "the 2 channels cancel each other: their average is silent, channel 0 is not; "
        "take one channel with `--channel 0`",
    )
    sf.write(path, np.stack([0 * left, left, -left], axis=1), RATE, subtype="FLOAT")
    assert "--channel 1" in inspect_audio(path).detail
    sf.write(path, np.zeros((RATE, 2)), RATE)
    assert inspect_audio(path).detail == "every sample is zero"


def test_what_cannot_be_opened_is_told_with_a_remedy_in_every_command(tmp_path):
    sf.write(tmp_path / "a.wav", speech(1.0), RATE)
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "dangling.wav").symlink_to("gone.wav")
    (tmp_path / "folder.wav").mkdir()
    cases = {"loop.wav": "unreadable", "dangling.wav": "missing", "folder.wav": "not_a_file", "x" * 300: "unreadable"}
    for name, reason in cases.items():
        report = inspect_audio(tmp_path / name)
        assert report.reason == reason
        assert re.search("; (fix|correct|leave it out)", report.detail), report.detail
        with pytest.raises(AudioError) as error:
            load_audio(tmp_path / name, sample_rate=RATE)
        assert (error.value.reason, reason_of(error.value)) == (reason, reason)
    assert inspect_audio(tmp_path / "a.wav", channel=1).detail.endswith("; choose another, or none")
