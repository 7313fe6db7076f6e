"""Whether the structure of an audio file agrees with the audio that is decoded from it.

libsndfile quietly reduces the declared length of most formats to what is there, so half a WAV looks like a whole
one of half the length; and it quietly stops where a header says so, whatever follows. SoX's formats are not looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import soundfile as sf

from nestcli.audio.file_bytes import FileBytes
from nestcli.audio.sox import RECOVER
from nestcli.audio.streams import NO_FAULT, SLACK, Fault, flac_fault, more_follows, mpeg_fault, ogg_fault, shorter

# Formats that say how long they are. In the others that libsndfile knows, a part looks like a whole file.
READ_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "VOC", "NIST", "HTK", "FLAC", "OGG", "MP3")

_CHUNKED = ("WAV", "WAVEX", "AIFF", "RF64", "W64", "CAF", "VOC", "AU")
_READ_ON = ("W64", "VOC", "G721_32", "G723_24", "G723_40")  # formats and codecs that are decoded to the file's end
_CHUNK_SLACK = 64  # bytes: sizes that count the header too, or forget a padding byte, are common and harmless
_UNKNOWN_SIZE = 0x7F00_0000  # SoX writes 0x7F000008 or 0x7FFFF000 into a pipe, ffmpeg 0xFFFFFFFF
_UNKNOWN_LENGTH = 1 << 62  # frames: libsndfile's for a FLAC that states none, as encoders write into a pipe
_IGNORE_LENGTH = (  # a plain call of either stops where the header says so
    "convert it with `sox --ignore-length FILE FILE.flac`, or a WAV with `ffmpeg -ignore_length 1 -i FILE FILE.flac`"
)
_MAX_CHUNKS = 1000  # before the samples, and behind them; a file with more is not worth the time


def length_fault(sound: sf.SoundFile, frames: int) -> Fault:
    """The reason and the words for a file that holds more or less audio than is decoded; two empty texts for none.

    `frames` is where the decoder stopped: at `sound.frames`, or before.
    """
    if not isinstance(sound.name, int):  # the file that SoX wrote
        return NO_FAULT
    file = FileBytes(sound.name)
    fault = NO_FAULT
    if sound.format in _CHUNKED:
        fault = _chunk_fault(file, sound)
    elif sound.format == "OGG":
        fault = ogg_fault(file)
    elif sound.format == "MP3":
        return mpeg_fault(file, sound, frames)
    elif sound.format == "FLAC" and states_length(sound):
        fault = flac_fault(file, sound)
    elif sound.format == "NIST":
        declared = _nist_frames(file)
        if frames < declared:
            fault = shorter(declared, frames, sound.samplerate)
        elif declared and frames - declared > SLACK * sound.samplerate:
            fault = more_follows(declared, sound.samplerate, _IGNORE_LENGTH)
    slack = SLACK * sound.samplerate if sound.format == "OGG" else 0
    if fault == NO_FAULT and states_length(sound) and sound.frames - frames > slack:
        fault = shorter(sound.frames, frames, sound.samplerate)
    return fault


def states_length(sound: sf.SoundFile) -> bool:
    """Whether a header says how long its audio is."""
    return bool(sound.frames < _UNKNOWN_LENGTH)


def _nist_frames(file: FileBytes) -> int:
    found = re.search(rb"\nsample_count -i (\d{1,18})\s", file.at(0, 1024))
    return int(found[1]) if found else 0


# --- chunks


def _chunk_fault(file: FileBytes, sound: sf.SoundFile) -> Fault:
    """Compare the declared size of a file's chunk of samples with the file's, and look at what stands behind it."""
    found = _samples_chunk(file)
    if found is None or found.declared is None:
        return NO_FAULT
    held = file.size - found.start
    if found.declared > held + _CHUNK_SLACK:
        return "truncated", f"the header declares {found.declared} bytes of audio, the file holds {held}; {RECOVER}"
    if held - found.declared <= _CHUNK_SLACK or (found.declared == 0 and sound.frames > 0):
        return NO_FAULT
    if sound.format in _READ_ON or sound.subtype in _READ_ON:
        behind, decoded = held - found.declared, held
    else:
        behind, decoded = _behind_samples(file, found.start + found.declared, found.form), found.declared
    empty = found.declared == 0 and behind > 0
    if empty or behind * sound.frames > SLACK * sound.samplerate * decoded:
        declared = sound.frames * found.declared // max(1, decoded)
        return more_follows(declared, sound.samplerate, _IGNORE_LENGTH)
    return NO_FAULT


def _behind_samples(file: FileBytes, place: int, form: _Form | None) -> int:
    """Bytes from `place` on, behind the samples, that are not other chunks, tags or zeros."""
    for _ in range(_MAX_CHUNKS):
        found = _next_chunk(file, place, form) or _next_chunk(file, place + 1, form)  # behind a padding byte
        if form is None or found is None:
            break
        name, start, size = found
        if name == form.wanted:
            return size
        place = start + size
    place = file.behind_id3(place)
    end = file.before_tags()
    return 0 if file.only_zeros(place, end) else max(0, end - place)


def _next_chunk(file: FileBytes, place: int, form: _Form | None) -> tuple[bytes, int, int] | None:
    """Name, place of the content and size of the chunk at `place`; None if there is not a whole one."""
    if form is None:
        return None
    head = file.at(place, form.name + form.size)
    start, size = place + len(head), int.from_bytes(head[form.name :], form.order)
    is_name = len(head) == form.name + form.size and head[:4].isascii() and head[:4].decode("ascii").isprintable()
    return (head[: form.name], start, size) if is_name and start + size <= file.size + _CHUNK_SLACK else None


_Order = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where the samples of a file start, how many bytes they declare, if any, and the form of its chunks, if any."""

    start: int
    declared: int | None
    form: _Form | None


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


def _samples_chunk(file: FileBytes) -> _Chunk | None:
    begin = file.behind_id3()
    magic = file.at(begin, 4)
    if magic in (b".snd", b"dns."):
        order: _Order = "big" if magic == b".snd" else "little"
        start, declared = (int.from_bytes(file.at(begin + at, 4), order) for at in (4, 8))
        return _Chunk(begin + start, declared if declared < _UNKNOWN_SIZE else None, None)
    form = _FORMS.get(magic)
    if form is None:
        return None
    unknown, large = _UNKNOWN_SIZE if form.size == 4 else 1 << 62, 0
    place = begin + form.first
    for _ in range(_MAX_CHUNKS):
        head = file.at(place, form.name + form.size)
        declared = int.from_bytes(head[form.name :], form.order) - (len(head) if form.inclusive else 0)
        place += len(head)
        if head[: len(form.wanted)] == form.wanted:
            if magic == b"RF64" and declared == 0xFFFF_FFFF:
                return _Chunk(place, large, form)
            return _Chunk(place, declared if declared < unknown else None, form)
        if head[:4] == b"ds64":
            large = int.from_bytes(file.at(place, 16)[8:], form.order)
        if len(head) < form.name + form.size or declared < 0:
            return None
        place += -(-declared // form.align) * form.align
    return None
