"""The results of `nest doctor`: checks, each with a finding and a remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nestcli import __version__

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One check. A `note` is for information; a `problem` keeps something from working.

    `remedy` says what to do; it is empty if the check is ok.
    """

    section: str
    name: str
    state: State
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert (self.state == "ok") == (not self.remedy), (
            f"{self.name}: a check has a remedy if and only if it is not ok"
        )


@dataclass(frozen=True)
class Report:
    """All checks, in display order."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return not self.of("problem")

    def of(self, state: State) -> list[Check]:
        return [check for check in self.checks if check.state == state]

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "version": __version__, "checks": [asdict(check) for check in self.checks]}


def size(count: float) -> str:
    """Format bytes for display: 64 MiB, 23.5 GiB."""
    if count < 1 << 30:
        return f"{count / (1 << 20):,.0f} MiB"
    return f"{count / (1 << 30):,.1f} GiB"
