"""`nest bench` beside a live NeMo; NEST_NEMO_PYTHON names the Python of an environment with it."""

import os
from pathlib import Path

import pytest

from conftest import tiny_config
from nestcli.bench import training
from nestcli.bench.context import BenchContext, Options
from nestcli.bench.loader import loader_section
from nestcli.bench.scale import scale_section
from nestcli.bench.training import quantizer_section, train_step_section

pytestmark = [
    pytest.mark.nemo,
    pytest.mark.skipif("NEST_NEMO_PYTHON" not in os.environ, reason="NEST_NEMO_PYTHON names no NeMo"),
]


def context_of(corpus: dict[str, Path], folder: Path, **options: object) -> BenchContext:
    python = os.environ["NEST_NEMO_PYTHON"]
    return BenchContext(
        tiny_config(corpus), Options(nemo_python=python, rounds=1, **options), folder, lambda doing: None
    )


def test_nemo_loads_the_same_audio(corpus: dict[str, Path], tmp_path: Path) -> None:
    section = loader_section(context_of(corpus, tmp_path, seconds=1.0)).to_json()
    assert section["nemo_version"] == "3.0.0"
    assert section["ratio"] == pytest.approx(section["ours"]["median"] / section["nemo"]["median"])  # of one round
    assert section["ratio"] > 2
    assert section["peak_memory_bytes"]["nemo"] > 500e6


def test_nemo_starts_too(corpus: dict[str, Path], tmp_path: Path) -> None:
    section = scale_section(context_of(corpus, tmp_path, lines=(500,))).to_json()
    (row,) = section["rows"]
    assert row["nemo"]["seconds"] > row["nemo"]["manifest"] > 0
    assert section["ratio"] == pytest.approx(row["nemo"]["seconds"] / row["seconds"])


def test_nemo_trains_the_same_steps(corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section fails where losses of steps with the same random numbers are not NeMo's."""
    for name, value in (("SECONDS", 2.0), ("MEMORY_SECONDS", 2.0)):
        monkeypatch.setattr(training, name, value)
    section = train_step_section(context_of(corpus, tmp_path)).to_json()
    assert section["nemo"]["median"] > 0
    assert section["peak_memory_bytes"]["nemo"] > 500e6


def test_nemo_finds_the_same_tokens(corpus: dict[str, Path], tmp_path: Path) -> None:
    section = quantizer_section(context_of(corpus, tmp_path)).to_json()
    assert section["ratio"] > 1
