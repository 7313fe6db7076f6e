"""Files with one JSON object per line, appended during training and truncated to the step that a run resumes at."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestcli.errors import ConfigError
from nestcli.files import open_kept, write_text


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line; NaN and infinity, which JSON lacks, become null."""
    with open_kept(path, "a", ConfigError, encoding="utf-8") as file:
        file.write(_line(row))


def drop_lines_after(path: Path, step: int, then: Mapping[str, Any] | None = None) -> None:
    """Remove the lines after a step, such as those of a killed run, and append `then`, in one atomic write."""
    lines = _lines(path)
    kept = [line for line in lines if _step_of(line) <= step]
    if then is not None or len(kept) < len(lines):
        write_text(path, [*kept, *([] if then is None else [_line(then)])])


def line_at(path: Path, step: int) -> dict[str, Any]:
    """Return the last line if it belongs to this step, without the values of validation; else nothing."""
    line = _lines(path)[-1:]
    row: dict[str, Any] = json.loads(line[0]) if line and _step_of(line[0]) == step else {}
    return {key: value for key, value in row.items() if not key.startswith("val_")}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill
