"""Names of manifests: commas, ranges and what lies there. Nothing heavy is imported: a wrong name is told at once."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nestcli.config import require
from nestcli.errors import DataError
from nestcli.files import is_remote, user_path

# `_OP_0..7_CL_` is NeMo's spelling of `{0..7}` for command lines; NeMo also accepts the other brackets.
_RANGE = re.compile(r"(?:_OP_|[{(\[<])([0-9]+)\.\.([0-9]+)(?:_CL_|[})\]>])")
_MOST_SHARDS = 1_000_000
_MOST_RANGES, _MOST_DIGITS = 8, 18  # ranges in a path, digits in a number


def speech_manifests(config: DictConfig, key: str) -> Any:
    """Return what the block at `key` names as manifests of speech. Raises ConfigError if it is not set."""
    none = "; null means no validation" if key == "model.validation_ds" else ""
    why = f"the manifest of the speech, as `nest prepare-data` writes it{none}"
    return require(config, f"{key}.manifest_filepath", why)


def split_paths(paths: str) -> list[str]:
    """Split a string of names at its commas, unless a file of the whole name exists."""
    if os.path.isfile(user_path(paths)):  # noqa: PTH113  (pathlib raises for a name that is too long, as many joined ones are)
        return [paths]
    return [name.strip() for name in paths.split(",") if name.strip()]


def expand(paths: str | Sequence[str]) -> list[str]:
    """Expand the ranges in paths: `audio__OP_0..2_CL_.tar` names three files. Raises DataError."""
    names = split_paths(paths) if isinstance(paths, str) else [str(path) for path in paths]
    expanded: list[str] = []
    for each in names:
        expanded += _expanded(each)
        if len(expanded) > max(_MOST_SHARDS, len(names)):
            raise DataError(f"{names[0][:200]}, ...: the ranges name more than {_MOST_SHARDS:,} files. Give fewer.")
    return expanded


def _expanded(path: str) -> list[str]:
    elsewhere = is_remote(path)
    path = user_path(path)
    found = _RANGE.search(path)
    if found is None or (not elsewhere and os.path.exists(path)):  # noqa: PTH110  (pathlib raises for long names)
        return [path if elsewhere else str(Path(path))]
    _check_ranges(path)
    first, last = found.groups()
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    before, after = path[: found.start()], path[found.end() :]
    return [name for number in numbers for name in _expanded(f"{before}{number:0{width}}{after}")]


def _check_ranges(path: str) -> None:
    """Refuse ranges that name no files, or impossibly many, before the names are made."""
    ranges, total = _RANGE.findall(path), 1
    for first, last in ranges:
        if max(len(first), len(last)) > _MOST_DIGITS or int(first) > int(last):
            written = f"{first[:20]}..{last[:20]}"
            raise DataError(f"{path[:200]}: the range {written} names no files; write it as _OP_0..7_CL_")
        total *= int(last) - int(first) + 1
    if total > _MOST_SHARDS or len(ranges) > _MOST_RANGES:
        raise DataError(f"{path[:200]}: its ranges name more than {_MOST_SHARDS:,} files. Give fewer.")


def check_there(paths: str | Sequence[str]) -> None:
    """Raise DataError if one of these paths, with commas and ranges, is no file here; remote ones are not looked at."""
    for path in expand(paths):
        if not is_remote(path):
            check_file(path)


def check_file(path: str) -> None:
    """Raise DataError if a local path is no file that a manifest can be."""
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(f"manifest {path}: {getattr(error, 'strerror', None) or error}{_prepared(path)}") from None
    if stat.S_ISDIR(mode):
        remedy = _prepared(path) or ". Of a folder of audio `nest prepare-data FOLDER --out DIR` makes one"
        raise DataError(f"manifest {path} is a folder; name a file of JSON lines{remedy}")
    if not stat.S_ISREG(mode):
        raise DataError(f"manifest {path} is a pipe or a device; name a file of JSON lines")


def _prepared(path: str) -> str:
    """Return a hint that names a manifest of `nest prepare-data` near a wrong path; "" if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)  # noqa: PTH112, PTH120  (pathlib raises for some)
    there = os.path.join(folder, "train_manifest.json")  # noqa: PTH118
    return f". Did you mean {there}?" if os.path.isfile(there) else ""  # noqa: PTH113
