"""Processes that may die: every trial has an answer, and what they try really works here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nestcli.doctor import child
from nestcli.doctor.trials import run_trials


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of broken modules that a child can import."""
    broken = {
        "crashes": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "exits": "import os\nos._exit(7)",
        "stops": "import sys\nsys.exit(3)",
        "fails": "raise OSError('libsndfile.so.1: cannot open shared object file\\nmore')",
        "talks": 'print(\'{"trial": "import:talks"}\')',
        "hangs": "import time\ntime.sleep(600)",
    }
    for name, text in broken.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_crash_costs_one_answer(modules: Path) -> None:
    names = ["json", "crashes", "fails", "exits", "stops", "talks", "wave"]
    begun: list[str] = []
    answers = run_trials([f"import:{name}" for name in names], begun=begun.append)
    assert list(answers) == [f"import:{name}" for name in names] == begun
    assert answers["import:json"].facts["file"].endswith("json/__init__.py")
    assert answers["import:crashes"].died
    assert answers["import:crashes"].error == "the process was killed by SIGSEGV"
    assert answers["import:exits"].error == "the process ended with exit code 7: no output"
    assert answers["import:stops"].error == "SystemExit: 3"
    assert answers["import:fails"].error == "OSError: libsndfile.so.1: cannot open shared object file"
    assert answers["import:talks"].facts["file"] == str(modules / "talks.py")
    assert not answers["import:wave"].error


def test_a_trial_that_hangs_is_ended(modules: Path) -> None:
    answers = run_trials(["import:hangs"], limit=1)
    assert answers["import:hangs"].died
    assert answers["import:hangs"].error == "no answer within 1 s"


def test_the_child_stands_alone_and_hides_nothing() -> None:
    """It runs without nestcli, and modules of this folder such as `audio` are not importable from it."""
    requests = "".join(json.dumps({"trial": f"import:{name}"}) + "\n" for name in ("json", "requirements"))
    command = [sys.executable, "-I", child.__file__]
    done = subprocess.run(command, input=requests, capture_output=True, text=True, check=True)
    assert "No module named 'requirements'" in done.stdout


def test_no_such_python() -> None:
    with pytest.raises(OSError, match="nowhere"):
        run_trials(["import:json"], python="/nowhere/python")


def test_what_they_try_works_here() -> None:
    assert child.TRIALS["precision"]("cpu")["failures"] == dict.fromkeys(child.PRECISIONS, "")
    formats = child.TRIALS["formats"]("")
    assert set(formats["failures"]) >= {"wav", "flac", "mp3", "ogg", "opus", "sph", "aiff"}
    assert not any(formats["failures"].values())
    assert child.TRIALS["soxr"]("")["error"] < 1e-3
    assert child.TRIALS["presets"]("")["presets"]
    assert {"cuda", "hip", "gpus", "mps", "nccl", "cuda_error"} <= child.TRIALS["torch"]("").keys()


def test_a_precision_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no bf16 here\nand more")

    monkeypatch.setattr(torch, "autocast", broken)
    failures = child.TRIALS["precision"]("cpu")["failures"]
    assert failures["bf16-mixed"] == "RuntimeError: no bf16 here"


def test_a_codec_that_loses_the_sound_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import soundfile

    monkeypatch.setattr(soundfile, "read", lambda file: (np.zeros(16_000), 16_000))
    assert all("energy 0.000" in why for why in child.TRIALS["formats"]("")["failures"].values())
