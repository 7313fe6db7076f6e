"""`nest bench` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from conftest import TINY_RUN
from nestcli.bench.report import SectionReport, Spread
from nestcli.bench.run import BenchReport
from nestcli.cli.app import app


def nest(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nestcli.cli.app import main; main()", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def on(corpus: dict[str, Path]) -> list[str]:
    manifests = {"manifest_filepath": corpus["train"], "noise_manifest": corpus["noise"]}
    return ["small", *TINY_RUN, *(f"model.train_ds.{key}={path}" for key, path in manifests.items())]


@pytest.mark.slow
def test_json_for_scripts(corpus: dict[str, Path]) -> None:
    done = nest(*on(corpus), "--only", "buckets", "--memory", "0.9", "--buckets", "1", "--json")
    assert done.returncode == 0, done.stderr
    document: Any = json.loads(done.stdout)
    (section,) = document["sections"]
    assert section["name"] == "buckets"
    assert set(section) >= {"unit", "ours", "nemo", "ratio", "peak_memory_bytes"}
    assert set(section["ours"]) == {"median", "min", "max"}
    assert set(section["peak_memory_bytes"]) == {"ours", "nemo"}
    assert document["failed"] == []


def report() -> BenchReport:
    spread = Spread(1500.0, 1400.0, 1600.0)
    memory = {"peak": 400 << 20, "resident": 400 << 20, "proportional": 300 << 20, "own": 200 << 20}
    start = {
        "lines": 1_000_000, "seconds": 9.1, "imports": 4.5, "manifest": 4.4, "first_batch": 0.2,
        "microseconds_per_line": 4.4, "memory": {"main": memory, "worker": memory},
    }  # fmt: skip
    loader = SectionReport(
        "loader", "seconds of audio a second", spread, Spread(30.0, 29.0, 31.0), 50.0, 900 << 20, 1400 << 20,
        {
            "nemo_version": "3.0.0",
            "floor": {**spread.to_json(), "share": 0.7},
            "without_loader_process": spread.to_json(),
            "per_processor_second": {"ours": 1400.0, "ratio": 48.0, "share_of_floor": 0.65},
            "microseconds_per_second_of_audio": {
                "ours": {"decode": 300.0}, "ours_total": 600.0, "floor": {"read speech": 310.0}, "floor_total": 500.0,
            },
        },
    )  # fmt: skip
    scale = SectionReport(
        "scale", "seconds", spread, None, None, 800 << 20, None, {"rows": [{**start, "nemo": start}], "resume": start}
    )
    buckets = SectionReport(
        "buckets", "seconds of audio", spread, None, None, 70 << 30, None,
        {
            "device": "cuda", "memory_budget_bytes": 72 << 30,
            "bins": [{"upto_seconds": 4.5, "utterances": 12_345, "batch_size": 210}],
            "padding": {"plain": 0.3, "buckets": 0.05},
            "words": ["model.train_ds.use_lhotse=true", "model.train_ds.bucket_batch_size=[210]"],
        },
    )  # fmt: skip
    way = {
        "seconds": spread.to_json(), "ratio": 2.25, "share_of_matrix_product_limit": 0.4, "peak_memory_bytes": 3 << 30,
        "seconds_by_kind": {"matrix products": 3.0, "convolutions": 1.0, "copies": 0.0},
    }  # fmt: skip
    batch = {"nemo_version": "3.0.0", "memory_clips": 8, "memory_clip_seconds": 20.0, "device": "cuda"}
    rounding = {"precision": "bf16-true", "nemo_precision": "bf16-mixed", "not_compiled": None}
    steps, tokens = {**batch, **rounding, "ways": {"compiled": way}}, {**batch, "tokens_that_differ": 0.002}
    step = SectionReport("train_step", "seconds a step", spread, spread, 2.25, 3 << 30, 6 << 30, steps)
    quantizer = SectionReport("quantizer", "seconds for clips", spread, spread, 52.0, 30 << 20, 2 << 30, tokens)
    row = {
        "precision": "bf16-mixed", "audio_seconds": 640.0, "compiled": True, "audio_per_second": 12_345.0,
        "fed_audio_per_second": 11_111.0, "utilisation_of_measured_product": 0.61, "utilisation_of_data_sheet": None,
        "peak_memory_bytes": 40 << 30,
    }  # fmt: skip
    lacking = {"precision": "32", "audio_seconds": 1280.0, "compiled": False, "error": "out of memory"}
    precisions = SectionReport(
        "precisions",
        "s/s",
        spread,
        None,
        None,
        1,
        None,
        {
            "device": "an H200",
            "rows": [row, lacking],
            "not_compiled": "torch.compile needs a C++ compiler",
            "keys": {"tf32": {"trainer.precision": "32", "nest.matmul_precision": "high"}},
        },
    )
    return BenchReport([loader, scale, buckets, step, quantizer, precisions], {})


def invoked(monkeypatch: pytest.MonkeyPatch, answer: BenchReport, *words: str) -> Result:
    monkeypatch.setattr("nestcli.bench.run.run_bench", lambda *arguments: answer)
    return CliRunner().invoke(app, ["bench", *words])


def test_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = invoked(monkeypatch, report())
    assert shown.exit_code == 0, shown.output
    for words in (
        "50.0 times NeMo's speed.", "70% of the floor.", "65% of the floor; 48.0 times NeMo.",
        "NeMo 3.0.0", "decode", "read speech", "1,000,000", "resumed",
        "12,345", "Padding: 30.0% in plain batches, 5.0% in these buckets.", "model.train_ds.bucket_batch_size=[210]",
        "Within 72.0 GiB of cuda memory.", "compiled: matrix products 75%, convolutions 25%.", "2.25", "40%", "6,144",
        "peak memory of the GPU, with 8 clips of 20 s", "NeMo's precision is bf16-mixed, ours bf16-true.",
        "0.20% of the tokens differ", "tf32: trainer.precision=32 nest.matmul_precision=high",
        "Not compiled: torch.compile needs a C++ compiler",
        "memory of the GPU: 30 MiB; NeMo's 2,048 MiB, 52 times the time",
        "12,345", "61%", "out of memory", "an H200",
    ):  # fmt: skip
        assert words in shown.output
    assert max(map(len, shown.output.splitlines())) <= 120


def test_a_failure_is_told_beside_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = report()
    answer.failures["scale"] = "the disk is full"
    shown = invoked(monkeypatch, answer, "--json")
    assert shown.exit_code == 1
    document = json.loads(shown.stdout)
    assert [section["name"] for section in document["sections"]][:3] == ["loader", "scale", "buckets"]
    assert document["failed"] == [{"name": "scale", "error": "the disk is full"}]
    assert "scale: the disk is full" in shown.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "loading"], "unknown section. Known: loader, scale, train_step"),
        (["--only", "loader", "model.train_ds.manifest_filepath=missing.json"], "missing.json"),
        (["--only", "loader", "--nemo-python", "/no/such/python"], "/no/such/python: program not found"),
        (["smal"], "Did you mean 'small'"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str) -> None:
    done = nest(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
