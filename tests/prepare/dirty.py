"""A dirty corpus: `python tests/prepare/dirty.py FOLDER` writes 900 good files, and 5 that are bad in every way.

What `nest prepare-data` has to say of each is known before it is written.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile as sf

Samples = npt.NDArray[np.float64]

# ending, rate in Hz, channels, what soundfile is told, and whether what was written is decoded to the sample
FORMATS: tuple[tuple[str, int, int, dict[str, Any]], ...] = (
    ("wav", 16000, 1, {}),
    ("wav", 44100, 2, {"subtype": "PCM_24"}),
    ("flac", 16000, 1, {}),
    ("wav", 8000, 1, {"subtype": "FLOAT"}),
    ("mp3", 16000, 1, {}),
    ("ogg", 44100, 1, {}),
    ("WAV", 8000, 1, {"subtype": "ULAW"}),
    ("opus", 48000, 1, {"format": "OGG", "subtype": "OPUS"}),
    ("aiff", 44100, 2, {}),
    ("flac", 44100, 2, {"subtype": "PCM_24"}),
    ("wav", 16000, 2, {"format": "WAVEX"}),
    ("mp3", 44100, 2, {}),
    ("au", 8000, 1, {"subtype": "PCM_16"}),
    ("w64", 16000, 1, {}),
)
FOLDERS = (
    "a",
    "a/b c",
    "讲者 一/会话",
    'it\'s "quoted"',
    "$(touch made)",
    "-rf",
    "x.wav",
    "ünï/cödé/deep/er",
    "a\nb",
    "100%",
)
ORIGINAL = "a good one of "  # in front of a name that starts with "bad"
NAMES = ("plain", "with space", "你好，世界", "o'clock", 'say "hi"', "$HOME;ls", "-o", "a,b", "dots..in.it", "🎙 mic")


@dataclass(frozen=True)
class Sample:
    """One input. `seconds` are the good one's, to `within`; a bad one has the reason of its rejection and its way."""

    path: Path
    seconds: float = 0.0
    within: float = 0.0
    reason: str | None = None
    way: str = ""


def make(folder: Path, good: int = 900, each: int = 5) -> list[Sample]:
    """Write the corpus; good and bad stand between one another."""
    samples = [_good(folder, number) for number in range(good)]
    for number in range(each):
        for place, (way, (reason, write)) in enumerate(WAYS.items()):
            path = _place(folder, 7 * number + place) / f"bad {number} {way}"
            path.parent.mkdir(parents=True, exist_ok=True)
            made = write(path, _rng(2, place, number))
            if (original := path.with_name(f"{ORIGINAL}{path.name}.wav")).exists():
                samples.append(Sample(original, 0.5))
            if made is not None:
                samples.append(Sample(made, reason=reason, way=way))
    for extra in ("readme.txt", "cover.jpg", ".hidden.wav", ".git/a.wav"):
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text("not for you")
    return samples


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(seconds: float, rate: int, rng: np.random.Generator, channels: int = 1) -> Samples:
    """Noise with pauses, so that there are quiet places to cut at."""
    count = int(seconds * rate)
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 3 * np.arange(count) / rate)
    return 0.1 * envelope[:, None] * rng.standard_normal((count, channels))


def _place(folder: Path, number: int) -> Path:
    return folder / FOLDERS[number % len(FOLDERS)] / str(number % 3)


def _good(folder: Path, number: int) -> Sample:
    ending, rate, channels, how = FORMATS[number % len(FORMATS)]
    seconds = 0.3 + 0.01 * (number * 37 % 100)
    path = _place(folder, number) / f"{number:04d} {NAMES[number // 3 % len(NAMES)]}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = noise(seconds, rate, _rng(1, number), channels)
    sf.write(path, samples, rate, **how)
    return Sample(path, len(samples) / rate, within=0.0 if ending not in ("mp3", "opus") else 0.001)


# ---- ways to be bad: a file's path without ending, and where to draw from, give the file, None where it cannot be


def _whole(
    path: Path, rng: np.random.Generator, ending: str, seconds: float = 0.6, rate: int = 16000, **how: Any
) -> Path:
    made = path.with_name(f"{path.name}.{ending}")
    sf.write(made, noise(seconds, rate, rng), rate, **how)
    return made


def _cut(ending: str, share: float, seconds: float = 0.6, rate: int = 16000, **how: Any) -> Way:
    def write(path: Path, rng: np.random.Generator) -> Path:
        made = _whole(path, rng, ending, seconds, rate, **how)
        content = made.read_bytes()
        made.write_bytes(content[: int(share * len(content))])
        return made

    return write


