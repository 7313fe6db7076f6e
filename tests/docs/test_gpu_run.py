"""docs/gpu/run.py with parts that hang, crash or fail: later parts run, and all that was measured is reported."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from docs.pages import ROOT

FOLDER = ROOT / "docs" / "gpu"
WORKER = """
import os, sys
sys.path.insert(0, FOLDER)
from measure import Task
task = Task.given()

def first():
    return {"audio_per_second": 2.0}

def dies():
    os._exit(9)

def raises():
    raise ValueError("a bad row")

def full():
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

for name in task.options:
    task.measure(name, globals()[name])
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("run", "report", "measure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("run")


def part_of(run: ModuleType, folder: Path, *rows: str) -> Any:
    worker = folder / "worker.py"
    worker.write_text(f"FOLDER = {str(FOLDER)!r}\n{WORKER}")
    return run.Part("worker", (sys.executable, str(worker)), 60, options=rows)


def states(result: Any) -> dict[str, str]:
    return {row["name"]: row["state"] for row in result.rows}


def test_a_part_that_hangs_is_ended_and_reports_what_it_has(run: ModuleType, tmp_path: Path) -> None:
    lines = [
        {"name": "first", "state": "begun"}, {"name": "first", "state": "done", "mfu": 0.5},
        {"name": "hangs", "state": "begun"},
    ]  # fmt: skip
    written = "".join(json.dumps(line) + "\n" for line in lines)
    worker = f"import sys, time; open(sys.argv[1], 'w').write({written!r}); time.sleep(600)"
    start = time.monotonic()
    result = run.run_part(run.Part("worker", (sys.executable, "-c", worker), 60), tmp_path, 4.0)
    assert time.monotonic() - start < 60
    assert result.state == "over time"
    assert states(result) == {"first": "done", "hangs": "over time"}
    assert result.rows[0]["mfu"] == 0.5


def test_a_part_that_dies_goes_on_with_its_other_rows(run: ModuleType, tmp_path: Path) -> None:
    result = run.run_part(part_of(run, tmp_path, "dies", "raises", "full", "first"), tmp_path, 120.0)
    assert result.state == "failed"
    assert states(result) == {"dies": "failed", "raises": "failed", "full": "skipped", "first": "done"}
    assert [row.get("why") for row in result.rows] == [
        "the process died", "ValueError: a bad row", "out of memory: CUDA out of memory. Tried to allocate 9 GiB", None,
    ]  # fmt: skip
    assert 'raise ValueError("a bad row")' in result.log


def test_a_program_that_cannot_start_its_rows_is_not_tried_again(run: ModuleType, tmp_path: Path) -> None:
    broken = run.Part("broken", (sys.executable, "-c", "print('once'); raise SystemExit(2)"), 60)
    result = run.run_part(broken, tmp_path, 60.0)
    assert (result.state, result.rows, result.log.count("once")) == ("failed", [], 1)


def test_what_is_missing_on_the_machine_is_no_failure(run: ModuleType, tmp_path: Path) -> None:
    found = run.Part("doctor", (sys.executable, "-c", "print('a problem'); raise SystemExit(1)"), 60, judges=False)
    result = run.run_part(found, tmp_path, 60.0)
    assert (result.state, result.log) == ("ok", "a problem\n")
    doctor, *others = run.parts(argparse.Namespace(speech=None, noise=None, probe=None, only=None))
    assert (doctor.name, doctor.judges, {part.judges for part in others}) == ("doctor", False, {True})


def test_later_parts_run_and_the_last_takes_what_is_left(run: ModuleType, tmp_path: Path) -> None:
    quick = (sys.executable, "-c", "print('here')")
    slow = (sys.executable, "-c", "import time; time.sleep(600)")
    chosen = [
        run.Part("hangs", slow, 1, is_task=False), run.Part("quick", quick, 30, is_task=False),
        run.Part("last", quick, 1000, is_task=False),
    ]  # fmt: skip
    results = run.run_all(chosen, tmp_path, 60.0, rehearse=False)
    assert [each.state for each in results] == ["over time", "ok", "ok"]
    assert results[1].limit == 30
    assert 1 < results[2].limit < 60
    nothing_left = run.run_all(chosen[1:], tmp_path, 6.0, rehearse=False)
    assert [each.state for each in nothing_left] == ["not run", "not run"]


def test_tests_are_rows(run: ModuleType) -> None:
    log = (
        "tests/gpu/test_a.py::test_one[large-32] PASSED   [ 50%]\n"
        "tests/gpu/test_a.py::test_two FAILED   [ 50%]\ntests/gpu/test_a.py::test_three SKIPPED (no onnx) [90%]\n"
        "FAILED tests/gpu/test_a.py::test_two - AssertionError\ntests/gpu/test_a.py::test_four"
    )
    assert [(row["name"].rpartition("::")[2], row["state"]) for row in run._tests(log)] == [
        ("test_one[large-32]", "done"), ("test_two", "failed"), ("test_three", "skipped"),
    ]  # fmt: skip


def test_the_report_holds_every_row_in_few_files(
    run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {"name": "large compiled", "state": "done", "step_seconds": 0.5, "audio_per_second": 1200.0, "mfu": 0.4}
    profile = {"kernels": [{"name": "gemm", "seconds": 0.1, "share": 0.8, "calls": 3}], "kernel_seconds": 0.125}
    attention = {"name": "attention", "state": "done", "forward_seconds": 0.1, "extra_peak_bytes": 5 << 20}
    curve = [[1, 6.0, None], [2, 5.0, 5.5]]
    rows = [
        {**steps, "peak_bytes": 3 << 30, "waits": 1, "waited_for": ["nest.py:1 nonzero()", "x.py:2 [/bold] y[i]"]},
        {"name": "profile", "state": "done", **profile}, {**attention, "forward_backward_seconds": None},
        {"name": "pretrain reference", "state": "done", "curve": curve, "train_loss": 5.0},
        {"name": "tests/gpu/test_a.py::test_one[a]", "state": "failed", "why": "[x] is odd"},
    ]  # fmt: skip
    device = {"device": "NVIDIA H100", "driver": "570.1", "torch": "2.11.0", "cuda": "12.8"}
    failed = run.Result("tests", "failed", 3.0, 90.0, rows, "the end of a log")
    importlib.import_module("report").write_report(tmp_path, device, [vars(failed)])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "gpu.json", "table.txt", "log.txt", "steps.png", "attention.png", "profile.png", "loss.png",
    }  # fmt: skip
    text = (tmp_path / "table.txt").read_text()
    for shown in (
        "step 500.0 ms",
        "mfu 40.0%",
        "peak 3.00 GiB",
        "nonzero()",
        "gemm",
        "test_one[a]",
        "[x] is odd",
        "[/bold] y[i]",
    ):
        assert shown in text
    assert "the end of a log" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"][0]["rows"] == rows


def test_parts_by_name(run: ModuleType) -> None:
    given = {"speech": Path("a"), "noise": Path("b"), "probe": None, "only": ["loader"]}
    assert [part.name for part in run.parts(argparse.Namespace(**given))] == ["data", "loader"]
    assert len(run.parts(argparse.Namespace(**{**given, "only": None}))) == 8


def test_waits_are_named_by_their_line(run: ModuleType) -> None:
    import torch

    measure = importlib.import_module("measure")
    with measure.noted_waits(torch.device("cpu")) as waits:
        measure.warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        measure.warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
    (line,) = waits
    assert line.startswith("test_gpu_run.py:")
    assert "called a synchronizing" in line
