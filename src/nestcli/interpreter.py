"""Command and environment of a child Python that imports the same modules, but none from the current folder.

`python -c` and `python -m` look in the current folder first: a `json.py` inside a corpus would be run.
"""

from __future__ import annotations

import os
import sys


def command(code: str) -> list[str]:
    """Return the command line that runs `code`."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = filter(None, sys.path); {code}"]


def environment() -> dict[str, str]:
    """Return this process' environment with its import path in PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
