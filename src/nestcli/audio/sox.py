"""Use SoX, if it is installed, to decode formats that libsndfile does not know."""

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

from nestcli.jobs.patience import seconds_for
from nestcli.storage.file_kinds import HEAD, foreign

# SoX may write 100 times a file's bytes as 32-bit samples, or 256 MiB if that is more.
_MOST_EXPANSION, _LEAST_LIMIT = 100, 256 << 20
_PATIENCE = 200  # s that SoX may take; long files get more

CONVERT = "convert it, for example with `ffmpeg -i FILE FILE.flac`"
_IF_IT_PLAYS = "if a player plays it, convert it with `ffmpeg -i FILE FILE.flac`"
RECOVER = "copy it again, or keep what is there with `ffmpeg -i FILE FILE.flac`"


class UnreadableError(Exception):
    """Raised if SoX cannot decode a file either; the text says why."""


def _sox_type(path: str, head: bytes) -> str | None:
    """Return SoX's name for the format of a file that libsndfile does not know, judged by its content.

    SoX itself falls back to the file name's ending; then it decodes any bytes as noise, or follows a playlist.
    """
    for magic, kind in ((b"#!AMR\n", "amr-nb"), (b"#!AMR-WB\n", "amr-wb"), (b"wvpk", "wv")):
        if head.startswith(magic):
            return kind
    frames_of_gsm = {byte >> 4 for byte in head[:64:33]}  # a frame has 33 bytes and begins with the half byte 0xD
    return "gsm" if path.lower().endswith(".gsm") and frames_of_gsm == {0xD} else None


# Formats that ffmpeg decodes and libsndfile does not: position in the file, the bytes there, name.
_ONLY_FFMPEG = (
    (4, b"ftyp", "M4A, MP4 or 3GP"),
    (4, b"moov", "QuickTime"),
    (4, b"mdat", "QuickTime"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"ADIF", "AAC"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"\x7f\xfe\x80\x01", "DTS"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"TTA1", "True Audio"),
    (0, b"tBaK", "TAK"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b"ajkg", "Shorten"),
    (0, b"DSD ", "DSD"),
    (0, b"FRM8", "DSD"),
    (0, b".ra\xfd", "RealAudio"),
    (0, b".RMF", "RealMedia"),
    (0, b"FLV\x01", "Flash video"),
    (0, b"\0\0\x01\xba", "MPEG video"),
    (8, b"AVI ", "AVI"),
    (28, b"Speex   ", "Speex"),
)


def unreadable(path: str, head: bytes, why: str = "") -> str:
    """Say why a file with these first bytes cannot be read and what to do; `why` is the decoder's own message."""
    kind = next((kind for at, magic, kind in _ONLY_FFMPEG if head[at : at + len(magic)] == magic), None)
    if kind is not None:
        return f"this is {kind}, which ffmpeg reads and libsndfile does not; {CONVERT}"
    if other := foreign(path, head):
        return other
    claimed = os.path.splitext(path)[1][1:].upper()  # noqa: PTH122
    if not why and claimed in sf.available_formats():
        why = f"its content is neither {claimed} nor anything else that can be read"
    return f"{why or 'neither libsndfile nor SoX knows this format'}; {_IF_IT_PLAYS}"


@contextmanager
def decoded_by_sox(path: str) -> Iterator[str]:
    """Have SoX decode a file into a temporary file that libsndfile reads. Raises UnreadableError."""
    with open(path, "rb") as file:  # noqa: PTH123  (a str path, perhaps with bytes that are not UTF-8)
        head = file.read(HEAD)
    kind = _sox_type(path, head)
    if kind is None:
        raise UnreadableError(unreadable(path, head))
    program = shutil.which("sox")
    if program is None:
        raise UnreadableError(f"{kind} needs the program sox; install it, or {CONVERT}")
    with TemporaryDirectory(prefix="nest-sox-") as folder:
        copy = str(Path(folder) / "decoded.w64")
        # No shell is used. SoX cannot mistake an absolute path for an option, a pipe ("|command") or an address.
        source = ["--no-glob", "-V1", "-t", kind, os.path.abspath(path)]  # noqa: PTH100
        decoded = ["-t", "w64", "-e", "floating-point", "-b", "32", copy]
        size = Path(path).stat().st_size
        _run([program, *source, *decoded], max(_LEAST_LIMIT, _MOST_EXPANSION * size), _PATIENCE + seconds_for(size))
        yield copy


def _run(command: list[str], limit: int, patience: float) -> None:
    """Run SoX for at most `patience` s and let it write `limit` bytes: kilobytes can hold months of silence."""
    with subprocess.Popen(  # noqa: S603  (no shell)
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        if hasattr(resource, "prlimit"):
            with suppress(OSError):  # SoX has ended already
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        try:
            complaint = process.communicate(timeout=patience)[1].decode("utf-8", "replace").strip()
        except subprocess.TimeoutExpired:
            process.kill()
            raise UnreadableError(f"SoX did not decode it within {patience:.0f} s; {CONVERT}") from None
    if process.returncode == -signal.SIGXFSZ or "File too large" in complaint:
        raise UnreadableError(
            f"it decodes to more than {limit:,} bytes, too many for a recording of its size; leave it out"
        )
    if process.returncode != 0 or complaint:  # SoX exits with 0 after some failures
        raise UnreadableError(f"SoX cannot decode it: {complaint.rpartition(chr(10))[2]}; {_IF_IT_PLAYS}")
