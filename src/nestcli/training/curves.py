"""Draw the curves of a run's metrics.jsonl: `python -m nestcli.training.curves RUN_FOLDER [OUT.png]`.

The file extension chooses PNG, SVG or PDF. Runs do not draw curves themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestcli.errors import ConfigError, NestError
from nestcli.pictures import GREY, new_figure, save, styled, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[dict[str, Any]]

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
_WIDE_RANGE = 50.0  # ratio of a panel's largest to its smallest value above which its scale is logarithmic


def read_lines(metrics: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, or of the one in a run's folder. Raises ConfigError if there are none."""
    path = metrics / "metrics.jsonl" if metrics.is_dir() else metrics
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as the metrics of a run: {error}. Name the run's folder.") from None
    if not lines:
        raise ConfigError(f"{path} is empty: the run has not logged a step yet.")
    return lines


@styled()
def draw_curves(lines: Lines, path: Path, title: str = "") -> str:
    """Draw every panel that has data. Raises MissingDependencyError without matplotlib.

    Returns a sentence about letters of the title that no font has, or an empty string.
    """
    panels = [panel for panel in _PANELS if any(_points(lines, key)[0] for key, _, _ in panel[1])]
    rows = -(-len(panels) // 2)
    figure = new_figure(10, 2.6 * rows, words(title))
    places = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
    for axes, (name, curves) in zip(places, panels, strict=False):
        _panel(axes, name, curves, lines)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("optimiser step", fontsize=10)
    return save(figure, path, dpi=90)


def _panel(axes: Axes, name: str, curves: Sequence[tuple[str, str, bool]], lines: Lines) -> None:
    for key, label, is_baseline in curves:
        steps, values = _points(lines, key)
        if not steps:
            continue
        if is_baseline:
            axes.plot(steps, values, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
        else:
            axes.plot(steps, values, marker="o" if key.startswith("val_") else "", linewidth=1.4, label=label)
    axes.set_title(name)
    values = [value for key, _, _ in curves for value in _points(lines, key)[1]]
    if min(values) > 0 and max(values) > _WIDE_RANGE * min(values):
        axes.set_yscale("log")
    if any(label for _, label, _ in curves):
        axes.legend(fontsize=8)
    axes.grid(axis="y")


def _points(lines: Lines, key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of the lines that have a finite number under a key."""
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
