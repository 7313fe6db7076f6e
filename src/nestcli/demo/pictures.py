"""The demo's pictures: the course of training, and the features of one batch.

Axes: F mel channels, T frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestcli.pictures import BLUE, GREY, ORANGE, PALE, colour_bar, new_figure, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

FloatArray = npt.NDArray[np.floating[Any]]


@styled()
def draw_loss_curve(
    path: Path,
    steps: npt.ArrayLike,
    train_loss: npt.ArrayLike,
    accuracy: npt.ArrayLike,
    val_steps: npt.ArrayLike,
    val_loss: npt.ArrayLike,
    *,
    even_loss: float,
    frequency_loss: float,
) -> None:
    """Write a PNG of the losses in nats and, below, of the accuracy on masked tokens (0 to 1).

    Two lines show the loss of a uniform guess and of a guess by class frequency. The validation may be empty.
    Raises MissingDependencyError without matplotlib.
    """
    even = f"uniform guess: ln({round(float(np.exp(even_loss)))}) = {even_loss:.2f}"
    by_frequency = f"guess by frequency: {frequency_loss:.2f}"
    figure = new_figure(8, 6)
    losses, accuracies = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _curve(losses, steps, train_loss, BLUE, "training")
    losses.plot(val_steps, val_loss, color=ORANGE, marker="o", label="validation")
    losses.axhline(even_loss, color=GREY, linestyle=(0, (4, 3)), linewidth=1, label=even)
    losses.axhline(frequency_loss, color=GREY, linestyle=(0, (1, 2)), linewidth=1, label=by_frequency)
    losses.set_ylabel("masked-token loss (nats)")
    losses.legend()
    _curve(accuracies, steps, 100 * np.asarray(accuracy, np.float64), BLUE, "training")
    accuracies.set_ylabel("masked tokens correct (%)")
    accuracies.set_xlabel("training step")
    accuracies.set_ylim(bottom=0)
    for axes in (losses, accuracies):
        axes.grid(axis="y")
    figure.align_ylabels()
    save(figure, path)


@styled()
def draw_batch(
    path: Path,
    clean_FT: FloatArray,
    noisy_FT: FloatArray,
    masked_FT: FloatArray,
    *,
    hop_seconds: float,
    title: str,
) -> None:
    """Write a PNG of one item's log-mel features: clean, with noise, and masked, one above the other.

    The three arrays have the same shape; `hop_seconds` is the time between frames. Frames in which `masked_FT`
    differs from `noisy_FT` count as masked and are left blank. Raises MissingDependencyError without matplotlib.
    """
    masked_T = (np.abs(masked_FT - noisy_FT) > 1e-5).any(axis=0)
    visible_FT = np.where(masked_T, np.nan, masked_FT)
    panels = {
        "clean · the targets are computed from this": clean_FT,
        "noisy · after mixing": noisy_FT,
        f"masked · the encoder's input; blank: the {masked_T.mean():.0%} of frames that are replaced": visible_FT,
    }
    figure = new_figure(10, 7, title)
    rows = figure.subplots(3, 1, sharex=True, sharey=True)
    lowest, highest = np.percentile(np.stack([clean_FT, noisy_FT]), [1, 99.7])
    for axes, (name, features_FT) in zip(rows, panels.items(), strict=True):
        image = _spectrogram(axes, features_FT, hop_seconds, lowest, highest)
        axes.set_title(name)
    rows[-1].set_xlabel("time (s)")
    figure.supylabel("mel channel", fontsize=10)
    colour_bar(figure, image, list(rows), "log-mel energy")
    save(figure, path)


def _curve(axes: Axes, steps: npt.ArrayLike, values: npt.ArrayLike, colour: str, name: str) -> None:
    """Draw the raw values in a pale colour, and their running mean over a twentieth of the run."""
    x, y = np.asarray(steps), np.asarray(values, np.float64)
    axes.plot(x, y, color=colour, alpha=0.3, linewidth=0.8)
    window = np.ones(max(1, len(y) // 20))
    mean = np.convolve(y, window, "same") / np.convolve(np.ones_like(y), window, "same")
    axes.plot(x, mean, color=colour, linewidth=2, label=name)


def _spectrogram(axes: Axes, features_FT: FloatArray, hop_seconds: float, lowest: float, highest: float) -> AxesImage:
    """Draw an image with pale blanks (NaN) and time in seconds from left to right."""
    n_channels, n_frames = features_FT.shape
    image = axes.imshow(
        features_FT,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, n_frames * hop_seconds, 0, n_channels),
        cmap="magma",
        vmin=lowest,
        vmax=highest,
    )
    axes.set_facecolor(PALE)  # visible where the image has no value
    return image
