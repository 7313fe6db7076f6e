"""The same tests with more examples, and a short run of every atheris target."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.strategies import VARIABLE

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "src"
TARGETS = [
    "manifest", "cuts", "kaldi", "ranges", "configuration", "override", "stored_configuration", "references", "archive",
    "weights", "shard",
]  # fmt: skip


def run(*words: str, folder: Path, **variables: str) -> None:
    paths = os.pathsep.join([str(SOURCES), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": paths, **variables}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("test_fuzz_*.py")))
def test_many_examples(file: str, tmp_path: Path) -> None:
    words = ["-m", "pytest", "-q", "-x", "--hypothesis-seed=0", "-p", "no:cacheprovider", str(HERE / file)]
    run(*words, folder=HERE.parents[1], **{VARIABLE: "200", "HYPOTHESIS_STORAGE_DIRECTORY": str(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_run_guided_by_coverage(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed")
    run(str(HERE / "atheris_targets.py"), target, "-runs=3000", "-seed=1", "-max_total_time=60", folder=tmp_path)
