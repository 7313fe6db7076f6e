"""The reading order in CONTRIBUTING.md is true, and stays short."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "CONTRIBUTING.md"
MOST_FILES, MOST_LINES = 16, 1500  # from a place of the plan to the loss
MOST_FILES_IN_ALL = 24  # from the configuration to the loss
_SIZES = re.compile(r"(\d+) files, ([\d,]+) lines of functions")


@cache
def traced() -> str:
    """The tables of a new trace, in a process of its own: what another test has cached would not be entered."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "trace.py"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def without_line_counts(text: str) -> str:
    return re.sub(r"\(\d+\)|[\d,]+ lines", "", text)


def test_the_page_names_the_files_and_functions_that_a_batch_passes() -> None:
    begin, end = "<!-- reading order: written by `make trace` -->", "<!-- reading order: end -->"
    written = PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()
    assert without_line_counts(written) == without_line_counts(traced()), "run `make trace`"


def test_a_newcomer_can_read_the_way_of_a_batch_in_one_sitting() -> None:
    (files, lines), (files_in_all, _) = (
        [int(number.replace(",", "")) for number in found] for found in _SIZES.findall(traced())
    )
    assert files <= MOST_FILES
    assert lines <= MOST_LINES
    assert files_in_all <= MOST_FILES_IN_ALL


def test_the_data_room_stays_small() -> None:
    """No more than 20 files side by side."""
    assert len(list((ROOT / "src" / "nestcli" / "data").glob("*.py"))) <= 20
