"""Run `nest` and record the processes that it started, the files that it wrote, its time and its memory.

Each call is a fork of a separate process that has imported everything and holds nothing else. Time and memory are then
those of the input. A fork of the testing process would hold what all earlier tests hold; in Linux's accounting, so
would every process that it starts. Python's audit events report processes started and files opened for writing.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from hostile.corpus import Case

_IMPORTS = ("nestcli.cli.app", "nestcli.checkpoint.export", "nestcli.prepare.pipeline", "nestcli.training.run")
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "os.startfile")
_CONNECTS = ("socket.connect", "socket.getaddrinfo")
_LONGEST = 60.0  # seconds


@dataclass
class Outcome:
    code: int
    errors: str
    seconds: float  # of processors
    bytes: int  # above what was held before the call; a process that it started: all it held
    started: list[str]
    written: list[str]


def call(case: Case, good: Path, folder: Path, instead: str = "") -> Outcome:
    """Run the case's command in `folder`, or the Python code `instead`."""
    words = [word.format(path=case.path, out=folder / "out", good=good) for word in case.words]
    watcher = _watcher()
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    watcher.stdin.write(json.dumps({"words": words, "folder": str(folder), "instead": instead}) + "\n")
    watcher.stdin.flush()
    answer = watcher.stdout.readline()
    assert answer, "the process that runs the calls has died"
    errors = (folder / "stderr").read_text()
    if json.loads(answer) is None:
        pytest.fail(f"{case.name} ran for a minute")
    assert _report(folder).is_file(), f"{case.name}: the process died: {errors[-500:]}"
    return Outcome(errors=errors, **json.loads(_report(folder).read_text()))


def _report(folder: Path) -> Path:
    return folder / "report.json"


@functools.cache
def _watcher() -> subprocess.Popen[str]:
    """Start the process that runs the calls. It ends when its input does, that is, with the testing process."""
    quiet = {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **quiet},
    )  # fmt: skip


# ---- in the process of its own -----------------------------------------------------------------------------------


def main() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        _report(Path(order["folder"])).unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _run(order["words"], Path(order["folder"]), order["instead"])
        answers.write(json.dumps(_ended(child)) + "\n")
        answers.flush()


def _ended(child: int) -> int | None:
    """Wait for a child and return its status; None if it took too long and was killed."""
    deadline = time.monotonic() + _LONGEST
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run(words: list[str], folder: Path, instead: str) -> NoReturn:
    """Run the command in the child; write its output and Python's audit events to files."""
    started: list[str] = []
    written: list[str] = []

    def heard(event: str, arguments: Any) -> None:
        if event in _STARTS or event in _CONNECTS:
            started.append(f"{event} {arguments!r:.300}")
        if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
            nameless = Path(arguments[0]).is_dir()  # tempfile.TemporaryFile: it is gone with its last user
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not nameless:
                written.append(str(Path(arguments[0]).absolute()))

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    sys.argv = ["nest", *words]
    from nestcli.cli import app

    before = resource.getrusage(resource.RUSAGE_SELF)
    code: Any = 0
    sys.addaudithook(heard)
    try:
        exec(instead) if instead else app.main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    own, of_children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    sys.stdout.flush()
    sys.stderr.flush()
    seconds = own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime
    used = max(own.ru_maxrss - before.ru_maxrss, of_children.ru_maxrss) << 10
    kept = {"code": code or 0, "seconds": seconds, "bytes": used, "started": started, "written": written}
    _report(folder).write_text(json.dumps(kept))
    os._exit(0)


if __name__ == "__main__":
    main()
