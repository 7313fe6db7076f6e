"""`nest count-params` as it is typed, and the counts that docs/parameters.md names."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from nestcli.cli.app import app
from nestcli.config import PRESETS, load_config
from nestcli.model.count import count_parameters

DOCS = Path(__file__).parents[2] / "docs" / "parameters.md"


def nest(*words: str) -> Result:
    return CliRunner().invoke(app, ["count-params", *words], catch_exceptions=False)


def counted(*words: str) -> Any:
    return json.loads(nest(*words, "--json").stdout)


def test_the_tables() -> None:
    shown = nest("small", "--depth", "2").stdout
    rows = [line.split() for line in shown.splitlines() if line.strip()]
    assert ["encoder.layers", "12,010,240", "12,010,240", "0"] in rows
    assert ["quantizer.codebooks", "131,072", "0", "131,072"] in rows
    assert ["total", "14,191,616", "14,050,224", "141,392"] in rows
    assert ["NeMo", "3.0.0", "14,191,616"] in rows
    assert ["difference", "0"] in rows
    assert ["weights", "57,397,248", "54.7"] in rows
    assert ["total", "0.471", "1.376"] in rows


def test_json_for_scripts() -> None:
    document = counted("small", "model.encoder.n_layers=2", "--depth", "3", "--seconds", "30")
    assert sum(document["modules"].values()) == document["total"]
    assert sum(document["trainable_by_module"].values()) == document["trainable"]
    memory, flops = document["memory"], document["flops"]
    assert memory["total"] == memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert memory["gradients"] == 4 * document["trainable"]
    assert (flops["clip_seconds"], flops["batch_size"]) == (30.0, 8)
    for key in ("forward", "training_step"):
        assert sum(part[key] for part in flops["parts"].values()) == pytest.approx(flops[key], abs=10)


def test_settings_that_nemo_was_not_recorded_for() -> None:
    other = "model.encoder.conv_norm_type=layer_norm"
    assert counted("small", other)["nemo"] == {"version": "3.0.0", "total": None, "difference": None}
    assert "not recorded" in nest("small", other).stdout
    every = nest("--all", other)
    assert every.exit_code == 0
    assert every.stdout.count("not recorded") == len(PRESETS) - 1  # the base has the values of large


def test_every_preset_fits_a_terminal() -> None:
    shown = nest("--all").stdout
    assert "…" not in shown
    assert re.search(r"xxlarge +1,069,081,680 +141,392 +1,069,081,680 +0", shown)
    assert re.search(r"xxlarge +4,079\.1 +4,077\.7 +8,155\.4 +16,312\.2 +26\.715 +79\.837", shown)


@pytest.mark.parametrize("words", [["model.train_ds.batch_size=null"], ["model.train_ds.batch_size=0"]])
def test_a_batch_of_nothing_has_no_figures(words: list[str]) -> None:
    command = [sys.executable, "-c", "from nestcli.cli.app import main; main()", "count-params", "small", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "model.train_ds.batch_size" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("large", "model.encoder.n_layers=18"),
        ("large", "model.num_books=2"),
        ("medium", "model.encoder.n_layers=18"),
        ("xxlarge", "model.encoder.n_layers=46"),
        ("xxlarge", "model.encoder.n_layers=49"),
    ],
)
def test_counts_behind_the_labels(preset: str, override: str) -> None:
    assert f"{count_parameters(load_config(preset, [override])).total:,}" in DOCS.read_text()


@pytest.mark.parametrize(("column", "preset"), [*enumerate(("small", "medium", "large", "xlarge", "xxlarge"), start=1)])
def test_the_tables_of_the_docs(column: int, preset: str) -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCS.read_text().splitlines()]
    named = {re.sub(r"[`]|, frozen", "", row[0]): row for row in rows if len(row) > 5}
    document = counted(preset, "--depth", "2")
    ours = {"all": document["total"], **document["modules"]}
    for part in ("encoder.layers", "encoder.pre_encode", "decoder", "quantizer", "mask_processor", "all"):
        total = sum(number for name, number in ours.items() if name == part or name.startswith(f"{part}."))
        assert named[part][column + 1] == f"{total:,}", part
    for key, row in (("forward", "forward, clips of 15 s"), ("training_step", "training step, clips of 15 s")):
        assert float(named[row][column]) == pytest.approx(document["flops"][key] / 1e9, rel=2e-3)
