"""Run `nest doctor`: the trials in child processes, then the checks of every section."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from nestcli.doctor import audio, devices, installation
from nestcli.doctor.compiler import compiler_check
from nestcli.doctor.disk import disk_checks
from nestcli.doctor.environment import environment_checks
from nestcli.doctor.nemo import nemo_checks
from nestcli.doctor.report import Report
from nestcli.doctor.trials import run_trials

Advance = Callable[[int, int, str], None]  # trials done, total, the current one


def examine(out: Path, nemo_python: str | None, advance: Advance = lambda done, total, doing: None) -> Report:
    """Run all checks. Writes temporary files only."""
    environ = dict(os.environ)
    trials = [*installation.trials(), "presets", *devices.TRIALS, *audio.TRIALS]
    done = iter(range(len(trials) + 1))
    answers = run_trials(trials, begun=lambda trial: advance(next(done), len(trials), trial.replace(":", " ")))
    if further := devices.further_trials(answers):
        answers |= run_trials(further)
    advance(len(trials), len(trials), "disk and environment")
    return Report(
        (
            *installation.installation_checks(answers),
            *devices.devices_checks(answers),
            compiler_check(environ, has_gpu=bool(answers["torch"].facts.get("gpus"))),
            *audio.audio_checks(answers, environ.get("PATH")),
            *disk_checks(out, environ),
            *nemo_checks(environ, nemo_python),
            *environment_checks(environ),
        )
    )
