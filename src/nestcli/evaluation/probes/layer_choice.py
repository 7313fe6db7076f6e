"""Tasks without training: half of the speakers choose the layer, and the other half is measured.

The layer that is best on the measured half itself would favour systems with many layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nestcli.errors import DataError
from nestcli.evaluation.probes.asked import Asked
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import Outcome, ProbeResult
from nestcli.evaluation.probes.splits import Indices
from nestcli.evaluation.probes.systems import Systems

Errors = Callable[[Indices, Sequence[int], int], list[float]]  # utterances, layers, a seed: the layers' error rates


def halves(groups: Sequence[str], seed: int) -> tuple[Indices, Indices]:
    """Return the utterances of a random half of the groups, and of the other half. Raises DataError for under four."""
    names = sorted(set(groups))
    if len(names) < 4:
        raise DataError(f"{len(names)} speakers are too few: two choose the layer, and at least two are measured.")
    chosen = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    there = np.isin(np.asarray(groups), chosen)
    return np.flatnonzero(there), np.flatnonzero(~there)


def judged(errors: Errors, n_layers: int, groups: Sequence[str], seed: int) -> tuple[float, tuple[float, ...]]:
    """Return the error rate of the layer that the first half chose, on the second half; and 1 for it, 0 for others."""
    chooses, judges = halves(groups, seed)
    layer = int(np.argmin(errors(chooses, range(n_layers), seed))) if n_layers > 1 else 0
    (measured,) = errors(judges, [layer], seed)
    return measured, tuple(float(place == layer) for place in range(n_layers))


def reported(
    systems: Systems, options: ProbeOptions, asked: Asked, outcomes: Sequence[Outcome], measure: str, key: str
) -> ProbeResult:
    """Return the result of such a task; `key` is the field whose values were halved."""
    return ProbeResult(
        label=options.label,
        split=f"half of the {key}s chooses the layer",
        classes=tuple(sorted(set(asked.labels))),
        utterances=len(asked.labels),
        rejected=systems.rejected,
        chance=0.5,
        outcomes=tuple(outcomes),
        notes=asked.notes,
        task=options.task,
        measure=measure,
    )
