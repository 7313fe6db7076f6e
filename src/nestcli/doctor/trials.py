"""Run trials in a child process. A crash or a hang of the child is an answer too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nestcli.doctor import child

LIMIT = 300.0  # s for one trial: importing torch from a network disk takes minutes


@dataclass(frozen=True)
class Answer:
    """The facts that a trial found, or its `error`; `died` is True if its process crashed or was killed."""

    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    died: bool = False


def run_trials(
    trials: Sequence[str],
    *,
    python: str = sys.executable,
    limit: float = LIMIT,
    begun: Callable[[str], None] = lambda trial: None,
) -> dict[str, Answer]:
    """Run trials and return their answers by name. After a crash or a time-out, a new process runs the next trial.

    `limit` is the time-out of one trial in s. Raises OSError if `python` cannot be started.
    """
    answers: dict[str, Answer] = {}
    while left := [trial for trial in trials if trial not in answers]:
        _go_through(left, answers, python, limit, begun)
    return answers


def _go_through(
    trials: list[str], answers: dict[str, Answer], python: str, limit: float, begun: Callable[[str], None]
) -> None:
    """Run trials until all are answered or the process ends. At least one more trial then has an answer."""
    with tempfile.TemporaryFile(prefix="nest-doctor-") as log:
        process = _start(trials, python, log.fileno())
        assert process.stdout is not None
        now, timed_out = trials[0], threading.Event()
        watch = _watch(process, limit, timed_out)
        for text in process.stdout:
            watch.cancel()
            line = json.loads(text)
            if "begun" in line:
                now = line["begun"]
                begun(now)
            else:
                answers[line["trial"]] = Answer(line.get("facts", {}), line.get("error", ""))
            watch = _watch(process, limit, timed_out)
        watch.cancel()
        process.stdout.close()
        status = process.wait()
        if now not in answers:
            why = f"no answer within {limit:g} s" if timed_out.is_set() else _how_it_ended(status, _last_line(log))
            answers[now] = Answer(error=why, died=True)


def _start(trials: list[str], python: str, log: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    if python == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(  # noqa: S603  # our own interpreter, or the one that the user names
        [python, child.__file__, *trials],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )


def _watch(process: subprocess.Popen[str], limit: float, timed_out: threading.Event) -> threading.Timer:
    def end() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    return timer


def _how_it_ended(status: int, last_words: str) -> str:
    if status < 0:
        return f"the process was killed by {signal.Signals(-status).name}"
    return f"the process ended with exit code {status}: {last_words or 'no output'}"


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
