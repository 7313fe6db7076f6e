"""What a section measured, in the form that scripts read."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The same thing measured several times."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "min": self.min, "max": self.max}


@dataclass(frozen=True)
class SectionReport:
    """One section; `ratio` above 1 means that this project is better, memory is in bytes.

    `extra` stands beside the contract's keys in the JSON document.
    """

    name: str
    unit: str
    ours: Spread
    nemo: Spread | None
    ratio: float | None
    memory: int
    nemo_memory: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": self.ours.to_json(),
            "nemo": None if self.nemo is None else self.nemo.to_json(),
            "ratio": self.ratio,
            "peak_memory_bytes": {"ours": self.memory, "nemo": self.nemo_memory},
            **self.extra,
        }
