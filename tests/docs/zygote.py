"""A process that has everything imported and runs what it is told, each in a fork of itself.

Reads a JSON line for each: kind ("nest", "module" or "file"), words, cwd, environment, stdin, stdout, stderr (files),
seconds.
Answers with a JSON line: the exit code, or null where it took longer than `seconds`.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from typing import Any, NoReturn

_IMPORTS = (
    "nestcli.checkpoint.export", "nestcli.prepare.pipeline", "nestcli.augment.run", "nestcli.training.run",
    "nestcli.parity.compare", "nestcli.evaluation.extract", "nestcli.evaluation.probes.classify",
)  # fmt: skip


def run(order: dict[str, Any]) -> NoReturn:
    """Run the command in the child, then end the process at once: unloading all modules would cost two seconds."""
    code: Any = 0
    try:
        start(order)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        sys.stderr.write(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def start(order: dict[str, Any]) -> None:
    if order["kind"] == "nest":
        from nestcli.cli import app

        sys.argv = ["nest", *order["words"]]
        app.main()
        return
    sys.argv = list(order["words"])
    name = sys.argv[0]
    if order["kind"] == "module":
        sys.modules.pop(name, None)  # it must run as a program
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")


def into(order: dict[str, Any]) -> None:
    """Set the child's folder, environment and files."""
    os.setsid()
    os.chdir(order["cwd"])
    sys.path.insert(0, "")
    os.environ.update(order["environment"])
    os.dup2(os.open(order["stdin"], os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115


def ended(child: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            into(order)
            run(order)
        answers.write(json.dumps(ended(child, order["seconds"])) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
