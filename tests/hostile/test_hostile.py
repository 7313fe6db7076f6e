"""Every input of the hostile corpus through its command: a clear error, nothing run, nothing written, little used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hostile.corpus import CANARY, Case, make
from hostile.watch import Outcome, call

MOST_SECONDS, MOST_BYTES = 2.0, 512 << 20


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def cases(hostile: Path) -> list[Case]:
    return make(hostile)


def test_there_are_enough(cases: list[Case]) -> None:
    assert len(cases) >= 60


def test_every_case(cases: list[Case], hostile: Path, tmp_path: Path) -> None:
    faults = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = call(case, hostile / "good", folder)
        faults += [f"{case.name}: {fault}" for fault in found_faults(case, outcome, folder)]
        if (hostile / CANARY).exists():
            (hostile / CANARY).unlink()
            faults.append(f"{case.name}: IT RAN")
    assert not faults, "\n".join(faults)


def found_faults(case: Case, outcome: Outcome, folder: Path) -> list[str]:
    faults = []
    rejected = rows(folder / "out" / "rejected.jsonl")
    if case.harmless:
        if outcome.code != 0:
            faults.append(f"exit code {outcome.code!r}: {outcome.errors[-300:]}")
    elif case.rejects is None:
        if outcome.code != 2:
            faults.append(f"exit code {outcome.code!r}: {outcome.errors[-300:]}")
        if case.path.name.partition(".")[0] not in outcome.errors:
            faults.append(f"the message does not name the file: {outcome.errors[-300:]}")
        if leftovers := [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]:
            faults.append(f"left {leftovers}")
    else:
        if outcome.code != 0:
            faults.append(f"exit code {outcome.code!r}: {outcome.errors[-300:]}")
        if [row["reason"] for row in rejected] != [case.rejects]:
            faults.append(f"rejected {rejected}, not as {case.rejects}")
    if "Traceback" in outcome.errors or "internal error" in outcome.errors or len(outcome.errors) > 2000:
        faults.append(f"no clear message: {outcome.errors[:300]}")
    faults += [f"started {event}" for event in outcome.started if "nestcli.jobs.pool" not in event]
    allowed = (str(folder), "/dev/null", "/tmp/nest-sox-")
    faults += [f"wrote {path}" for path in outcome.written if not path.startswith(allowed)]
    if outcome.seconds > MOST_SECONDS:
        faults.append(f"{outcome.seconds:.1f} s")
    if outcome.bytes > MOST_BYTES:
        faults.append(f"{outcome.bytes >> 20} MiB")
    return faults


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize(
    ("fault", "python"),
    [
        ("started os.system", "import os; os.system('true')"),
        ("wrote /tmp/elsewhere-of-a-test", "open('/tmp/elsewhere-of-a-test', 'w')"),
        ("7.. MiB", "bytearray(700 << 20)"),
        ("6.. MiB", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray(600 << 20)'])"),
        ("2.. s", "import time; end = time.process_time() + 2.4\nwhile time.process_time() < end: pass"),
    ],
)
def test_the_watch_sees_what_it_is_for(fault: str, python: str, hostile: Path, tmp_path: Path) -> None:
    """A command that does one of these would be found out."""
    case = Case("x", tmp_path / "x", ())
    found = found_faults(case, call(case, hostile, tmp_path, instead=python), tmp_path)
    Path("/tmp/elsewhere-of-a-test").unlink(missing_ok=True)
    assert any(re.match(fault, each) for each in found), found
