"""Folders without room, that cannot be written to, or whose file system does not do what checkpoints need."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nestcli.doctor import disk
from nestcli.doctor.disk import cache_check, disk_checks
from nestcli.doctor.machine import Mount
from nestcli.doctor.report import Check

GIB = 1 << 30


def look(out: Path, free: int = 100 * GIB, environ: dict[str, str] | None = None) -> dict[str, Check]:
    return {check.name: check for check in disk_checks(out, environ or {}, lambda folder: (free, 0, free))}


def test_a_folder_that_is_fine_and_left_as_it_was(tmp_path: Path) -> None:
    checks = look(tmp_path / "not" / "yet")
    assert [check.state for check in checks.values()] == ["ok"] * 4
    assert checks["results"].found.startswith(f"{tmp_path}/not/yet: 100.0 GiB free")
    assert not list(tmp_path.iterdir())


def test_odd_names_are_fine(tmp_path: Path) -> None:
    folder = tmp_path / "语音 'x' $(y)\nz"
    folder.mkdir()
    assert look(folder)["file system"].state == "ok"


@pytest.mark.parametrize(("free", "state"), [(8 * GIB, "ok"), (3 * GIB, "note"), (GIB // 2, "problem")])
def test_room(free: int, state: str, tmp_path: Path) -> None:
    check = look(tmp_path, free)["results"]
    assert check.state == state
    assert state == "ok" or "exp_manager.exp_dir" in check.remedy


def test_no_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_files, f_favail = 1000, 0

    monkeypatch.setattr(os, "statvfs", lambda folder: Full)
    assert "inodes" in look(tmp_path)["results"].remedy


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, where not even root can make a folder")
def test_a_folder_that_cannot_be_written_to() -> None:
    checks = look(Path("/proc/self/nest"))
    assert checks["results"].state == "problem"
    assert "cannot be written to" in checks["results"].found
    assert "choose another folder" in checks["results"].remedy
    assert "file system" not in checks


@pytest.mark.parametrize("broken", ["fsync", "replace", "flock"])
def test_a_file_system_that_does_not_do(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EINVAL, f"no {broken}")

    where = {"fsync": os, "replace": Path, "flock": fcntl}[broken]
    monkeypatch.setattr(where, broken, fails)
    check = look(tmp_path)["file system"]
    assert check.state == "problem"
    assert f"no {broken}" in check.found
    assert "local disk" in check.remedy


def test_a_file_system_that_folds_capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "capitals" not in look(tmp_path)
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (touch(path), touch(path.with_name(path.name.upper()))))
    check = look(tmp_path)["capitals"]
    assert (check.state, "upper and lower case" in check.remedy) == ("note", True)


def test_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    check = look(tmp_path)["temporary files"]
    assert check.state == "problem"
    assert "Set TMPDIR" in check.remedy


def test_the_cache_of_compiled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = look(tmp_path, environ={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert checks["compiled code"].found == str(tmp_path / "cache")
    monkeypatch.setattr(disk, "mount_of", lambda path: Mount("tmpfs", frozenset({"noexec"})))
    check = cache_check(tmp_path / "cache", tmp_path)
    assert check.state == "note"
    assert "noexec" in check.found
    assert "TORCHINDUCTOR_CACHE_DIR" in check.remedy
