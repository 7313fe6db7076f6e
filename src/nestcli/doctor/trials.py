"""Trials in a process of their own, which may crash or hang: that is an answer too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nestcli.conversation import Conversation, DiedError
from nestcli.doctor import child

LIMIT = 300.0  # s for one trial: torch on a network disk takes minutes to import


@dataclass(frozen=True)
class Answer:
    """What a trial found; `error` says why there is nothing, `died` that it took its process along."""

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
    """Answers by trial; after one that crashes, or takes more than `limit` s, a new process goes on with the next.

    Raises OSError if `python` cannot be started.
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
        return f"the process died of {signal.Signals(-error.status).name}"
    return f"the process ended with {error.status}: {error.lines[-1][:300] if error.lines else 'it said nothing'}"
