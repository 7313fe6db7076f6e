"""Results of a section, in the JSON form that scripts read."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeated measurements."""

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
    """Results of one section. A `ratio` above 1 means that nest is better than NeMo; memory is in bytes.

    `extra` adds keys to those that every section has in the JSON document.
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
