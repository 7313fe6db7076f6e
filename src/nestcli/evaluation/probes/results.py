"""Results of a probe: every system's values over the splits, and the lead of the pretrained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PRETRAINED, UNTRAINED = "pretrained", "untrained"
LOG_MEL, NORMALISED = "log-mel", "log-mel-normalised"
BASELINES = (UNTRAINED, LOG_MEL, NORMALISED)
SYSTEMS = (PRETRAINED, *BASELINES)
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Outcome:
    """Results of one system with one pooling: the measured value and the layer weights for each split.

    For a split with several seeds, these are means over the seeds.
    """

    name: str
    pool: str
    values: tuple[float, ...]
    layers: tuple[str, ...]
    layer_weights: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float:
        return _deviation(self.values)


class Margin(NamedTuple):
    """The lead over a baseline, its standard deviation over splits, and True if it exceeds two deviations.

    With a single split the deviation is unknown, and `clear` is False.
    """

    lead: float
    deviation: float
    clear: bool


@dataclass(frozen=True)
class ProbeResult:
    """Result of a probe. `measure` is accuracy, or the name of an error rate: then lower values are better.

    `chance` is the value of a system that knows nothing, None if it is not known. `confusion` counts (true, predicted)
    classes of the best pretrained row over all splits; it is empty unless utterances are classified.
    """

    label: str
    split: str
    classes: tuple[str, ...]
    utterances: int
    rejected: int
    chance: float | None
    outcomes: tuple[Outcome, ...]
    confusion: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()
    task: str = "classify"
    measure: str = ACCURACY

    @property
    def counts_errors(self) -> bool:
        return self.measure != ACCURACY

    def best(self, name: str) -> Outcome:
        """Return the outcome of a system with its best pooling."""
        found = [each for each in self.outcomes if each.name == name]
        return min(found, key=lambda each: each.mean if self.counts_errors else -each.mean)

    @property
    def margins(self) -> dict[str, Margin]:
        """The lead over each baseline, in the unit of the measure; positive if the pretrained encoder is better."""
        found, ours = {}, np.array(self.best(PRETRAINED).values)
        for name in BASELINES:
            leads = np.array(self.best(name).values) - ours if self.counts_errors else ours - self.best(name).values
            mean, deviation = float(leads.mean()), _deviation(leads)
            found[name] = Margin(mean, deviation, len(leads) > 1 and mean > 2 * deviation and mean > 0)
        return found


def _deviation(values: Sequence[float] | np.ndarray) -> float:
    """Return the sample standard deviation (divisor N - 1), 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
