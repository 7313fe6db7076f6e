"""What was looked at, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nestcli import __version__

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. A `note` is good to know, a `problem` keeps something from working.

    `remedy` says in words what to do, and is empty where all is well.
    """

    section: str
    name: str
    state: State
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (not self.remedy), f"{self.name}: what is not ok has a remedy, what is has none"


@dataclass(frozen=True)
class Report:
    """All checks, in the order in which they are shown."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.of("problem")

    def of(self, state: State) -> list[Check]:
        return [check for check in self.checks if check.state == state]

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "version": __version__, "checks": [asdict(check) for check in self.checks]}


def size(count: float) -> str:
    """Bytes for a person: 64 MiB, 23.5 GiB."""
    if count < 1 << 30:
        return f"{count / (1 << 20):,.0f} MiB"
    return f"{count / (1 << 30):,.1f} GiB"
