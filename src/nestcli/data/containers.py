"""What the structure of an audio file says about audio that is missing from it.

libsndfile quietly reduces the declared length of most formats to what is there, so half a WAV looks like a whole
one of half the length. SoX's formats are not looked at.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

import soundfile as sf

_CHUNK_SLACK = 64  # bytes: sizes that count the header too, or forget a padding byte, are common and harmless
_UNKNOWN_SIZE = 0x7F00_0000  # SoX writes 0x7F000008 or 0x7FFFF000 into a pipe, ffmpeg 0xFFFFFFFF
_UNKNOWN_LENGTH = 1 << 62  # frames: libsndfile's for a FLAC that states none, as encoders write into a pipe
_MPEG_SLACK = 2 * 1152  # frames: encoder delay and padding may or may not be counted
_MAX_TRAILING_TAG = 8192  # bytes behind the last frame of an MP3 that are no audio
_MAX_BEHIND = 1 << 15  # bytes behind the samples that are a tag or a buffer
_MAX_CHUNKS = 1000  # before the samples; a file with more is not worth the time
_MAX_OGG_PAGE = 1 << 16  # bytes


def missing_audio(path: str, sound: sf.SoundFile, frames: int) -> str:
    """Say what part of the audio is missing after `frames` were decoded to the end; empty if none is."""
    with open(path, "rb") as file:  # noqa: PTH123  (Path is slower, and this runs for every file)
        if sound.format in _CHUNKED:
            return _chunk_shortfall(file)
        if sound.format == "OGG":
            return _ogg_shortfall(file)
        if sound.format == "MP3":
            return _mpeg_shortfall(file, sound, frames)
        declared = _nist_frames(file) if sound.format == "NIST" else sound.frames
    return "" if frames >= declared or not states_length(sound) else _shorter(declared, frames, sound.samplerate)


def states_length(sound: sf.SoundFile) -> bool:
    """Whether a header says how long its audio is."""
    return bool(sound.frames < _UNKNOWN_LENGTH)


def undeclared_audio(path: str, sound: sf.SoundFile) -> str:
    """Say how much audio stands behind the declared end of a decoded WAV, AIFF or FLAC; empty if there is none."""
    with open(path, "rb") as file:  # noqa: PTH123
        size = os.fstat(file.fileno()).st_size
        if sound.format == "FLAC":
            behind = size - os.lseek(sound.name, 0, os.SEEK_CUR) - size // 10  # a decoder reads ahead
        elif sound.format in ("WAV", "WAVEX", "AIFF"):
            behind = _behind_samples(file, size, sound.frames)
        else:
            return ""
    seconds = sound.frames / sound.samplerate
    return f"the header declares {seconds:.2f} s, and more follows" if behind > _MAX_BEHIND else ""


def _behind_samples(file: BinaryIO, size: int, frames: int) -> int:
    """Bytes behind a WAV's or AIFF's chunk of samples that are neither another chunk nor zeros."""
    found = _samples_chunk(file)
    if found is None or found.declared is None or (found.declared == 0 and frames > 0):
        return 0
    end = found.start + found.declared + found.declared % 2
    file.seek(min(end, size))
    head = file.read(64)
    next_size = int.from_bytes(head[4:8], found.order)
    is_chunk = (
        head[:4].isascii() and head[:4].decode("ascii").isprintable() and end + 8 + next_size <= size + _CHUNK_SLACK
    )
    return 0 if is_chunk or not any(head) else size - end


def _shorter(declared: int, frames: int, rate: int) -> str:
    return f"the header declares {declared / rate:.2f} s, the file holds {frames / rate:.2f} s"


def _chunk_shortfall(file: BinaryIO) -> str:
    """Compare the declared size of a file's chunk of samples with the file's."""
    found = _samples_chunk(file)
    if found is None or found.declared is None:
        return ""
    held = os.fstat(file.fileno()).st_size - found.start
    if found.declared <= held + _CHUNK_SLACK:
        return ""
    return f"the header declares {found.declared} bytes of audio, the file holds {held}"


_Order = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where the samples of a file start, how many bytes they declare, if any, and the order of its numbers' bytes."""

    start: int
    declared: int | None
    order: _Order


@dataclass(frozen=True, slots=True)
class _Form:
    """How a family of formats lays out its chunks: `name` and `size` are the bytes of these in front of a chunk.

    `first` is where the first one stands, `align` what their lengths are rounded up to; with `inclusive` a size counts
    what stands in front too.
    """

    first: int
    order: _Order
    name: int = 4
    size: int = 4
    align: int = 2
    wanted: bytes = b"data"
    inclusive: bool = False


