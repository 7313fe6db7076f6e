"""The picture of a prepared corpus: how much of it, how long its utterances are, how loud. SVG, drawn by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nestcli.errors import RunFailedError
from nestcli.files import write_text
from nestcli.jobs.journal import REMEDY
from nestcli.prepare.select import Accepted

_WIDTH, _HEIGHT, _PLOT = 860, 330, 380
_INK, _BAR, _LINE = "#24292f", "#3b7dd8", "#d0d7de"
_QUIETEST = -72.0  # dBFS; what is below counts as that


def draw_summary(path: Path, kind: str, accepted: Sequence[Accepted]) -> None:
    """Write the picture; nothing where nothing was accepted."""
    if not accepted:
        path.unlink(missing_ok=True)
        return
    durations = np.array([each.duration for each in accepted])
    levels = np.array([each.rms_db for each in accepted])
    speakers = len({each.speaker for each in accepted} - {None})
    heard = f", {speakers:,} speakers" if speakers else ""
    title = f"{durations.sum() / 3600:,.2f} hours of {kind}: {len(accepted):,} utterances{heard}"
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(30, 36, title, 19),
        *_bars(30, "hours by length of utterance, s", *duration_bins(durations), "h"),
        *_bars(30 + _PLOT + 40, "utterances by level, dBFS", *level_bins(levels), ""),
        "</svg>\n",
    ]
    write_text(path, ["\n".join(text)], RunFailedError, REMEDY)


def duration_bins(durations: np.ndarray, most: int = 24) -> tuple[list[str], list[float]]:
    """Labels in seconds, and the hours of the utterances up to each; at most `most` where that is possible."""
    longest = float(durations.max())
    step = next(size for size in (0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600, math.inf) if longest / size <= most)
    n_bins = max(1, math.ceil(longest / step)) if math.isfinite(step) else 1
    bins = np.minimum((durations / step).astype(int), n_bins - 1) if math.isfinite(step) else durations.astype(int) * 0
    hours = np.bincount(bins, weights=durations / 3600, minlength=n_bins)
    labels = [f"{(number + 1) * step:g}" for number in range(n_bins)] if math.isfinite(step) else [f"{longest:g}"]
    return labels, hours.tolist()


def level_bins(levels: np.ndarray, step: float = 3.0) -> tuple[list[str], list[float]]:
    """Labels in dBFS, and the number of utterances up to each."""
    edges = np.arange(_QUIETEST, 0.1, step)
    bins = np.searchsorted(edges, np.clip(levels, edges[0], edges[-1]), side="left")
    counts = np.bincount(bins, minlength=len(edges)).astype(float)
    return [f"{edge:g}" for edge in edges], counts.tolist()


def _bars(left: int, title: str, labels: list[str], values: list[float], unit: str) -> list[str]:
    bottom, top = _HEIGHT - 50, 90
    width = _PLOT / len(values)
    highest = max(values) or 1.0
    every = math.ceil(len(labels) / 12)
    parts = [
        _text(left, top - 14, title, 13),
        f'<line x1="{left}" y1="{bottom}" x2="{left + _PLOT}" y2="{bottom}" stroke="{_LINE}"/>',
        _text(left + _PLOT, top - 14, f"highest {highest:,.3g} {unit}".rstrip(), 11, "end"),
    ]
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        height = (bottom - top) * value / highest
        x = left + number * width
        parts.append(
            f'<rect x="{x + 1:.1f}" y="{bottom - height:.1f}" width="{max(1.0, width - 2):.1f}" '
            f'height="{height:.1f}" fill="{_BAR}"/>'
        )
        if number % every == 0:
            parts.append(_text(x + width / 2, bottom + 16, label, 10, "middle"))
    return parts


def _text(x: float, y: float, words: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{_INK}" text-anchor="{anchor}">{words}</text>'
