"""Read the requirements of the installed package from its metadata, and compare versions with ranges.

Supports only the forms that our pyproject.toml uses; `packaging` would be one more dependency that can be missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*([^;]*?)\s*(?:;(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_BOUND = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([0-9][0-9A-Za-z.+!-]*)\s*")


@dataclass(frozen=True)
class Requirement:
    """A distribution, its allowed range of versions, and the extra that it belongs to (empty for none)."""

    name: str
    range: str
    extra: str = ""

    @property
    def words(self) -> str:
        """The requirement in pip's syntax."""
        return f"{self.name}{self.range}"


def requirements_of(distribution: str) -> list[Requirement] | None:
    """Return the requirements of an installed distribution; None if it is not installed."""
    try:
        return parsed(metadata.requires(distribution) or [])
    except metadata.PackageNotFoundError:
        return None


def parsed(lines: Iterable[str]) -> list[Requirement]:
    """Parse requirements from metadata: `torch>=2.10`, `wandb; extra == 'wandb'`."""
    found = []
    for line in lines:
        match = _REQUIREMENT.fullmatch(line)
        assert match is not None, line
        extra = _EXTRA.search(match[3] or "")
        found.append(Requirement(match[1], match[2].strip("()"), extra[1] if extra else ""))
    return found


def installed_version(name: str) -> str | None:
    """Return the installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_in_range(version: str, wanted: str) -> bool:
    """Return True if a version satisfies a range such as `>=0.20.1,<0.29`; a pre-release comes before its release."""
    return all(_satisfies(version, bound) for bound in wanted.split(",") if bound.strip())


def _satisfies(version: str, bound: str) -> bool:
    match = _BOUND.fullmatch(bound)
    assert match is not None, bound
    ours, theirs = _order(version), _order(match[2])
    return {
        ">=": ours >= theirs, "<=": ours <= theirs, ">": ours > theirs, "<": ours < theirs,
        "==": ours == theirs, "!=": ours != theirs,
    }[match[1]]  # fmt: skip


def _order(version: str) -> tuple[tuple[int, ...], bool]:
    """Return a sort key of a version: 2.13.0+cpu equals 2.13, and 2.10.0a0 comes before 2.10."""
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)(.*)", version.partition("+")[0])
    if match is None:
        return (), False
    numbers = [int(number) for number in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    is_final = re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)", match[2], re.IGNORECASE) is None
    return tuple(numbers), is_final
