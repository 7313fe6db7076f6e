"""The figures of a comparison's page: differences layer by layer, and features and masks of both sides.

Every function returns HTML in which all text from the report is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestcli.parity.report import Section
from nestcli.pictures import BLUE, INK, RED, colour_bar, new_figure, page_element, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = npt.NDArray[Any]

# The lightness of the first two colour maps is monotonic, so that they also work in grey. A mask's colours are not
# those of the page: the page's dark scheme does not change the pixels of a picture, so it must not change their scale.
FEATURES, DIFFERENCE, MASK = "magma", "OrRd", ("#dee2e7", "#2e6db5")
NOT_FINITE = "#00a08c"

SECONDS_PER_FRAME = 0.01
MOST_COLUMNS = 600  # a panel has fewer pixels
_WIDTH = 4.7  # inches of 72 units


@styled()
def curves_figure(section: Section) -> str:
    """Return a figure of the section's differences by layer, with their tolerance."""
    limits = {label: _limit(section, label) for label in section.curves}
    decades = shared_decades(list(section.curves.values()), list(limits.values()))
    panels = []
    for label, values in section.curves.items():
        if values:
            shown = curve_in_words(values, limits[label])
            panels.append(_panel(label, shown, draw_curve(values, limits[label], decades), f"{label}: {shown}"))
    caption = (
        "Largest difference between our output and NeMo's after each layer, on a logarithmic scale. "
        "A dot on the lowest line means that both are equal; a cross means beyond the tolerance."
    )
    return _figure(f"{section.name.capitalize()}, layer by layer", caption, panels)


def _limit(section: Section, label: str) -> float | None:
    """Return the tolerance of the checks behind a curve."""
    limits = (check.tolerance for check in section.checks if check.name.startswith(f"{label}: ") and check.tolerance)
    return next(limits, None)


@styled()
def pictures_figure(section: Section) -> str:
    """Return a figure of ours, NeMo's and their difference for every pair of `ours[, label]` and `NeMo[, label]`."""
    pairs: dict[str, dict[str, Picture]] = {}
    for key, values in section.pictures.items():
        side, _, label = key.partition(", ")
        pairs.setdefault(label, {})[side] = values
    panels = [panel for label, sides in pairs.items() for panel in _pair(label, sides)]
    mel = not all(_is_mask(values) for values in section.pictures.values())
    caption = (
        "Log-mel features of the first item, normalised per bin. Both sides share a scale; the difference has its own."
        if mel
        else "Frames hidden from the encoder, for every item of a batch, from the same seed on both sides."
    )
    heading = {"preprocessor": "Features", "masking": "Masks"}.get(section.name, section.name.capitalize())
    return _figure(heading, caption, panels)


def _pair(label: str, sides: Mapping[str, Picture]) -> list[str]:
    if set(sides) != {"ours", "NeMo"} or any(values.ndim != 2 or not values.size for values in sides.values()):
        return []
    mel = not all(_is_mask(values) for values in sides.values())
    named = {side: values.astype(np.float64) for side, values in sides.items()}
    scale, ends = (0.0, 1.0), ("visible", "masked", "")
    if mel:
        finite = np.concatenate([values[np.isfinite(values)] for values in named.values()])
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        scale = (low, high if high > low else low + 1.0)
        ends = (f"{scale[0]:.1f}", f"{scale[1]:.1f}", "standard deviations")
    panels = []
    for side, values in named.items():
        what = f"{side}, {label}" if label else side
        n_bad = int((~np.isfinite(values)).sum())
        remark = f"not finite: {n_bad:,} of {values.size:,}" if n_bad else ""
        drawn = _picture(values, FEATURES if mel else MASK, scale, ends, mel=mel)
        description = f"{what}: {'features' if mel else 'masks'}, {values.shape[0]} rows, {values.shape[1]} frames"
        panels.append(_panel(what, remark, drawn, description))
    return [*panels, _difference(label, named["ours"], named["NeMo"], mel=mel)]


