"""`nest bench` as a whole, with artificial sections."""

import json
from pathlib import Path
from typing import Any

import pytest

from nestcli.bench import run
from nestcli.bench.context import BenchContext, Options
from nestcli.bench.report import SectionReport, Spread
from nestcli.config import load_config
from nestcli.errors import ConfigError, RunFailedError


def fine(context: BenchContext) -> SectionReport:
    context.tell("measuring")
    (context.folder / "left behind").write_text("")
    folders.append(context.folder)
    return SectionReport("fine", "s", Spread.of([3.0, 1.0, 2.5]), None, None, 7)


def full(context: BenchContext) -> SectionReport:
    raise RunFailedError("nothing fits")


def wrong(context: BenchContext) -> SectionReport:
    raise ConfigError("no such key")


folders: list[Path] = []


@pytest.fixture(autouse=True)
def _sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECTIONS", {"fine": fine, "full": full, "wrong": wrong})


def test_one_that_fails_takes_no_other_with_it() -> None:
    told: list[tuple[int, int, str]] = []
    report = run.run_bench(load_config("small"), ["full", "fine"], Options(), lambda *what: told.append(what))
    assert report.failures == {"full": "nothing fits"}
    assert told == [(1, 2, "measuring")]
    assert not folders[-1].exists()
    (section,) = report.to_json()["sections"]
    expected: Any = {
        "name": "fine", "unit": "s", "ours": {"median": 2.5, "min": 1.0, "max": 3.0}, "nemo": None, "ratio": None,
        "peak_memory_bytes": {"ours": 7, "nemo": None},
    }  # fmt: skip
    assert json.loads(json.dumps(section)) == expected


def test_a_mistake_in_the_call_ends_it() -> None:
    with pytest.raises(ConfigError, match="no such key"):
        run.run_bench(load_config("small"), ["fine", "wrong"], Options(), lambda *what: None)
    assert not folders[-1].exists()


def test_without_a_gpu_the_search_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SECTIONS", {"loader": fine, "buckets": full})
    assert run.default_sections(load_config("small", ["trainer.accelerator=cpu"])) == ["loader"]
