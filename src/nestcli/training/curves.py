"""The curves of a run's metrics.jsonl as a picture: `python -m nestcli.training.curves RUN_FOLDER [OUT.png]`.

Matplotlib is optional and slow to import, so only functions name it. The ending of the picture's name chooses PNG,
SVG or PDF.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestcli.errors import ConfigError, MissingDependencyError, NestError
from nestcli.files import atomic_file
from nestcli.pictures import render, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[dict[str, Any]]

_INK, _GREY, _PALE = "#22262b", "#8a9099", "#e3e6ea"
_COLOURS = ("#2f6db5", "#d9702b", "#3a8f6b")  # told apart by colour-blind readers too
# Title of each panel and its curves: key of metrics.jsonl, name, whether it is a baseline.
_PANELS: tuple[tuple[str, tuple[tuple[str, str, bool], ...]], ...] = (
    (
        "masked-token loss (nats)",
        (
            ("train_loss", "training", False),
            ("val_loss", "validation", False),
            ("unigram_loss", "guessing by frequency", True),
        ),
    ),
    (
        "masked-token accuracy",
        (
            ("masked_accuracy", "training", False),
            ("val_masked_accuracy", "validation", False),
            ("unigram_accuracy", "guessing by frequency", True),
        ),
    ),
    (
        "codes in use (perplexity)",
        (("predicted_perplexity", "predictions", False), ("target_perplexity", "targets", True)),
    ),
    ("effective rank of the encoder's output", (("effective_rank", "", False),)),
    ("gradient norm", (("gradient_norm", "", False),)),
    ("parameter norm", (("parameter_norm", "", False),)),
)
_WIDE_RANGE = 50.0  # largest over smallest value of a panel, from where on its scale is logarithmic


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, or of the one in a run's folder. Raises ConfigError if there are none."""
    path = metrics / "metrics.jsonl" if metrics.is_dir() else metrics
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as the metrics of a run: {error}. Name the run's folder.") from None
    if not lines:
        raise ConfigError(f"{path} is empty: the run has not logged a step yet.")
    return lines


def draw_curves(lines: Lines, path: Path, title: str = "") -> str:
    """Draw every panel for which there are numbers. Raises MissingDependencyError without matplotlib.

    Returns a sentence about letters of the title that no font has, or nothing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f'Curves need matplotlib ({error}). Install it: pip install "nestcli[demo]"'
        raise MissingDependencyError(message) from error
    panels = [panel for panel in _PANELS if any(_points(lines, key)[0] for key, _, _ in panel[1])]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained", facecolor="white")
    places = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axes, (name, curves) in zip(places, panels, strict=False):
        _panel(axes, name, curves, lines)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("optimiser step", fontsize=9, color=_INK)
    if title:
        figure.suptitle(words(title), x=0.01, ha="left", fontsize=11, fontweight="bold", color=_INK)
    with atomic_file(path) as file:
        return render(figure, file, path.suffix[1:] or "png", 90)


def _panel(axes: Axes, name: str, curves: Sequence[tuple[str, str, bool]], lines: Lines) -> None:
    colours = iter(_COLOURS)
    for key, label, is_baseline in curves:
        steps, values = _points(lines, key)
        if not steps:
            continue
        if is_baseline:
            axes.plot(steps, values, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
        else:
            marker = "o" if key.startswith("val_") else ""
            axes.plot(steps, values, color=next(colours), marker=marker, markersize=3, linewidth=1.4, label=label)
    axes.set_title(name, loc="left", fontsize=9.5, color=_INK)
    values = [value for key, _, _ in curves for value in _points(lines, key)[1]]
    if min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        axes.set_yscale("log")
    if any(label for _, label, _ in curves):
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(which="both", colors=_GREY, labelcolor=_INK, labelsize=8)
    axes.grid(axis="y", color=_PALE, linewidth=0.8)


def _points(lines: Lines, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have a finite number under a key."""
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None and np.isfinite(line[key])]
    return [step for step, _ in points], [value for _, value in points]


def main(given: Sequence[str]) -> int:
    if not 1 <= len(given) <= 2 or given[0].startswith("-"):
        sys.stderr.write("usage: python -m nestcli.training.curves RUN_FOLDER [OUT.png]\n")
        return 2
    run = Path(given[0])
    out = Path(given[1]) if len(given) == 2 else (run if run.is_dir() else run.parent) / "curves.png"
    try:
        note = draw_curves(read_lines(run), out, title=run.resolve().name)
    except NestError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stderr.write(note and f"{note}\n")
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