def _difference(label: str, ours: Picture, nemo: Picture, *, mel: bool) -> str:
    title = f"difference, {label}" if label else "difference"
    if ours.shape != nemo.shape:
        lines = ("the shapes differ", f"ours {ours.shape}, NeMo's {nemo.shape}")
        return _panel(title, "", *_no_picture(nemo, *lines, mel=mel))
    with np.errstate(invalid="ignore"):
        differences = np.where((ours == nemo) | (np.isnan(ours) & np.isnan(nemo)), 0.0, np.abs(ours - nemo))
    differs = differences != 0
    n_differing = int(differs.sum())
    if not n_differing:
        return _panel(title, "", *_no_picture(nemo, "identical", f"all {nemo.size:,} values are equal", mel=mel))
    largest = float(differences[np.isfinite(differences)].max(initial=0.0)) or 1.0
    share = f"{n_differing:,} of {differences.size:,} values differ"
    first = int(np.flatnonzero(differs.any(0))[0]) * SECONDS_PER_FRAME
    ends = ("0", scientific(largest), "") if mel else ("same", "not the same", "")
    drawn = _picture(differences, DIFFERENCE, (0.0, largest), ends, mel=mel, keep_largest=True)
    description = f"{title}: {share}, the largest by {scientific(largest)}, from {first:.2f} s on"
    return _panel(title, share, drawn, description)


def _is_mask(values: Picture) -> bool:
    return values.dtype.kind in "bui"


def _panel(title: str, remark: str, drawn: Figure, description: str) -> str:
    remark = f" <span>{escape(remark)}</span>" if remark else ""
    caption = f"<figcaption><b>{escape(title)}</b>{remark}</figcaption>"
    return f"<figure>{caption}{page_element(drawn, description)}</figure>"


def _figure(heading: str, caption: str, panels: Sequence[str]) -> str:
    if not panels:
        return ""
    return (
        f"<section>\n<h2>{escape(heading)}</h2>\n<p>{escape(caption)}</p>\n"
        f'<div class="panels">\n{chr(10).join(panels)}\n</div>\n</section>'
    )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _picture(
    values: Picture,
    colours: str | Sequence[str],
    scale: tuple[float, float],
    ends: Sequence[str],
    *,
    mel: bool,
    keep_largest: bool = False,
) -> Figure:
    """Draw values (rows, columns) over time, with a colour scale below; `ends` labels its low end, high end and unit.

    Rows are mel bins from the bottom, or utterances from the top.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    figure, axes = _axes_over_time(values, mel=mel)
    colour_map = colormaps[colours] if isinstance(colours, str) else ListedColormap(list(colours))
    image = axes.imshow(
        pooled(values, largest=keep_largest),
        cmap=colour_map.with_extremes(bad=NOT_FINITE),
        vmin=scale[0],
        vmax=scale[1],
        interpolation="none",
        aspect="auto",
        origin="lower" if mel else "upper",
        extent=(*axes.get_xlim(), *axes.get_ylim()),
    )
    bar = colour_bar(figure, image, axes, ends[2], location="bottom", shrink=0.4, aspect=12, pad=0.03)
    bar.set_ticks(list(scale), labels=ends[:2])
    return figure


def _no_picture(values: Picture, *lines: str, mel: bool) -> tuple[Figure, str]:
    """Return an empty panel of the same size that says why there is no picture, and its description."""
    figure, axes = _axes_over_time(values, mel=mel)
    axes.text(0.5, 0.5, "\n".join(lines), transform=axes.transAxes, ha="center", va="center")
    return figure, ", ".join(lines)


def _axes_over_time(values: Picture, *, mel: bool) -> tuple[Figure, Axes]:
    rows, n_frames = values.shape
    figure = new_figure(_WIDTH, 3.0 if mel else 1.2 + min(1.8, max(0.4, 0.22 * rows)))
    axes = figure.subplots()
    axes.set_xlim(0, n_frames * SECONDS_PER_FRAME)
    axes.set_ylim((-0.5, rows - 0.5) if mel else (rows + 0.5, 0.5))
    axes.locator_params("y", integer=True, min_n_ticks=1, nbins=5)
    axes.spines[:].set_visible(True)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("mel bin" if mel else "item")
    return figure, axes


def draw_curve(values: Sequence[float], tolerance: float | None, decades: tuple[int, int]) -> Figure:
    """Draw differences by layer on a logarithmic scale, with a separate line for exact zeros below it.

    Values beyond the tolerance are crosses; values that are not finite are drawn at the top.
    """
    low, high = decades
    figure = new_figure(_WIDTH, 3.0)
    axes = figure.subplots()
    axes.set_yscale("symlog", linthresh=10.0**low, linscale=0.6)
    axes.set_ylim(0, 10.0**high)
    powers = range(low, high + 1, -(-(high - low) // 6))
    axes.set_yticks([0, *(10.0**power for power in powers)], ["exactly 0", *(f"1e{power:+03d}" for power in powers)])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.locator_params("x", integer=True, min_n_ticks=1)
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    if tolerance:
        axes.axhline(tolerance, color=INK, linestyle=(0, (5, 4)), linewidth=1)
        word, beside = f"tolerance {scientific(tolerance)}", axes.get_yaxis_transform()
        axes.text(1, tolerance, word, transform=beside, ha="right", va="bottom", fontsize=9)
    heights = [value if math.isfinite(value) else 10.0**high for value in values]
    within = [tolerance is None or value <= tolerance for value in values]
    axes.plot(heights, color=BLUE, alpha=0.55, linewidth=1, clip_on=False)
    for marker, colour, wanted in (("o", BLUE, True), ("x", RED, False)):
        layers = [layer for layer, is_within in enumerate(within) if is_within is wanted]
        axes.plot(layers, [heights[layer] for layer in layers], marker, color=colour, clip_on=False)
    return figure


# ---- words and numbers -----------------------------------------------------------------------------------------------


def scientific(number: float | None) -> str:
    """Format a number with two digits and an exponent, or an integer in full; NaN becomes ∞."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "∞"
    if number == int(number) and abs(number) < 1e6:
        return f"{int(number):,}"
    return f"{number:.1e}"


