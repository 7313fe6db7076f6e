"""Draw a summary of a prepared corpus: amount of audio, durations of utterances, levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nestcli.errors import MissingDependencyError, RunFailedError
from nestcli.jobs.journal import REMEDY
from nestcli.pictures import BLUE, new_figure, save, styled
from nestcli.prepare.select import Accepted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_QUIETEST = -72.0  # dBFS; lower levels count as this one
_MOST_LABELS = 12


def draw_summary(path: Path, kind: str, accepted: Sequence[Accepted]) -> None:
    """Write the picture. Write none if nothing was accepted, or without matplotlib, which is not an error."""
    if not accepted:
        path.unlink(missing_ok=True)  # the picture of an earlier run
        return
    durations = np.array([each.duration for each in accepted])
    levels = np.array([each.rms_db for each in accepted])
    speakers = len({each.speaker for each in accepted} - {None})
    heard = f", {speakers:,} speakers" if speakers else ""
    title = f"{durations.sum() / 3600:,.2f} hours of {kind}: {len(accepted):,} utterances{heard}"
    try:
        with styled():
            figure = new_figure(11, 4, title)
            left, right = figure.subplots(1, 2)
            _bars(left, "length of utterance, up to (s)", "hours", *duration_bins(durations))
            _bars(right, "level, up to (dBFS)", "utterances", *level_bins(levels))
            save(figure, path, error=RunFailedError, remedy=REMEDY)
    except MissingDependencyError:
        path.unlink(missing_ok=True)


def duration_bins(durations: np.ndarray, most: int = 24) -> tuple[list[str], list[float]]:
    """Return the upper limits of duration bins (labels in seconds), and the hours in each; `most` bins if possible."""
    longest = float(durations.max())
    step = next(size for size in (0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, math.inf) if longest / size <= most)
    n_bins = max(1, math.ceil(longest / step)) if math.isfinite(step) else 1
    bins = np.minimum((durations / step).astype(int), n_bins - 1) if math.isfinite(step) else durations.astype(int) * 0
    hours = np.bincount(bins, weights=durations / 3600, minlength=n_bins)
    labels = [f"{(number + 1) * step:g}" for number in range(n_bins)] if math.isfinite(step) else [f"{longest:g}"]
    return labels, hours.tolist()


def level_bins(levels: np.ndarray, step: float = 3.0) -> tuple[list[str], list[float]]:
    """Return the upper limits of level bins (labels in dBFS), and the number of utterances in each."""
    edges = np.arange(_QUIETEST, 0.1, step)
    bins = np.searchsorted(edges, np.clip(levels, edges[0], edges[-1]), side="left")
    counts = np.bincount(bins, minlength=len(edges)).astype(float)
    return [f"{edge:g}" for edge in edges], counts.tolist()


def _bars(axes: Axes, what: str, unit: str, labels: list[str], values: list[float]) -> None:
    """Draw a bar for each value; its label marks the right edge."""
    places = range(1, len(values) + 1)
    every = math.ceil(len(labels) / _MOST_LABELS)
    axes.bar(places, values, width=-0.9, align="edge", color=BLUE)
    axes.set_xticks(places[every - 1 :: every], labels[every - 1 :: every])
    axes.set_xlabel(what)
    axes.set_ylabel(unit)
    axes.grid(axis="y")
