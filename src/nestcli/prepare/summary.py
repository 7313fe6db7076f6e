"""The summary of a prepared corpus: counts, durations and levels, for summary.json and the terminal."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from nestcli.prepare.select import Accepted, Rejected
from nestcli.prepare.summary_picture import duration_bins, level_bins

_SHORT = 1.0  # s; `nest pretrain` skips shorter utterances by default


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """Content of summary.json; durations in seconds, levels in dBFS.

    `shards` holds the keys of `model.train_ds` and `model.validation_ds` that make `nest pretrain` read the shards.
    `not_packed` counts utterances that had become unreadable when the shards were written; skipped.jsonl in the
    shards' folder lists them.
    """

    kind: str
    accepted: int
    rejected: int
    hours: float
    manifests: dict[str, str | None]
    utterances: dict[str, int]
    rejections: dict[str, int]
    speakers: int
    without_speaker: int
    durations: dict[str, float]
    levels: dict[str, float]
    histograms: dict[str, dict[str, float]]
    shorter_than_1s: int
    sample_rates: dict[int, int]
    passed_over: int
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_packed: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(
    kind: str,
    accepted: Sequence[Accepted],
    rejected: Sequence[Rejected],
    in_val: Sequence[bool],
    manifests: dict[str, str | None],
    passed_over: int,
) -> PrepareSummary:
    """Count what was accepted and rejected; `in_val` tells which accepted utterances are for validation."""
    durations = [each.duration for each in accepted] or [0.0]
    levels = [each.rms_db for each in accepted] or [0.0]
    return PrepareSummary(
        kind=kind,
        accepted=len(accepted),
        rejected=len(rejected),
        hours=round(math.fsum(durations) / 3600, 6),
        manifests=manifests,
        utterances={"train": len(accepted) - sum(in_val), "val": sum(in_val)},
        rejections=dict(sorted(Counter(each.reason for each in rejected).items())),
        speakers=len({each.speaker for each in accepted} - {None}),
        without_speaker=sum(each.speaker is None for each in accepted),
        durations=_spread(durations),
        levels=_spread(levels),
        histograms=_histograms(np.array(durations), np.array(levels)) if accepted else {},
        shorter_than_1s=sum(each.duration < _SHORT for each in accepted),
        sample_rates=dict(sorted(Counter(each.sample_rate for each in accepted).items())),
        passed_over=passed_over,
    )


def _histograms(durations: npt.NDArray[np.float64], levels: npt.NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """Return coarse histograms for the terminal: hours by duration bin (s), utterances by level bin (dBFS).

    A bin is named by its upper end.
    """
    hours = zip(*duration_bins(durations, most=12), strict=True)
    counts = zip(*level_bins(levels, step=6.0), strict=True)
    return {
        "hours_by_seconds": {label: round(value, 6) for label, value in hours},
        "utterances_by_dbfs": dict(counts),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
