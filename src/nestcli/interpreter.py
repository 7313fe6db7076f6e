"""Another Python of ours: it imports what this process imports, and nothing out of the folder that it stands in.

`python -c` and `python -m` look there before anywhere else: a corpus that holds a `json.py` would run it.
"""

from __future__ import annotations

import os
import sys


def command(code: str) -> list[str]:
    """What starts it, to run `code`."""
    return [sys.executable, "-c", f"import sys; sys.path[:] = filter(None, sys.path); {code}"]


def environment() -> dict[str, str]:
    """Its environment, with the places of imports of this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
