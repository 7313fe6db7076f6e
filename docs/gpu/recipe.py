"""docs/reference/run.py as a module whose commands run in this interpreter and end in time."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

_ENDING = 20.0  # seconds for a command to save its work after SIGTERM


def recipe(root: Path, seconds: float | None = None) -> ModuleType:
    """Return the module; its commands get SIGTERM after `seconds`, which `nest pretrain` uses to save a checkpoint."""
    spec = importlib.util.spec_from_file_location("reference_run", root / "docs" / "reference" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.nest = lambda *words: command(seconds, *words)  # type: ignore[attr-defined]
    return module


def command(seconds: float | None, *words: object) -> None:
    """Run a command of nest; end it after `seconds`. Raises CalledProcessError if it fails before."""
    call = [sys.executable, "-m", "nestcli", *map(str, words)]
    print("+", *call, flush=True)
    process = subprocess.Popen(call)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)
        process.kill()
        process.wait()
        return
    if code:
        raise subprocess.CalledProcessError(code, ["nest", *map(str, words[:1])])
