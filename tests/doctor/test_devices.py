"""Cores, memory, GPUs, compiler: each planted state with its remedy."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from nestcli.doctor import compiler, devices
from nestcli.doctor.child import PRECISIONS
from nestcli.doctor.compiler import compiler_check
from nestcli.doctor.devices import (
    cores_check,
    gpu_check,
    memory_check,
    memory_of_gpu,
    open_files_check,
    precision_check,
    processes_check,
    shared_memory_check,
)
from nestcli.doctor.trials import Answer

MIB, GIB = 1 << 20, 1 << 30
Usage = namedtuple("Usage", "total used free")
CARD = {"name": "NVIDIA H100", "free": 70 * GIB, "total": 80 * GIB, "capability": [9, 0], "bf16": True}


def facts(**changes: Any) -> dict[str, Any]:
    return {"cuda": None, "hip": None, "gpus": [], "mps": False, "nccl": True, "cuda_error": "", **changes}


def test_cores() -> None:
    assert cores_check(4, 8, None, {}).found == "4 of 8"
    assert cores_check(4, 4, 8.0, {}).state == "ok"
    limited = cores_check(64, 64, 2.5, {})
    assert limited.state == "note"
    assert "OMP_NUM_THREADS=2" in limited.remedy
    assert "--cpus" in limited.remedy
    assert cores_check(64, 64, 2.5, {"OMP_NUM_THREADS": "2"}).state == "ok"


@pytest.mark.parametrize(("available", "state"), [(8 * GIB, "ok"), (2 * GIB, "note"), (500 * MIB, "problem")])
def test_memory(available: int, state: str) -> None:
    (check,) = memory_check((64 * GIB, available))
    assert check.state == state
    assert not list(memory_check(None))


@pytest.mark.parametrize(
    ("total", "free", "state", "remedy"),
    [
        (8 * GIB, 8 * GIB, "ok", ""),
        (64 * MIB, 64 * MIB, "note", "docker run --shm-size=1g"),
        (8 * GIB, 64, "note", "Several GPUs (NCCL) need it"),
    ],
)
def test_shared_memory(
    total: int, free: int, state: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(total, total - free, free))
    (check,) = shared_memory_check(tmp_path)
    assert check.state == state
    assert remedy in check.remedy
    assert not list(shared_memory_check(tmp_path / "none"))


@pytest.mark.parametrize(("limit", "state"), [(1 << 60, "ok"), (1024, "ok"), (512, "note"), (128, "problem")])
def test_open_files(limit: int, state: str) -> None:
    check = open_files_check(limit)
    assert check.state == state
    assert ("ulimit" in check.remedy) == (state != "ok")


@pytest.mark.parametrize(
    ("changes", "driver", "cards", "environ", "state", "found", "remedy"),
    [
        ({}, None, 0, {}, "ok", "training runs on the CPU", ""),
        ({}, "550.54", 1, {}, "problem", "driver 550.54, but PyTorch's CPU build", "installation page"),
        ({}, None, 2, {}, "note", "2 NVIDIA cards without a driver", "installation page"),
        ({"cuda": "12.8"}, None, 0, {}, "note", "none, and no driver", "docker run --gpus all"),
        ({"cuda": "12.8"}, None, 1, {}, "problem", "1 NVIDIA card, but no driver", "Install NVIDIA's driver"),
        ({"cuda": "13.0", "cuda_error": "too old"}, "470.1", 1, {}, "problem", "cannot use it: too old", "Update"),
        ({"cuda": "12.8"}, "550", 1, {"CUDA_VISIBLE_DEVICES": ""}, "note", "hidden", "Unset CUDA_VISIBLE_DEVICES"),
        ({"cuda": "12.8", "gpus": [CARD, CARD]}, "550", 2, {}, "ok", "2 x NVIDIA H100; PyTorch's CUDA 12.8", ""),
    ],
)  # fmt: skip
def test_builds_and_drivers(
    changes: dict[str, Any],
    driver: str | None,
    cards: int,
    environ: dict[str, str],
    state: str,
    found: str,
    remedy: str,
) -> None:
    check = gpu_check(facts(**changes), driver, cards, environ)
    assert check.state == state
    assert found in check.found
    assert remedy in check.remedy


def test_memory_of_a_gpu() -> None:
    assert memory_of_gpu(0, CARD).found == "NVIDIA H100, compute capability 9.0, 70.0 GiB of 80.0 GiB free"
    taken = memory_of_gpu(1, {**CARD, "free": GIB})
    assert (taken.name, taken.state) == ("GPU 1", "note")
    assert "nvidia-smi" in taken.remedy


def test_precisions() -> None:
    fine = Answer({"failures": dict.fromkeys(PRECISIONS, "")})
    assert precision_check("cpu", fine, []).state == "ok"
    assert precision_check("cuda", fine, [CARD]).state == "ok"
    old = precision_check("cuda", fine, [{**CARD, "bf16": False}])
    assert (old.state, "16-mixed" in old.remedy) == ("note", True)
    without = Answer({"failures": {**fine.facts["failures"], "bf16-mixed": "RuntimeError: no"}})
    check = precision_check("cuda", without, [CARD])
    assert check.state == "note"
    assert check.remedy == "Set trainer.precision to one of 32, bf16-true, 16-mixed."
    unsupported = {"failures": dict.fromkeys(PRECISIONS, "CUDA error: no kernel image")}
    assert precision_check("cuda", Answer(unsupported), [CARD]).state == "problem"
    assert precision_check("cuda", Answer(error="the process was killed by SIGABRT"), [CARD]).state == "problem"


def test_processes() -> None:
    assert processes_check(Answer({"sum": 1.0}), facts()).state == "ok"
    assert "GLOO_SOCKET_IFNAME" in processes_check(Answer(error="RuntimeError: no address"), facts()).remedy
    assert processes_check(Answer(), facts(gpus=[CARD, CARD], nccl=False)).state == "problem"


def test_all_of_the_section_without_pytorch() -> None:
    answers = {
        "torch": Answer(error="ImportError: no"),
        "precision:cpu": Answer(error="no"),
        "gloo": Answer(error="no"),
    }
    checks = {check.name: check for check in devices.devices_checks(answers)}
    assert checks["PyTorch"].state == "problem"
    assert "GPUs" not in checks


def test_an_apple_gpu_and_an_old_card() -> None:
    gpus = [{**CARD, "bf16": False}]
    fine = Answer({"failures": dict.fromkeys(PRECISIONS, "")})
    answers = {
        "torch": Answer(facts(mps=True, gpus=gpus, cuda="12.6")),
        "precision:cpu": fine, "precision:cuda": fine, "gloo": Answer(),
    }  # fmt: skip
    assert devices.further_trials(answers) == ["precision:cuda"]
    checks = {check.name: check for check in devices.devices_checks(answers)}
    assert "float64" in checks["Apple GPU"].found
    assert checks["precision on GPU"].state == "note"
    assert checks["precision on CPU"].state == "ok"


def test_a_compiler_that_is_missing_broken_or_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = compiler_check({"PATH": str(tmp_path)}, has_gpu=False)
    assert (absent.state, "g++" in absent.found, "apt-get install g++" in absent.remedy) == ("note", True, True)
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'nest.cpp:1:10: fatal error: Python.h: No such file' >&2; exit 1\n")
    broken.chmod(0o755)
    check = compiler_check({"PATH": str(tmp_path), "CXX": str(broken)}, has_gpu=False)
    assert "Python.h: No such file" in check.found
    broken.write_text('#!/bin/sh\nfor last; do :; done; echo text > "$last"\n')
    useless = compiler_check({"PATH": str(tmp_path), "CXX": str(broken)}, has_gpu=False)
    assert "does not load" in useless.found
    assert "TORCHINDUCTOR_CACHE_DIR" in useless.remedy
    assert "Unset" in compiler_check({"TORCHDYNAMO_DISABLE": "1"}, has_gpu=False).remedy
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    assert "triton" in compiler_check({"PATH": str(tmp_path)}, has_gpu=True).remedy


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_the_compiler_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    check = compiler_check({"PATH": os.environ["PATH"]}, has_gpu=False)
    assert "g++" in check.found
    assert "torch.compile itself was not run" in check.found or check.state == "note"
