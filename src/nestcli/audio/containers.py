"""Locate the samples in a chunked file (WAV, AIFF, CAF, W64, VOC) or behind an AU header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nestcli.audio.lengths import FileBytes

CHUNK_SLACK = 64  # bytes: sizes that count the header too, or forget a padding byte, are common and harmless
_UNKNOWN_SIZE = 0x7F00_0000  # SoX writes 0x7F000008 or 0x7FFFF000 into a pipe, ffmpeg 0xFFFFFFFF
_MAX_CHUNKS = 1000  # limit for the chunks before the samples, and again for those behind them


def behind_samples(file: FileBytes, place: int, form: Form | None) -> int:
    """Return the number of bytes from `place`, behind the samples, that are not other chunks, tags or zeros."""
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


def _next_chunk(file: FileBytes, place: int, form: Form | None) -> tuple[bytes, int, int] | None:
    """Return name, start of the content and size of the chunk at `place`, or None if no whole chunk is there."""
    if form is None:
        return None
    head = file.at(place, form.name + form.size)
    start, size = place + len(head), int.from_bytes(head[form.name :], form.order)
    is_name = len(head) == form.name + form.size and head[:4].isascii() and head[:4].decode("ascii").isprintable()
    return (head[: form.name], start, size) if is_name and start + size <= file.size + CHUNK_SLACK else None


_Order = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Start of a file's samples, their declared size in bytes or None, and the layout of the chunks or None."""

    start: int
    declared: int | None
    form: Form | None


@dataclass(frozen=True, slots=True)
class Form:
    """Chunk layout of a family of formats: `name` and `size` are the widths in bytes of these two header fields.

    `first` is the position of the first chunk. Chunk lengths are rounded up to a multiple of `align`. With
    `inclusive`, a chunk's size counts its header too.
    """

    first: int
    order: _Order
    name: int = 4
    size: int = 4
    align: int = 2
    wanted: bytes = b"data"
    inclusive: bool = False


_FORMS = {
    b"RIFF": Form(12, "little"),
    b"RIFX": Form(12, "big"),
    b"RF64": Form(12, "little"),
    b"FORM": Form(12, "big", wanted=b"SSND"),
    b"riff": Form(40, "little", name=16, size=8, align=8, inclusive=True),  # W64
    b"caff": Form(8, "big", size=8, align=1),
    b"Crea": Form(26, "little", name=1, size=3, align=1, wanted=b"\t"),  # VOC, with the usual block type
}


def samples_chunk(file: FileBytes) -> Chunk | None:
    begin = file.behind_id3()
    magic = file.at(begin, 4)
    if magic in (b".snd", b"dns."):
        order: _Order = "big" if magic == b".snd" else "little"
        start, declared = (int.from_bytes(file.at(begin + at, 4), order) for at in (4, 8))
        return Chunk(begin + start, declared if declared < _UNKNOWN_SIZE else None, None)
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
                return Chunk(place, large, form)
            return Chunk(place, declared if declared < unknown else None, form)
        if head[:4] == b"ds64":
            large = int.from_bytes(file.at(place, 16)[8:], form.order)
        if len(head) < form.name + form.size or declared < 0:
            return None
        place += -(-declared // form.align) * form.align
    return None
