"""Is every version that constraints.txt pins to be had for every Python that nest runs on? Asks the package index.

`python .ci/pins.py [PYTHON ...]` prints what is missing and ends with 1 if anything is; its own Python may be any.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SOURCE_ONLY = "sox"  # it has no wheel, and needs none: it is a few lines of Python


def pins(constraints: str, python: str) -> list[str]:
    """The lines that hold for this Python, without their conditions."""
    where = {"python_version": python, "python_full_version": f"{python}.0"}
    found = [Requirement(line) for line in constraints.splitlines() if line and not line.startswith("#")]
    return [f"{pin.name}{pin.specifier}" for pin in found if not pin.marker or pin.marker.evaluate(where)]


def missing(wanted: list[str], python: str) -> list[str]:
    """Those that pip finds no wheel of, by halves: one call where all are there."""
    if _found(wanted, python):
        return []
    if len(wanted) == 1:
        return wanted
    middle = len(wanted) // 2
    return missing(wanted[:middle], python) + missing(wanted[middle:], python)


def _found(wanted: list[str], python: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--python-version", python, "--only-binary", ":all:", "--no-binary", SOURCE_ONLY]
    with tempfile.TemporaryDirectory() as nowhere:
        done = subprocess.run([*command, "--target", nowhere, *wanted], capture_output=True)  # noqa: S603
    return done.returncode == 0


def main(pythons: list[str]) -> int:
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8")
    lost = {python: missing(pins(constraints, python), python) for python in pythons}
    for python, names in lost.items():
        print(f"Python {python}: {'no wheel of ' + ', '.join(names) if names else 'every pinned version is there'}")
    return any(lost.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(PYTHONS)))
