"""Refuse files of weights with an implausible size before anything of them is read."""

from __future__ import annotations

import os
import stat

_SMALL = 16 << 20  # bytes; holes in smaller files do no harm
_MOST_HOLES = 16  # largest ratio of a file's size to its bytes on disk; compressing file systems save less on weights


def oversized(status: os.stat_result) -> str:
    """Return what is wrong with the size of a file of weights, in words; empty if it is plausible."""
    if not stat.S_ISREG(status.st_mode):
        return "it is a folder, a pipe or a device"
    held = 512 * getattr(status, "st_blocks", 0)  # 0 if the file system does not report it
    if status.st_size > _SMALL and 0 < held * _MOST_HOLES < status.st_size:
        return f"of its {status.st_size:,} bytes only {held:,} are on the disk, the rest are holes"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if status.st_size > memory:
        return f"it has {status.st_size:,} bytes, but this machine has only {memory:,} bytes of memory"
    return ""
