"""Check that an audio file holds as much audio as its header declares, by its bytes and the decoder's output.

libsndfile silently reduces the declared length of most formats to what is there, so half a WAV looks like a whole WAV
of half the length. It also silently stops at the declared length, even if more audio follows. Formats that SoX decodes
are not checked. A fault is a pair (reason, detail); both are empty if there is none.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

import soundfile as sf

from nestcli.audio.containers import CHUNK_SLACK, behind_samples, samples_chunk
from nestcli.audio.sox import CONVERT, RECOVER

Fault = tuple[str, str]
NO_FAULT: Fault = ("", "")
SLACK = 0.1  # s that a file may hold beyond its declared length; too short for a word

# Formats that state their length. In libsndfile's other formats a cut file looks like a whole one.
READ_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "VOC", "NIST", "HTK", "FLAC", "OGG", "MP3")

_CHUNKED = ("WAV", "WAVEX", "AIFF", "RF64", "W64", "CAF", "VOC", "AU")
_READ_ON = ("W64", "VOC", "G721_32", "G723_24", "G723_40")  # formats and codecs that are decoded to the file's end
_UNKNOWN_LENGTH = 1 << 62  # frames; libsndfile reports more for a FLAC without a length (an encoder wrote to a pipe)
_IGNORE_LENGTH = (  # without the option, both programs stop where the header says so
    "convert it with `sox --ignore-length FILE FILE.flac`, or a WAV with `ffmpeg -ignore_length 1 -i FILE FILE.flac`"
)
_PIECE = 1 << 20
_HEAD = 1 << 12
_MOST_TAGS = 16  # maximum number of consecutive ID3v2 tags
_MOST_PADDING = 64 << 20  # bytes; a longer remainder is not checked for being all zeros
_TAIL = 1 << 16  # bytes; an Ogg page is never longer, a last FLAC frame rarely
_READ_AHEAD, _LEFT = 1 << 16, 1 << 18  # bytes before and behind the decoder's position where its stream must end
_MPEG_SLACK = 2 * 1152  # samples: encoder delay and padding may or may not be counted
_MOST_TRIES = 5_000  # positions between the frames of a damaged MP3 that are tried
_MOST_STREAMS = 64  # multiplexed streams at the start of an Ogg file


class FileBytes:
    """Positioned reads of an open file, given by its descriptor; `size` is in bytes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._head = os.pread(descriptor, _HEAD, 0)

    def at(self, place: int, count: int) -> bytes:
        """Return up to `count` bytes from `place`; fewer at the end of the file."""
        if 0 <= place <= _HEAD - count:  # most calls: headers are read field by field
            return self._head[place : place + count]
        return os.pread(self.descriptor, count, place) if 0 <= place < self.size else b""

    def tail(self, count: int) -> bytes:
        return self.at(max(0, self.size - count), count)

    def place(self) -> int:
        """Return the position up to which the decoder has read."""
        return os.lseek(self.descriptor, 0, os.SEEK_CUR)

    def only_zeros(self, start: int, end: int) -> bool:
        if end - start > _MOST_PADDING:
            return False
        return not any(self.at(at, min(_PIECE, end - at)).strip(b"\0") for at in range(start, end, _PIECE))

    def behind_id3(self, place: int = 0) -> int:
        """Return the position behind the ID3v2 tags that begin at `place`."""
        for _ in range(_MOST_TAGS):
            tag = self.at(place, 10)
            if tag[:3] != b"ID3" or len(tag) < 10:
                break
            place += 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])  # seven bits of each byte count
        return place

    def before_tags(self) -> int:
        """Return the position where the tags at the file's end (ID3v1 and APE) begin."""
        end = self.size
        if self.at(end - 128, 3) == b"TAG":
            end -= 128
        footer = self.at(end - 32, 32)
        if footer[:8] == b"APETAGEX":
            has_header = footer[23] & 0x80
            end -= int.from_bytes(footer[12:16], "little") + (32 if has_header else 0)
        return max(0, end)


def length_fault(sound: sf.SoundFile, frames: int) -> Fault:
    """Return the fault of a file that holds more or less audio than was decoded, or NO_FAULT.

    `frames` is the frame at which the decoder stopped: `sound.frames` or an earlier one.
    """
    if not isinstance(sound.name, int):  # this is a file that SoX wrote
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
    """Return True if the header states the length of the audio."""
    return bool(sound.frames < _UNKNOWN_LENGTH)


def _nist_frames(file: FileBytes) -> int:
    found = re.search(rb"\nsample_count -i (\d{1,18})\s", file.at(0, 1024))
    return int(found[1]) if found else 0


