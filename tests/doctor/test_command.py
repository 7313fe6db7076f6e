"""`nest doctor` as it is typed: on this machine, in a broken installation, and called wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nestcli
from nestcli.cli.app import app
from nestcli.doctor import run
from nestcli.doctor.report import Check, Report

SOURCES = str(Path(nestcli.__file__).parents[1])
SECTIONS = ["installation", "devices", "audio", "disk", "nemo", "environment"]


def doctor(*words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nestcli.cli.app import main; main()", "doctor", *words]
    environ = {**os.environ, "COLUMNS": "80", "PYTHONPATH": SOURCES, **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, check=False)


def check_document(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    assert document.keys() == {"passed", "version", "checks"}
    for check in document["checks"]:
        assert check.keys() == {"section", "name", "state", "found", "remedy"}
        assert check["found"]
        assert (check["state"] == "ok") == (not check["remedy"])
    assert list(dict.fromkeys(check["section"] for check in document["checks"])) == SECTIONS
    assert document["passed"] == all(check["state"] != "problem" for check in document["checks"])
    checks = {check["name"]: check for check in document["checks"]}
    assert len(checks) == len(document["checks"]), "two checks have one name"
    return checks


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    done = doctor("--json", cwd=tmp_path)
    assert done.stderr == ""
    document = json.loads(done.stdout)
    checks = check_document(document)
    assert done.returncode == (0 if document["passed"] else 1)
    for name in (
        "torch",
        "lightning",
        "lhotse",
        "presets",
        "libsndfile",
        "resampling",
        "precision on CPU",
        "file system",
    ):
        assert checks[name]["state"] == "ok", checks[name]
    assert "16-mixed work" in checks["precision on CPU"]["found"]
    assert not list(tmp_path.iterdir()), "something was written"


def test_a_broken_installation_still_gives_the_table(tmp_path: Path) -> None:
    """No torch, a libsndfile that crashes, no rich to draw the table with, no SoX, and whatever else."""
    broken, work = tmp_path / "broken", tmp_path / "work"
    for folder in (broken, work):
        folder.mkdir()
    planted = {
        "torch": "raise ImportError('libtorch_cpu.so: cannot open shared object file')",
        "soundfile": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "rich": "raise ImportError('no rich')",
        "omegaconf": "raise OSError('no omegaconf')",
        "numpy": "raise ValueError('no numpy')",
    }
    for name, text in planted.items():
        (broken / f"{name}.py").write_text(text)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(broken), SOURCES]),
        "PATH": str(tmp_path), "OMP_NUM_THREADS": "6400", "USE_NEMO_CONFORMER": "true", "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
    }  # fmt: skip
    done = doctor("--out", "out", cwd=work, **variables)
    assert done.returncode == 1
    assert done.stderr == ""
    for words in (
        "PROBLEM  2", "libtorch_cpu.so", "killed by SIGSEGV", "-> Fix torch first", "no omegaconf", "no numpy",
        "apt-get install sox", "6400 threads", "asks for NeMo's encoder", "not UTF-8", "no C++ compiler", "problems: ",
    ):  # fmt: skip
        assert words in done.stdout, words
    as_json = doctor("--json", cwd=work, **variables)
    assert as_json.returncode == 1
    checks = check_document(json.loads(as_json.stdout))
    assert checks["soundfile"]["found"].endswith("the process was killed by SIGSEGV")
    assert not list(work.iterdir()), "something was written"


def planted(monkeypatch: pytest.MonkeyPatch, *states: str) -> None:
    checks = tuple(
        Check("disk", f"thing {number}", state, "found [it]", "" if state == "ok" else "do that")  # type: ignore[arg-type]
        for number, state in enumerate(states)
    )
    monkeypatch.setattr(run, "examine", lambda *_: Report(checks))


@pytest.mark.parametrize(("states", "code"), [(["ok"], 0), (["ok", "note"], 0), (["note", "problem"], 1)])
def test_exit_codes(states: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, *states)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == code
    answer = CliRunner().invoke(app, ["doctor", "--json"])
    assert answer.exit_code == code
    assert json.loads(answer.stdout)["passed"] is (code == 0)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "ok", "note", "problem")
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert "PROBLEM" in shown
    assert shown.count("-> do that") == 2
    assert "found [it]" in shown
    assert shown.endswith("1 problem: thing 2.\n1 note: thing 1.\n")


def test_a_wrong_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for words, message in (
        (["--out", "file"], "error: --out file: this is a file."),
        (["--nemo-python", "nowhere"], "error: --nemo-python nowhere: program not found."),
    ):
        done = doctor(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(message)
