"""How long the work on one file may take before its process is ended: a disk or a decoder may never answer."""

from __future__ import annotations

import os

PATIENCE = 120.0  # s that any file may take
REMEDY = "look whether its disk answers, and give --patience SECONDS if files may take so long there"
_BYTES_A_SECOND = 100_000  # of the slowest disk or decoder that is still waited for
_AUDIO_A_SECOND = 20.0  # s of audio that the slowest processor decodes, changes and encodes in one


def file_size(path: str) -> int:
    """The bytes of a file; 0 for one that is not there."""
    try:
        return os.stat(path).st_size  # noqa: PTH116  (str paths, perhaps with bytes that are not UTF-8)
    except (OSError, ValueError):
        return 0


def seconds_for(size: int, duration: float = 0.0) -> float:
    """What a file of `size` bytes, or `duration` s of audio, may take beyond the patience."""
    return size / _BYTES_A_SECOND + duration / _AUDIO_A_SECOND
