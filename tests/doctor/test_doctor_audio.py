"""libsndfile, soxr, SoX and ffmpeg, there, broken and missing."""

from pathlib import Path

import pytest

from nestcli.doctor.audio import audio_checks as checks_of
from nestcli.doctor.audio import formats_check, sox_check, soxr_check
from nestcli.doctor.trials import Answer

FINE = Answer({"libsndfile": "1.2.2", "failures": {"wav": "", "mp3": ""}})


def fake_sox(folder: Path, script: str) -> str:
    program = folder / "sox"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(folder)


def test_libsndfile() -> None:
    assert formats_check(FINE).found == "1.2.2: wav, mp3 written and read back"
    old = formats_check(Answer({"libsndfile": "1.0.31", "failures": {"wav": "", "mp3": "ValueError: no MP3"}}))
    assert old.state == "problem"
    assert "mp3: ValueError: no MP3" in old.found
    assert "libsndfile 1.2" in old.remedy
    missing = formats_check(Answer(error="OSError: sndfile library not found"))
    assert missing.state == "problem"
    assert "apt-get install libsndfile1" in missing.remedy


def test_soxr() -> None:
    assert soxr_check(Answer({"error": 0.0})).state == "ok"
    assert "--force-reinstall soxr" in soxr_check(Answer(error="ImportError: no")).remedy


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        ("echo 'sox: SoX v14.4.2'; echo 'AUDIO FILE FORMATS: amr-nb amr-wb gsm wv'", "ok", "14.4.2: AMR, AMR-WB"),
        ("echo 'AUDIO FILE FORMATS: gsm wav wv'", "note", "without AMR, AMR-WB"),
        ("exit 127", "problem", "exit code 127"),
    ],
)  # fmt: skip
def test_sox(script: str, state: str, found: str, tmp_path: Path) -> None:
    check = sox_check(fake_sox(tmp_path, script))
    assert check.state == state
    assert found in check.found
    assert state == "ok" or "libsox-fmt-all" in check.remedy


def test_without_sox_and_ffmpeg(tmp_path: Path) -> None:
    checks = {check.name: check for check in checks_of({"formats": FINE, "soxr": Answer()}, str(tmp_path))}
    assert checks["SoX"].state == "note"
    assert "apt-get install sox" in checks["SoX"].remedy
    assert checks["ffmpeg"].state == "ok"
    assert "optional" in checks["ffmpeg"].found
