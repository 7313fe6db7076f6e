"""The bytes of an open file, read in pieces wherever they stand; the decoder's own place in it does not move."""

from __future__ import annotations

import os

_PIECE = 1 << 20
_HEAD = 1 << 12
_MOST_TAGS = 16  # in a row
_MOST_PADDING = 64 << 20  # bytes: zeros are not looked for in more


class FileBytes:
    """An open file by its descriptor, and its size in bytes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._head = os.pread(descriptor, _HEAD, 0)

    def at(self, place: int, count: int) -> bytes:
        """Up to `count` bytes from `place` on; fewer where the file ends."""
        if 0 <= place <= _HEAD - count:  # most calls: headers are read field by field
            return self._head[place : place + count]
        return os.pread(self.descriptor, count, place) if 0 <= place < self.size else b""

    def tail(self, count: int) -> bytes:
        return self.at(max(0, self.size - count), count)

    def place(self) -> int:
        """Where the decoder has read to."""
        return os.lseek(self.descriptor, 0, os.SEEK_CUR)

    def only_zeros(self, start: int, end: int) -> bool:
        if end - start > _MOST_PADDING:
            return False
        return not any(self.at(at, min(_PIECE, end - at)).strip(b"\0") for at in range(start, end, _PIECE))

    def behind_id3(self, place: int = 0) -> int:
        """The place behind the ID3 tags, version 2, that begin at `place`."""
        for _ in range(_MOST_TAGS):
            tag = self.at(place, 10)
            if tag[:3] != b"ID3" or len(tag) < 10:
                break
            place += 10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])  # seven bits of each byte count
        return place

    def before_tags(self) -> int:
        """The place where the tags at the file's end begin: ID3 version 1, and APE."""
        end = self.size
        if self.at(end - 128, 3) == b"TAG":
            end -= 128
        footer = self.at(end - 32, 32)
        if footer[:8] == b"APETAGEX":
            has_header = footer[23] & 0x80
            end -= int.from_bytes(footer[12:16], "little") + (32 if has_header else 0)
        return max(0, end)
