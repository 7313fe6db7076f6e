"""Run trials in a child process. A crash or a hang of the child is an answer too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nestcli.conversation import Conversation, DiedError
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
    environment = dict(os.environ)
    if python == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    answers: dict[str, Answer] = {}
    while left := [trial for trial in trials if trial not in answers]:
        with Conversation([python, child.__file__], "the process", environment) as process:
            for trial in left:
                begun(trial)
                try:
                    answers[trial] = Answer(**process.exchange({"trial": trial}, limit))
                except DiedError as error:
                    answers[trial] = Answer(error=_how_it_ended(error, limit), died=True)
                    break
    return answers


def _how_it_ended(error: DiedError, limit: float) -> str:
    if error.late:
        return f"no answer within {limit:g} s"
    if error.status is not None and error.status < 0:
        return f"the process was killed by {signal.Signals(-error.status).name}"
    return f"the process ended with exit code {error.status}: {error.lines[-1][:300] if error.lines else 'no output'}"
