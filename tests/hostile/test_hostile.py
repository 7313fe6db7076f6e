"""Every input of the hostile corpus through its command: a clear error, nothing run, nothing written, little used.

Each case is a fork of a process that has everything imported, so that its time and memory are those of the input.
Python tells of every process started and every file opened for writing (its audit events).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile.corpus import CANARY, Case, make
from nestcli.cli import app

MOST_SECONDS, MOST_BYTES = 2.0, 512 << 20
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.startfile")
_CONNECTS = ("socket.connect", "socket.getaddrinfo")


@dataclass
class Outcome:
    code: int
    errors: str
    seconds: float  # of processors
    bytes: int
    started: list[str]
    written: list[str]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def cases(hostile: Path) -> list[Case]:
    import nestcli.checkpoint.export
    import nestcli.data.prepare
    import nestcli.training.run  # noqa: F401

    return make(hostile)


def call(case: Case, good: Path, folder: Path) -> Outcome:
    """The case's command in a fork of this process."""
    out, report = folder / "out", folder / "report.json"
    words = [word.format(path=case.path, out=out, good=good) for word in case.words]
    child = os.fork()
    if child == 0:
        _run(words, folder, report)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail(f"{case.name} ran for a minute")
        time.sleep(0.005)
    assert report.is_file(), f"{case.name}: the process died: {(folder / 'stderr').read_text()[-500:]}"
    found = json.loads(report.read_text())
    return Outcome(errors=(folder / "stderr").read_text(), **found)


def _run(words: list[str], folder: Path, report: Path) -> None:
    """In the child: the command with its output in files, and what Python tells of it; never returns."""
    torch.set_num_threads(1)  # threads that this process had are not there in its fork
    started: list[str] = []
    written: list[str] = []

    def heard(event: str, arguments: Any) -> None:
        if event in _STARTS or event in _CONNECTS:
            started.append(f"{event} {arguments!r:.300}")
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            nameless = Path(arguments[0]).is_dir()  # tempfile.TemporaryFile: it is gone with its last user
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not nameless:
                written.append(str(Path(arguments[0]).absolute()))

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    sys.argv = ["nest", *words]
    before = resource.getrusage(resource.RUSAGE_SELF)
    peak = before.ru_maxrss
    code: Any = 0
    sys.addaudithook(heard)
    try:
        app.main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    own, of_children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sys.stderr.flush()
    seconds = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
    # What a child is said to have held includes what this process held when it started it: nothing is known below that.
    theirs = of_children.ru_maxrss if of_children.ru_maxrss > own.ru_maxrss + (16 << 10) else 0
    used = max(own.ru_maxrss - peak, theirs) << 10
    kept = {"code": code or 0, "seconds": seconds, "bytes": used, "started": started, "written": written}
    report.write_text(json.dumps(kept))
    os._exit(0)


def test_there_are_enough(cases: list[Case]) -> None:
    assert len(cases) >= 60


def test_every_case(cases: list[Case], hostile: Path, tmp_path: Path) -> None:
    faults = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = call(case, hostile / "good", folder)
        if outcome.seconds > MOST_SECONDS:  # a busy machine takes more; twice it does not
            outcome = min(outcome, call(case, hostile / "good", folder), key=lambda each: each.seconds)
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
    faults += [f"started {event}" for event in outcome.started if "nestcli.data.pool" not in event]
    allowed = (str(folder), "/dev/null", "/tmp/nest-sox-")
    faults += [f"wrote {path}" for path in outcome.written if not path.startswith(allowed)]
    if outcome.seconds > MOST_SECONDS:
        faults.append(f"{outcome.seconds:.1f} s")
    if outcome.bytes > MOST_BYTES:
        faults.append(f"{outcome.bytes >> 20} MiB")
    return faults


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize("call", ["os.system('true')", "open('/tmp/elsewhere-of-a-test', 'w')", "bytearray(700 << 20)"])
def test_the_watch_sees_what_it_is_for(
    call: str, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that does one of these would be found out."""
    monkeypatch.setattr(app, "main", lambda: exec(call))
    case = Case("x", tmp_path / "x", ())
    faults = found_faults(case, globals()["call"](case, hostile, tmp_path), tmp_path)
    assert any(fault.startswith(("started", "wrote")) or fault.endswith("MiB") for fault in faults), faults
    Path("/tmp/elsewhere-of-a-test").unlink(missing_ok=True)
