"""`nest bench` as it is typed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RUN


def nest(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nestcli.cli.app import main; main()", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def on(corpus: dict[str, Path]) -> list[str]:
    manifests = {"manifest_filepath": corpus["train"], "noise_manifest": corpus["noise"]}
    return ["small", *TINY_RUN, *(f"model.train_ds.{key}={path}" for key, path in manifests.items())]


def test_json_for_scripts(corpus: dict[str, Path]) -> None:
    done = nest(*on(corpus), "--only", "scale", "--lines", "300", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    document: Any = json.loads(done.stdout)
    (section,) = document["sections"]
    assert section["name"] == "scale"
    assert set(section) >= {"unit", "ours", "nemo", "ratio", "peak_memory_bytes"}
    assert set(section["ours"]) == {"median", "min", "max"}
    assert set(section["peak_memory_bytes"]) == {"ours", "nemo"}
    assert document["failed"] == []


def test_the_tables(corpus: dict[str, Path]) -> None:
    only = ("--only", "loader", "--only", "buckets")
    done = nest(*on(corpus), *only, "--rounds", "1", "--seconds", "0.1", "--memory", "0.9", "--buckets", "2")
    assert done.returncode == 0, done.stderr
    for words in ("of the floor", "noise: decode", "read speech", "model.train_ds.bucket_batch_size=[", "Padding:"):
        assert words in done.stdout, done.stdout
    assert max(map(len, done.stdout.splitlines())) < 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "loading"], "no such section. Known: loader, scale, buckets"),
        (["--only", "loader", "model.train_ds.manifest_filepath=missing.json"], "missing.json"),
        (["--only", "loader", "--nemo-python", "/no/such/python"], "/no/such/python: there is no such program"),
        (["smal"], "Did you mean 'small'"),
    ],
)
def test_what_is_wrong_is_said(words: list[str], message: str) -> None:
    done = nest(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_section_that_fails_takes_no_other_with_it(corpus: dict[str, Path]) -> None:
    only = ("--only", "buckets", "--only", "scale", "--lines", "50", "--rounds", "1")
    done = nest(*on(corpus), *only, "--memory", "0.1", "--json")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert [section["name"] for section in document["sections"]] == ["scale"]
    assert [failed["name"] for failed in document["failed"]] == ["buckets"]
    assert "MiB" in done.stderr
