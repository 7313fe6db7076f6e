"""SoX, where it is installed, for the formats that libsndfile does not know."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile as sf

_FFMPEG = "convert it, for example with `ffmpeg -i FILE -ac 1 FILE.flac`"


class UnreadableError(Exception):
    """A file that SoX cannot decode either; its text says why."""


def _sox_type(path: str) -> str | None:
    """Name in SoX's words the format of a file that libsndfile does not know, judged by its content.

    SoX itself falls back to the name's ending, and then decodes any bytes as noise, or follows a playlist.
    """
    with open(path, "rb") as file:  # noqa: PTH123  (a str path, perhaps with bytes that are not UTF-8)
        head = file.read(64)
    for magic, kind in ((b"#!AMR\n", "amr-nb"), (b"#!AMR-WB\n", "amr-wb"), (b"wvpk", "wv")):
        if head.startswith(magic):
            return kind
    frames_of_gsm = {byte >> 4 for byte in head[::33]}  # 33 bytes each, the first half byte is 0xD
    return "gsm" if path.lower().endswith(".gsm") and frames_of_gsm == {0xD} else None


def _unknown_format(path: str) -> str:
    claimed = os.path.splitext(path)[1][1:].upper()  # noqa: PTH122
    if claimed in sf.available_formats():
        return f"its content is neither {claimed} nor anything else that can be read"
    return f"neither libsndfile nor SoX knows this format; {_FFMPEG}"


@contextmanager
def decoded_by_sox(path: str) -> Iterator[str]:
    """Have SoX decode a file into a temporary one that libsndfile reads; raises UnreadableError."""
    kind = _sox_type(path)
    if kind is None:
        raise UnreadableError(_unknown_format(path))
    if shutil.which("sox") is None:  # asked first, because importing the package without it prints warnings
        raise UnreadableError(f"{kind} needs the program sox; install it, or {_FFMPEG}")
    from sox.core import sox

    with TemporaryDirectory(prefix="nest-sox-") as folder:
        copy = str(Path(folder) / "decoded.w64")
        # no shell here, and an absolute path is no option, no pipe ("|command") and no address to SoX either
        source = ["--no-glob", "-V1", "-t", kind, os.path.abspath(path)]  # noqa: PTH100
        try:
            status, _, complaint = sox([*source, "-t", "w64", "-e", "floating-point", "-b", "32", copy])
        except UnicodeDecodeError:  # the complaint repeats a name that is not UTF-8
            status, complaint = 1, ""
        if status != 0 or complaint:  # SoX ends with 0 after some failures
            last_line = (complaint or "").strip().rpartition("\n")[2]
            raise UnreadableError(f"SoX cannot decode it: {last_line}")
        yield copy