def _chunk_fault(file: FileBytes, sound: sf.SoundFile) -> Fault:
    """Compare the declared size of the sample chunk with the file's size, and check what follows the chunk."""
    found = samples_chunk(file)
    if found is None or found.declared is None:
        return NO_FAULT
    held = file.size - found.start
    if found.declared > held + CHUNK_SLACK:
        return "truncated", f"the header declares {found.declared} bytes of audio, the file holds {held}; {RECOVER}"
    if held - found.declared <= CHUNK_SLACK or (found.declared == 0 and sound.frames > 0):
        return NO_FAULT
    if sound.format in _READ_ON or sound.subtype in _READ_ON:
        behind, decoded = held - found.declared, held
    else:
        behind, decoded = behind_samples(file, found.start + found.declared, found.form), found.declared
    empty = found.declared == 0 and behind > 0
    if empty or behind * sound.frames > SLACK * sound.samplerate * decoded:
        declared = sound.frames * found.declared // max(1, decoded)
        return more_follows(declared, sound.samplerate, _IGNORE_LENGTH)
    return NO_FAULT


def more_follows(declared: int, rate: int, remedy: str = CONVERT) -> Fault:
    return "wrong_duration", f"the header declares {declared / rate:.2f} s, and more follows; {remedy}"


def shorter(declared: int, frames: int, rate: int) -> Fault:
    detail = f"the header declares {declared / rate:.2f} s, the file holds {frames / rate:.2f} s; {RECOVER}"
    return "truncated", detail


def _holds_near_end(file: FileBytes, marker: bytes, start: int) -> bool:
    """Return True if another stream begins, behind `start`, near the position where the decoder stopped."""
    first = max(start, file.place() - _READ_AHEAD)
    return re.search(marker, file.at(first, _READ_AHEAD + _LEFT)) is not None


# --- Ogg


def ogg_fault(file: FileBytes) -> Fault:
    """Look for a last page that is cut off, and for a second stream behind the one where the decoder stopped.

    A missing end-of-stream flag proves nothing: live streams lack it.
    """
    tail = file.tail(_TAIL)
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 255
    if len(page) < 27 + segments + sum(page[27 : 27 + segments]):
        return "truncated", f"the last page of the Ogg stream is cut off; {RECOVER}"
    place = file.behind_id3()
    streams = set()
    for _ in range(_MOST_STREAMS):
        head = file.at(place, 27 + 255)
        if head[:4] != b"OggS" or len(head) < 28 or not head[5] & 2:
            break
        streams.add(head[14:18])
        place += 27 + head[26] + sum(head[27 : 27 + head[26]])
    other = bool(streams) and page[14:18] not in streams
    if other or _holds_near_end(file, rb"OggS\0\x02", place):
        return "wrong_duration", f"several Ogg streams follow one another, and only one would be read; {CONVERT}"
    return NO_FAULT


# --- FLAC


def flac_fault(file: FileBytes, sound: sf.SoundFile) -> Fault:
    """Compare the declared length with the number in the last frame's header, and look for a second stream."""
    begin = file.behind_id3()
    info = file.at(begin, 42)
    if info[:4] == b"fLaC" and len(info) == 42:
        end = _flac_end(file.tail(_TAIL), int.from_bytes(info[8:10], "big"), int.from_bytes(info[10:12], "big"))
        if end is not None and end - sound.frames > SLACK * sound.samplerate:
            return more_follows(sound.frames, sound.samplerate)
    if _holds_near_end(file, rb"fLaC[\0\x80]\0\0\x22", begin + 42):
        return more_follows(sound.frames, sound.samplerate)
    return NO_FAULT


def _flac_end(tail: bytes, least_block: int, most_block: int) -> int | None:
    """Return the number of the sample behind the last frame, or None if no two consecutive frames are found."""
    found = re.finditer(rb"\xff[\xf8\xf9]", tail)
    later: tuple[int, int] | None = None
    for at in reversed([each.start() for each in found]):
        frame = _flac_frame(tail[at : at + 16], least_block, most_block)
        if frame is None:
            continue
        if later is not None and frame[1] == later[0]:
            return later[1]
        later = frame
    return later[1] if later is not None and later[0] == 0 else None


def _flac_frame(head: bytes, least_block: int, most_block: int) -> tuple[int, int] | None:
    """Return a frame's first sample and the one behind its last, from its header; None if this is not a frame."""
    code, rate_code = (head[2] >> 4, head[2] & 15) if len(head) == 16 else (0, 0)
    if code == 0 or head[3] & 1 or head[3] >> 4 > 10:
        return None
    more = 0 if head[4] < 0x80 else 8 - (~head[4] & 0xFF).bit_length() - 1  # continuation bytes, as in UTF-8
    number = head[4] if more == 0 else head[4] & (0x3F >> more)
    for byte in head[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    at = 5 + more
    if code in (6, 7):
        block = int.from_bytes(head[at : at + code - 5], "big") + 1
        at += code - 5
    else:
        block = 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8)
    at += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if block > most_block or at >= len(head) or _crc8(head[:at]) != head[at]:
        return None
    start = number if head[1] & 1 else number * least_block
    return start, start + block


def _crc8(content: bytes) -> int:
    value = 0
    for byte in content:
        value = _crc8_table()[value ^ byte]
    return value