def _bytes(ending: str, content: bytes) -> Way:
    def write(path: Path, rng: np.random.Generator) -> Path:
        made = path.with_name(f"{path.name}.{ending}")
        made.write_bytes(content)
        return made

    return write


def _patched(ending: str, patch: Callable[[bytearray], None], seconds: float = 0.6, **how: Any) -> Way:
    def write(path: Path, rng: np.random.Generator) -> Path:
        made = _whole(path, rng, ending, seconds, **how)
        content = bytearray(made.read_bytes())
        patch(content)
        made.write_bytes(content)
        return made

    return write


def _changed(change: Callable[[Samples], Samples], **how: Any) -> Way:
    def write(path: Path, rng: np.random.Generator) -> Path:
        made = path.with_name(f"{path.name}.wav")
        sf.write(made, change(noise(0.6, 16000, rng)), 16000, **how)
        return made

    return write


def _put(place: int, content: bytes) -> Callable[[bytearray], None]:
    def patch(whole: bytearray) -> None:
        whole[place : place + len(content)] = content

    return patch


def _with(value: float) -> Callable[[Samples], Samples]:
    def change(samples: Samples) -> Samples:
        samples[len(samples) // 2] = value
        return samples

    return change


def _damaged(content: bytearray) -> None:
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)


def _more_frames(content: bytearray) -> None:
    content[22:26] = (10 * 16000).to_bytes(4, "big")


def _many_channels(path: Path, rng: np.random.Generator) -> Path:
    made = path.with_name(f"{path.name}.wav")
    sf.write(made, noise(0.1, 8000, rng, 64), 8000)
    return made


def _original(path: Path, rng: np.random.Generator) -> tuple[Path, Samples]:
    """A good file beside a bad one, found before it."""
    samples = np.round(noise(0.5, 16000, rng) * 32767) / 32768
    made = path.with_name(f"{ORIGINAL}{path.name}.wav")
    sf.write(made, samples, 16000)
    return made, samples


def _copy(path: Path, rng: np.random.Generator) -> Path:
    _, samples = _original(path, rng)
    made = path.with_name(f"{path.name}.flac")
    sf.write(made, samples, 16000)
    return made


def _alias(path: Path, rng: np.random.Generator) -> Path:
    target, _ = _original(path, rng)
    made = path.with_name(f"{path.name}.wav")
    made.symlink_to(target.name)
    return made


def _link(target: str) -> Way:
    def write(path: Path, rng: np.random.Generator) -> Path:
        made = path.with_name(f"{path.name}.wav")
        made.symlink_to(target or made.name)
        return made

    return write


def _fifo(path: Path, rng: np.random.Generator) -> Path:
    made = path.with_name(f"{path.name}.wav")
    os.mkfifo(made)
    return made


def _socket(path: Path, rng: np.random.Generator) -> Path | None:
    made = path.with_name(f"{path.name}.wav")
    here = Path.cwd()
    os.chdir(made.parent)  # the address of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(made.name)
    finally:
        os.chdir(here)
    return made


def _forbidden(path: Path, rng: np.random.Generator) -> Path | None:
    if os.geteuid() == 0:  # to whom everything is permitted
        return None
    made = _whole(path, rng, "wav")
    made.chmod(0)
    return made


def _not_utf8(path: Path, rng: np.random.Generator) -> Path | None:
    made = Path(os.fsdecode(os.fsencode(path) + b" \xff\xe9.wav"))
    try:
        sf.write(os.fsencode(made), noise(0.6, 16000, rng), 16000)
    except (OSError, sf.LibsndfileError):  # macOS
        return None
    return made


Way = Callable[[Path, np.random.Generator], Path | None]

_HTML = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>403</body></html>\n" * 20
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a96\nsize 12345\n"
_M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(range(256)) * 10
_WEBM = (
    b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04B\xf3\x81\x08B\x82\x84webm" + bytes(range(256)) * 10
)

