"""Checks of the audio decoders: libsndfile and soxr are required, SoX and ffmpeg optional."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial

from nestcli.doctor.report import Check
from nestcli.doctor.trials import Answer

_check = partial(Check, "audio")
TRIALS = ("formats", "soxr")
_BY_SOX = {"amr-nb": "AMR", "amr-wb": "AMR-WB", "wv": "WavPack", "gsm": "GSM"}
_INSTALL = "apt-get install sox libsox-fmt-all (Debian), brew install sox (macOS)"
_LIMIT = 20.0  # s


def audio_checks(answers: Mapping[str, Answer], path: str | None) -> Iterator[Check]:
    """Yield all checks of the section; programs are looked up in `path`."""
    yield formats_check(answers["formats"])
    yield soxr_check(answers["soxr"])
    yield sox_check(path)
    found = shutil.which("ffmpeg", path=path)
    words = found or "not found; optional: it converts formats that nest cannot read (m4a, wma, video)"
    yield _check("ffmpeg", "ok", words)


def formats_check(answer: Answer) -> Check:
    """Check that libsndfile wrote and read back a tone in every format."""
    if answer.error:
        remedy = "No audio can be read. Debian: apt-get install libsndfile1; or pip install --force-reinstall soundfile"
        return _check("libsndfile", "problem", f"does not work: {answer.error}", remedy)
    version, failures = answer.facts["libsndfile"], answer.facts["failures"]
    works = ", ".join(name for name, why in failures.items() if not why)
    words = f"{version}: {works or 'nothing'} written and read back"
    failed = "; ".join(f"{name}: {why}" for name, why in failures.items() if why)
    if failed:
        remedy = "pip install --force-reinstall soundfile installs libsndfile 1.2, which reads all of them."
        return _check("libsndfile", "problem", f"{words}; {failed}", remedy)
    return _check("libsndfile", "ok", words)


def soxr_check(answer: Answer) -> Check:
    if answer.error:
        remedy = "Audio at other sample rates cannot be read. pip install --force-reinstall soxr"
        return _check("resampling", "problem", f"soxr does not work: {answer.error}", remedy)
    return _check("resampling", "ok", "soxr resampled a tone from 44.1 to 16 kHz")


def sox_check(path: str | None) -> Check:
    """Check that the program sox works, and which of nest's SoX formats it supports."""
    program = shutil.which("sox", path=path)
    if program is None:
        words = "not found: AMR, WavPack and GSM cannot be read"
        return _check("SoX", "note", words, f"Needed only for those: {_INSTALL}.")
    try:
        done = subprocess.run(  # noqa: S603  # the program that reads these formats
            [program, "--help"], capture_output=True, stdin=subprocess.DEVNULL, errors="replace", timeout=_LIMIT,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return _check("SoX", "problem", f"{program} does not run: {error}", f"Reinstall it: {_INSTALL}.")
    version = re.search(r"SoX v?([\d.]+)", done.stdout)
    known = re.search(r"^AUDIO FILE FORMATS:(.*)", done.stdout, re.MULTILINE)
    if known is None:
        words = f"{program} does not list the formats that it reads (exit code {done.returncode})"
        return _check("SoX", "problem", words, f"Reinstall it: {_INSTALL}.")
    words = f"{program}{f', {version[1]}' if version else ''}"
    lacking = [name for kind, name in _BY_SOX.items() if kind not in known[1].split()]
    if lacking:
        return _check("SoX", "note", f"{words}, without {', '.join(lacking)}", f"Needed only for those: {_INSTALL}.")
    return _check("SoX", "ok", f"{words}: {', '.join(_BY_SOX.values())}")
