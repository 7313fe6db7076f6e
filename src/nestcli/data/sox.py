"""SoX, where it is installed, for the formats that libsndfile does not know."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile as sf

from nestcli.data.patience import seconds_for

_MOST_EXPANSION, _LEAST_LIMIT = 100, 256 << 20  # of a file's bytes as 32-bit samples, and bytes that any may have
_PATIENCE = 200  # s, and more for long files
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
    program = shutil.which("sox")
    if program is None:
        raise UnreadableError(f"{kind} needs the program sox; install it, or {_FFMPEG}")
    with TemporaryDirectory(prefix="nest-sox-") as folder:
        copy = str(Path(folder) / "decoded.w64")
        # no shell here, and an absolute path is no option, no pipe ("|command") and no address to SoX either
        source = ["--no-glob", "-V1", "-t", kind, os.path.abspath(path)]  # noqa: PTH100
        decoded = ["-t", "w64", "-e", "floating-point", "-b", "32", copy]
        size = Path(path).stat().st_size
        _run([program, *source, *decoded], max(_LEAST_LIMIT, _MOST_EXPANSION * size), _PATIENCE + seconds_for(size))
        yield copy


def _run(command: list[str], limit: int, patience: float) -> None:
    """Run SoX for `patience` s at most; it may write `limit` bytes: silence of months is packed into kilobytes."""
    with subprocess.Popen(  # noqa: S603  (no shell)
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        if hasattr(resource, "prlimit"):
            with suppress(OSError):  # it has ended already
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        try:
            complaint = process.communicate(timeout=patience)[1].decode("utf-8", "replace").strip()
        except subprocess.TimeoutExpired:
            process.kill()
            raise UnreadableError(f"SoX has not decoded it in {patience:.0f} s") from None
    if process.returncode == -signal.SIGXFSZ or "File too large" in complaint:
        raise UnreadableError(f"decoded it has more than {limit:,} bytes, as no recording of its size has")
    if process.returncode != 0 or complaint:  # SoX ends with 0 after some failures
        raise UnreadableError(f"SoX cannot decode it: {complaint.rpartition(chr(10))[2]}")