def curve_in_words(values: Sequence[float], tolerance: float | None) -> str:
    """Describe the curve in words: its caption, and a text for readers who cannot see it."""
    if not any(values):
        return f"exactly 0 after {'the one layer' if len(values) == 1 else f'all {len(values)} layers'}"
    broken = [layer for layer, value in enumerate(values) if not math.isfinite(value)]
    beyond = [layer for layer, value in enumerate(values) if tolerance is not None and not value <= tolerance]
    finite = {layer: value for layer, value in enumerate(values) if math.isfinite(value)}
    remarks = []
    if finite:
        layer = max(finite, key=lambda layer: finite[layer])
        remarks.append(f"at most {scientific(finite[layer])}, after layer {layer}")
    if beyond:
        remarks.append(f"first beyond the tolerance after layer {beyond[0]}")
    if broken:
        remarks.append(
            f"not finite from layer {broken[0]} on" if len(broken) > 1 else f"not finite at layer {broken[0]}"
        )
    return "; ".join(remarks)


def shared_decades(curves: Sequence[Sequence[float]], tolerances: Sequence[float | None]) -> tuple[int, int]:
    """Return two exponents of 10 whose range holds all positive values and tolerances, with room above for a label."""
    numbers = [*(value for curve in curves for value in curve), *(limit or 0.0 for limit in tolerances)]
    powers = [math.log10(number) for number in numbers if number > 0 and math.isfinite(number)]
    low = math.floor(min([-7.5, *powers]))
    return low, max(math.floor(max([-5.0, *powers])) + 1, low + 2)


def pooled(values: Picture, *, largest: bool = False) -> Picture:
    """Reduce a picture to MOST_COLUMNS columns: the mean of neighbours or, with `largest`, the largest of them."""
    group = -(-values.shape[1] // MOST_COLUMNS)
    if group <= 1:
        return values
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % group)), mode="edge")
    groups = padded.reshape(len(values), -1, group)
    return np.asarray(groups.max(2) if largest else groups.mean(2))