WAYS: dict[str, tuple[str, Way]] = {
    "half wav": ("truncated", _cut("wav", 0.5)),
    "wav without its last tenth": ("truncated", _cut("wav", 0.9)),
    "half flac": ("truncated", _cut("flac", 0.5)),
    "half mp3": ("truncated", _cut("mp3", 0.5, 1.0)),
    "mp3 without its last tenth": ("truncated", _cut("mp3", 0.9, 1.0)),
    "half ogg": ("truncated", _cut("ogg", 0.5, 1.0)),
    "opus without its last third": ("truncated", _cut("opus", 0.67, 3.0, 48000, format="OGG", subtype="OPUS")),
    "half aiff": ("truncated", _cut("aiff", 0.5)),
    "half au": ("truncated", _cut("au", 0.5)),
    "half w64": ("truncated", _cut("w64", 0.5)),
    "header only": ("truncated", _patched("wav", lambda content: content.__delitem__(slice(44, None)))),
    "no samples": ("empty", _changed(lambda samples: samples[:0])),
    "zero bytes": ("empty", _bytes("wav", b"")),
    "html": ("unreadable", _bytes("wav", _HTML)),
    "html named mp3": ("unreadable", _bytes("mp3", _HTML)),
    "text": ("unreadable", _bytes("flac", "这不是录音\n".encode() * 50)),
    "pointer of git lfs": ("unreadable", _bytes("wav", _LFS)),
    "m4a": ("unreadable", _bytes("m4a", _M4A)),
    "webm": ("unreadable", _bytes("webm", _WEBM)),
    "flac that claims more": ("truncated", _patched("flac", _more_frames)),
    "wav that claims more": ("truncated", _patched("wav", _put(40, (1 << 30).to_bytes(4, "little")))),
    "wav that claims less": ("wrong_duration", _patched("wav", _put(40, (8000).to_bytes(4, "little")), 2.0)),
    "flac damaged in the middle": ("unreadable", _patched("flac", _damaged, 1.5)),
    "not a number": ("not_finite", _changed(_with(np.nan), subtype="FLOAT")),
    "infinite": ("not_finite", _changed(_with(np.inf), subtype="DOUBLE")),
    "silence": ("silent", _changed(lambda samples: 0 * samples)),
    "clipped": ("clipped", _changed(lambda samples: np.clip(40 * samples, -1, 1))),
    "64 channels": ("too_many_channels", _many_channels),
    "1 Hz": ("bad_rate", _patched("wav", _put(24, (1).to_bytes(4, "little")))),
    "10 MHz": ("bad_rate", _patched("wav", _put(24, (10_000_000).to_bytes(4, "little")))),
    "same samples": ("duplicate_content", _copy),
    # no files of their own
    "link to nowhere": ("missing", _link("/nowhere/at/all.wav")),
    "link to itself": ("unreadable", _link("")),
    "link to a device": ("not_a_file", _link("/dev/zero")),
    "link to a good one": ("duplicate_path", _alias),
    "fifo": ("not_a_file", _fifo),
    "socket": ("not_a_file", _socket),
    "no permission": ("unreadable", _forbidden),
    "name that is not UTF-8": ("bad_name", _not_utf8),
}


# ---- a manifest of it


def manifest(path: Path, samples: Sequence[Sample], each: int = 5) -> list[Sample]:
    """Write a manifest of the corpus, and lines that are bad in other ways; return the expected verdict on every line.

    The lines have an `id`, their number from 0.
    """
    whole = [sample for sample in samples if sample.reason is None and not sample.within and sample.seconds > 0.4]
    lines = [(sample, {"audio_filepath": str(sample.path)}) for sample in samples]
    for number in range(each):
        for place, (way, (reason, row)) in enumerate(LINES.items()):
            of = whole[(number * len(LINES) + place) % len(whole)]
            line = {"audio_filepath": str(of.path), "duration": of.seconds, **row(of)}
            lines.append((Sample(Path(str(line["audio_filepath"])), reason=reason, way=way), line))
    path.write_text("".join(json.dumps({**line, "id": number}) + "\n" for number, (_, line) in enumerate(lines)))
    return [sample for sample, _ in lines]


LINES: dict[str, tuple[str, Callable[[Sample], dict[str, Any]]]] = {
    "no such file": ("missing", lambda of: {"audio_filepath": f"{of.path}.gone"}),
    "a folder": ("not_a_file", lambda of: {"audio_filepath": str(of.path.parent)}),
    "longer than the audio": ("truncated", lambda of: {"duration": of.seconds + 1}),
    "starts behind the end": ("truncated", lambda of: {"offset": of.seconds + 1, "duration": 0.1}),
    "no length": ("bad_duration", lambda of: {"offset": 0.1, "duration": 0.0}),
    "the same again": ("duplicate_path", lambda of: {}),
    "elsewhere": ("not_a_file", lambda of: {"audio_filepath": "https://example.com/a.wav"}),
    "half a letter": ("bad_name", lambda of: {"audio_filepath": f"{of.path} \udcff"}),
}


if __name__ == "__main__":
    made = make(Path(sys.argv[1]).absolute())
    bad = sum(sample.reason is not None for sample in made)
    print(f"{len(made) - bad} good, {bad} bad in {len({sample.way for sample in made if sample.reason})} ways")
