"""Files of weights that a machine cannot or need not hold: refused before anything of them is read."""

from __future__ import annotations

import os
import stat

_SMALL = 16 << 20  # bytes; of smaller files nobody minds the holes
_MOST_HOLES = 16  # times what is on the disk: file systems that compress save less on weights


def oversized(status: os.stat_result) -> str:
    """What is wrong with the size of a file of weights, in words; empty if nothing is."""
    if not stat.S_ISREG(status.st_mode):
        return "it is a folder, a pipe or a device"
    held = 512 * getattr(status, "st_blocks", 0)  # 0 where a file system does not say
    if status.st_size > _SMALL and 0 < held * _MOST_HOLES < status.st_size:
        return f"of its {status.st_size:,} bytes only {held:,} are on the disk, the rest are holes"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if status.st_size > memory:
        return f"it has {status.st_size:,} bytes, and this machine a memory of {memory:,}"
    return ""
