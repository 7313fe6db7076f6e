"""Pictures of a probe: its confusion matrix, and the weights of the layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nestcli.evaluation.probes.results import PRETRAINED, UNTRAINED, ProbeResult
from nestcli.pictures import BLUE, GREY, colour_bar, new_figure, save, styled, words

_MOST_NAMES, _LONGEST_NAME = 40, 24  # class names that are legible along an axis, and letters of one


@styled()
def draw_confusion(path: Path, result: ProbeResult) -> str:
    """Write a PNG of the confusion matrix: the share of each class (rows) predicted as each class (columns).

    Returns the value of `pictures.save`.
    """
    counts = np.array(result.confusion, float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = new_figure(7, 6)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("answered")
    axes.set_ylabel(words(result.label))
    if len(result.classes) <= _MOST_NAMES:
        places, names = range(len(result.classes)), [words(name, _LONGEST_NAME) for name in result.classes]
        axes.set_xticks(places, names, rotation=90, fontsize=8)
        axes.set_yticks(places, names, fontsize=8)
    best = result.best(PRETRAINED)
    axes.set_title(f"{PRETRAINED}, {best.pool}: {best.mean:.1%} right")
    colour_bar(figure, image, axes, "share of the class's utterances")
    return save(figure, path)


@styled()
def draw_layers(path: Path, result: ProbeResult) -> None:
    """Write a PNG of each layer's weight in the probes: mean and spread over the splits."""
    rows = [each for each in result.outcomes if each.name in (PRETRAINED, UNTRAINED)]
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    styles = {PRETRAINED: BLUE, UNTRAINED: GREY}
    for outcome in rows:
        weights = np.array(outcome.layer_weights)
        places, mean, spread = np.arange(weights.shape[1]), weights.mean(0), weights.std(0)
        line = "-" if outcome.pool == "mean" else "--"
        label = f"{outcome.name}, {outcome.pool}"
        axes.plot(places, mean, color=styles[outcome.name], linestyle=line, marker="o", label=label)
        axes.fill_between(places, mean - spread, mean + spread, color=styles[outcome.name], alpha=0.12, linewidth=0)
    axes.set_xticks(range(len(rows[0].layers)), rows[0].layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("weight in the probe")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    axes.legend()
    save(figure, path)