@lru_cache(maxsize=1)
def _crc8_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [value << 1 & 0xFF ^ (7 if value & 0x80 else 0) for value in table]
    return table


# --- MP3


def mpeg_fault(file: FileBytes, sound: sf.SoundFile, frames: int) -> Fault:
    """Compare the stated length with the frames in the file; without a stated length, libsndfile estimates one."""
    start = file.behind_id3()
    head = file.at(start, 4096)
    bytes_missing = _missing_mpeg_bytes(file, start, head)
    if bytes_missing is not None and frames < sound.frames - (0 if bytes_missing else _MPEG_SLACK):
        return shorter(sound.frames, frames, sound.samplerate)
    count, samples = _mpeg_frames(file, start)
    stated = _stated_mpeg_frames(head)
    if stated is not None:
        return more_follows(sound.frames, sound.samplerate) if count - 1 - stated > 2 else NO_FAULT
    if count * samples - sound.frames > _MPEG_SLACK:
        there, read = count * samples / sound.samplerate, sound.frames / sound.samplerate
        return (
            "wrong_duration",
            f"it does not state its length, so only {read:.2f} of {there:.2f} s would be read; {CONVERT}",
        )
    return NO_FAULT


_XING = re.compile(rb"(?:Xing|Info)\0\0\0(.)((?:.{4})?)(.{4})", re.DOTALL)


def _stated_mpeg_frames(head: bytes) -> int | None:
    """Return the number of frames that the first frame states, not counting itself, or None."""
    if (found := _XING.search(head)) and found[1][0] & 1:
        return int.from_bytes(found[2], "big") or None
    at = head.find(b"VBRI")
    return int.from_bytes(head[at + 14 : at + 18], "big") if at >= 0 and len(head) >= at + 18 else None


def _missing_mpeg_bytes(file: FileBytes, start: int, head: bytes) -> bool | None:
    """Return True if a file has fewer bytes than its first frame states; None if that states no length at all."""
    found = _XING.search(head)
    if found is None:
        return False if any(name in head for name in (b"Xing", b"Info", b"VBRI")) else None
    has_frames, has_bytes = found[1][0] & 1, found[1][0] & 2
    if not has_bytes:
        return False
    stated = int.from_bytes(found[3] if has_frames else found[2], "big")
    held = file.size - start - found.start()
    return stated - held > max(CHUNK_SLACK, stated // 100)


_KBPS = {  # (MPEG 1 or not, layer code: 1 is III, 2 is II) -> kbit/s by bit rate code
    (True, 1): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (False, 1): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@lru_cache(maxsize=1)
def _frame_lengths() -> dict[int, tuple[int, int]]:
    """Return a table from the second and third header byte of an MPEG frame to its length in bytes and in samples."""
    lengths = {}
    for key in range(0xE000, 0x10000):
        version, layer, bits, rate = key >> 11 & 3, key >> 9 & 3, key >> 4 & 15, key >> 2 & 3
        if version == 1 or layer not in (1, 2) or bits in (0, 15) or rate == 3:
            continue
        samples = 576 if layer == 1 and version != 3 else 1152
        hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
        kbps = _KBPS[version == 3, layer][bits]
        lengths[key] = samples // 8 * kbps * 1000 // hertz + (key >> 1 & 1), samples
    return lengths


def _mpeg_frames(file: FileBytes, place: int) -> tuple[int, int]:
    """Walk from frame to frame, past tags and damage; return the number of frames and the samples in each."""
    lengths, end = _frame_lengths(), file.before_tags()
    count = samples = base = 0
    tries = _MOST_TRIES
    piece = b""
    while place + 4 <= end:
        at = place - base
        if not 0 <= at <= len(piece) - 4:
            base, piece, at = place, file.at(place, 1 << 20), 0
            if len(piece) < 4:
                break
        found = lengths.get(piece[at + 1] << 8 | piece[at + 2]) if piece[at] == 0xFF else None
        if found is not None:
            count += 1
            place, samples = place + found[0], found[1]
            continue
        if tries <= 0:
            break
        tags_end = file.behind_id3(place)
        at, tries = (tags_end - base, tries - 1) if tags_end > place else _next_frame(piece, at + 1, lengths, tries)
        place = base + at
    return count, samples


def _next_frame(piece: bytes, at: int, lengths: dict[int, tuple[int, int]], tries: int) -> tuple[int, int]:
    """Return the position of the next frame that another frame follows, else the end of `piece`; and the tries left."""
    while tries > 0:
        tries -= 1
        at = piece.find(b"\xff", at)
        if at < 0 or at + 4 > len(piece):
            break
        found = lengths.get(piece[at + 1] << 8 | piece[at + 2])
        after = at + found[0] if found else len(piece)
        if after + 3 <= len(piece) and piece[after] == 0xFF and piece[after + 1] << 8 | piece[after + 2] in lengths:
            return at, tries
        at += 1
    return len(piece), tries
