"""`nest prepare-data` as a user calls it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import typer
from typer.testing import CliRunner

from nestcli.cli.prepare_data import prepare_data
from nestcli.errors import DataError, RunFailedError

app = typer.Typer(rich_markup_mode=None)
app.command()(prepare_data)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(10):
        sound = 0.1 * np.random.default_rng(number).standard_normal(4000 * (1 + number))
        sf.write(tmp_path / "in" / f"s{number % 2}-{number}.wav", sound, 16000)
    return tmp_path / "in"


def test_the_table_and_the_next_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("in", "--out", "my out", "--speaker-pattern", r"/(s\d)-", "--split-by", "speaker")
    assert result.exit_code == 0, result.output
    for word in ("accepted", "10", "hours", "speakers", "0.25 s / 1.38 s / 2.50 s", "16 (10)"):
        assert word in result.stdout
    assert "Utterances shorter than 1 s: 3." in result.stderr
    expected = "nest pretrain small 'model.train_ds.manifest_filepath=my out/train_manifest.json'"
    assert expected in result.stderr
    assert "model.validation_ds.manifest_filepath=my out/val_manifest.json" in result.stderr


def test_lengths_and_levels_are_drawn_on_the_terminal(folder, tmp_path):
    result = call(folder, "--out", tmp_path / "out")
    bars = dict(re.findall(r"^ +to (\S+) +(#+) ", result.stdout, re.MULTILINE))
    assert list(bars) == ["0.5", "1", "1.5", "2", "2.5", "-18"]  # the last is of levels
    assert bars["-18"] == "#" * 30
    assert bars["0.5"].count("#") < bars["1"].count("#") < bars["2.5"].count("#") == 30
    document = json.loads(call(folder, "--out", tmp_path / "out", "--json").stdout)
    assert sum(document["histograms"]["hours_by_seconds"].values()) == pytest.approx(document["hours"], abs=1e-5)
    assert sum(document["histograms"]["utterances_by_dbfs"].values()) == 10


def test_noise_is_for_the_noise_manifest(folder, tmp_path):
    result = call(folder, "--out", tmp_path / "out", "--kind", "noise")
    assert f"model.train_ds.noise_manifest={tmp_path}/out/train_manifest.json" in result.stderr
    assert "Shorter" not in result.stderr


def test_json_is_alone_on_stdout(folder, tmp_path):
    (folder / "bad.wav").write_text("<html>")
    result = call(folder, "--out", tmp_path / "out", "--json", "--val-fraction", "0")
    document = json.loads(result.stdout)
    assert (document["accepted"], document["rejected"]) == (10, 1)
    assert document["rejections"] == {"unreadable": 1}
    assert document["manifests"] == {"train": str(tmp_path / "out" / "train_manifest.json"), "val": None}
    assert document["hours"] == pytest.approx(13.75 / 3600, abs=1e-6)


def test_strict_fails_after_writing_everything(folder, tmp_path):
    (folder / "bad.wav").write_text("<html>")
    result = call(folder, "--out", tmp_path / "out", "--strict", "--json")
    assert isinstance(result.exception, RunFailedError)
    assert result.exception.exit_code == 1
    assert json.loads(result.stdout)["rejected"] == 1
    for name in ("train_manifest.json", "val_manifest.json", "rejected.jsonl", "summary.json"):
        assert (tmp_path / "out" / name).exists()
    (folder / "bad.wav").unlink()
    assert call(folder, "--out", tmp_path / "out", "--strict").exit_code == 0


@pytest.mark.parametrize("words", [(), ("--strict",)])
def test_nothing_accepted_still_says_so_in_json(tmp_path, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.wav").write_text("<html>")
    result = call(tmp_path / "in", "--out", tmp_path / "out", "--json", *words)
    assert isinstance(result.exception, RunFailedError)
    assert "no input is usable (1 unreadable)" in str(result.exception)
    document = json.loads(result.stdout)
    assert (document["accepted"], document["rejections"]) == (0, {"unreadable": 1})
    assert document["manifests"] == {"train": None, "val": None}


def test_limits_reach_the_check(folder, tmp_path):
    words = ("--min-duration", "0.6", "--max-duration", "2", "--jobs", "2", "--json")
    document = json.loads(call(folder, "--out", tmp_path / "out", *words).stdout)
    assert document["rejections"] == {"too_long": 2, "too_short": 2}


def test_json_is_printed_when_everything_is_rejected(folder, tmp_path):
    result = call(folder, "--out", tmp_path / "out", "--min-duration", "1000", "--strict", "--json")
    assert isinstance(result.exception, RunFailedError)
    assert json.loads(result.stdout)["accepted"] == 0


def test_mistakes_are_one_message(folder, tmp_path):
    result = call(folder / "gone", "--out", tmp_path / "out")
    assert isinstance(result.exception, DataError)
    assert "gone does not exist" in str(result.exception)
    assert call(folder, "--out", tmp_path / "out", "--kind", "music").exit_code == 2
    assert call(folder).exit_code == 2


def test_help_loads_nothing_heavy():
    code = (
        "import sys, typer; from nestcli.cli.prepare_data import prepare_data\n"
        "app = typer.Typer(rich_markup_mode=None); app.command()(prepare_data)\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'soundfile', 'lhotse', 'soxr', 'sox'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for option in (
        "--out",
        "--kind",
        "--val-fraction",
        "--split-by",
        "--speaker-pattern",
        "--strict",
        "--json",
    ):
        assert option in result.stdout
