"""Time limits for the work on one file, after which its process is killed: a disk or a decoder may hang."""

from __future__ import annotations

import os

PATIENCE = 120.0  # s that any file may take
REMEDY = "check that its disk responds, and give a larger --patience SECONDS if files may take that long there"
_BYTES_A_SECOND = 100_000  # speed of the slowest disk or decoder that is tolerated
_AUDIO_A_SECOND = 20.0  # s of audio that the slowest processor decodes, processes and encodes in one second


def file_size(path: str) -> int:
    """Return the size of a file in bytes; 0 if it does not exist."""
    try:
        return os.stat(path).st_size  # noqa: PTH116  (str paths, perhaps with bytes that are not UTF-8)
    except (OSError, ValueError):
        return 0


def seconds_for(size: int, duration: float = 0.0) -> float:
    """Return the seconds that `size` bytes and `duration` s of audio may take in addition to the patience."""
    return size / _BYTES_A_SECOND + duration / _AUDIO_A_SECOND