_FORMS = {
    b"RIFF": _Form(12, "little"),
    b"RIFX": _Form(12, "big"),
    b"RF64": _Form(12, "little"),
    b"FORM": _Form(12, "big", wanted=b"SSND"),
    b"riff": _Form(40, "little", name=16, size=8, align=8, inclusive=True),  # W64
    b"caff": _Form(8, "big", size=8, align=1),
    b"Crea": _Form(26, "little", name=1, size=3, align=1, wanted=b"\t"),  # VOC, with the block that all write today
}
_CHUNKED = ("WAV", "WAVEX", "AIFF", "RF64", "W64", "CAF", "VOC", "AU")


def _samples_chunk(file: BinaryIO) -> _Chunk | None:
    magic = file.read(4)
    if magic in (b".snd", b"dns."):
        return _au_samples(file, "big" if magic == b".snd" else "little")
    form = _FORMS.get(magic)
    if form is None:
        return None
    unknown, large = _UNKNOWN_SIZE if form.size == 4 else 1 << 62, 0
    file.seek(form.first)
    for _ in range(_MAX_CHUNKS):
        head = file.read(form.name + form.size)
        declared = int.from_bytes(head[form.name :], form.order) - (len(head) if form.inclusive else 0)
        start = file.tell()
        if head[: len(form.wanted)] == form.wanted:
            if magic == b"RF64" and declared == 0xFFFF_FFFF:
                return _Chunk(start, large, form.order)
            return _Chunk(start, declared if declared < unknown else None, form.order)
        if head[:4] == b"ds64":
            large = int.from_bytes(file.read(16)[8:], form.order)
        if len(head) < form.name + form.size or declared < 0:
            return None
        file.seek(start + -(-declared // form.align) * form.align)
    return None


def _au_samples(file: BinaryIO, order: _Order) -> _Chunk:
    start, declared = (int.from_bytes(file.read(4), order) for _ in range(2))
    return _Chunk(start, declared if declared < _UNKNOWN_SIZE else None, order)


def _ogg_shortfall(file: BinaryIO) -> str:
    """Look whether the last page is whole; a missing end flag proves nothing, live streams lack it."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - _MAX_OGG_PAGE))
    tail = file.read(_MAX_OGG_PAGE)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 255
    if len(page) >= 27 + segments + sum(page[27 : 27 + segments]):
        return ""
    return "the last page of the Ogg stream is cut off"


def _nist_frames(file: BinaryIO) -> int:
    found = re.search(rb"\nsample_count -i (\d{1,18})\s", file.read(1024))
    return int(found[1]) if found else 0


def _mpeg_shortfall(file: BinaryIO, sound: sf.SoundFile, frames: int) -> str:
    """Compare with the stated length; where none is, libsndfile estimates one, perhaps far too short."""
    bytes_missing = _missing_mpeg_bytes(file)
    if bytes_missing is not None and frames < sound.frames - (0 if bytes_missing else _MPEG_SLACK):
        return _shorter(sound.frames, frames, sound.samplerate)
    size = os.fstat(file.fileno()).st_size
    left = size - os.lseek(sound.name, 0, os.SEEK_CUR)
    if left > max(_MAX_TRAILING_TAG, size // 20):
        share = f"{left / size:.0%} of the file"
        return f"its length is not or wrongly stated, so that {share} would not be read; convert it with ffmpeg"
    return ""


def _missing_mpeg_bytes(file: BinaryIO) -> bool | None:
    """Whether a file has fewer bytes than its first frame states for all of them; None where it states no length."""
    tag = file.read(10)
    if tag[:3] == b"ID3":  # its size is stored in four times seven bits
        file.seek(tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9], os.SEEK_CUR)
    start = file.tell()
    head = file.read(4096)
    found = re.search(rb"(?:Xing|Info)\0\0\0(.)((?:.{4})?)(.{4})", head, re.DOTALL)
    if found is None:
        return False if any(name in head for name in (b"Xing", b"Info", b"VBRI")) else None
    has_frames, has_bytes = found[1][0] & 1, found[1][0] & 2
    if not has_bytes:
        return False
    stated = int.from_bytes(found[3] if has_frames else found[2], "big")
    held = os.fstat(file.fileno()).st_size - start - found.start()
    return stated - held > max(_CHUNK_SLACK, stated // 100)
