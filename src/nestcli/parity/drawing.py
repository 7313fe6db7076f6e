"""Pictures for the page of a comparison: PNG files made with zlib alone, and SVG panels around them.

Lines and words take their colours from the page's style sheet, so that they follow its light or dark scheme.
Matplotlib would draw the same, but it is optional and this page is not.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[Any]
Stops = Sequence[tuple[int, int, int]]

# Lightness goes one way in each, so that they read in grey too.
FEATURES: Stops = ((8, 6, 28), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))
DIFFERENCE: Stops = ((238, 240, 243), (253, 187, 99), (227, 90, 46), (127, 0, 30))
MASK: Stops = ((222, 226, 231), (47, 109, 181))
NOT_FINITE = (0, 160, 140)

SECONDS_PER_FRAME = 0.01
MOST_COLUMNS = 600  # more than a panel has pixels

_WIDTH, _LEFT, _RIGHT, _TOP = 340, 56, 8, 6
_PLOT = _WIDTH - _LEFT - _RIGHT


def scientific(number: float | None) -> str:
    """Two digits and an exponent; whole numbers as they are; infinity for what is no number."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "∞"
    if number == int(number) and abs(number) < 1e6:
        return f"{int(number):,}"
    return f"{number:.1e}"


# ---- PNG -------------------------------------------------------------------------------------------------------------


def png(indices: npt.NDArray[np.uint8], palette: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of palette indices (rows, columns) and colours (n, 3), n up to 256."""
    rows, columns = indices.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)  # eight bits, palette, not interlaced
    lines = np.pad(indices, ((0, 0), (1, 0)))  # each line starts with its filter: none
    parts = {b"IHDR": header, b"PLTE": palette.tobytes(), b"IDAT": zlib.compress(lines.tobytes(), 9), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts.items())


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def palette_of(stops: Stops) -> npt.NDArray[np.uint8]:
    """255 colours from the first stop to the last, then the one of values that are not finite."""
    places = np.linspace(0, len(stops) - 1, 255)
    channels = [np.interp(places, np.arange(len(stops)), [stop[channel] for stop in stops]) for channel in range(3)]
    return np.vstack([np.stack(channels, 1).round(), NOT_FINITE]).astype(np.uint8)


def to_indices(values: Picture, low: float, high: float) -> npt.NDArray[np.uint8]:
    """Places of the values in a palette that goes from `low` to `high`."""
    finite = np.isfinite(values)
    share = (np.where(finite, values, low).astype(np.float64) - low) / ((high - low) or 1.0)
    return np.where(finite, np.clip(share * 254, 0, 254).round(), 255).astype(np.uint8)


def pooled(values: Picture, *, largest: bool = False) -> Picture:
    """At most MOST_COLUMNS columns: the mean of neighbours, or the largest, so that no difference gets lost."""
    group = -(-values.shape[1] // MOST_COLUMNS)
    if group <= 1:
        return values
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % group)), mode="edge")
    groups = padded.reshape(len(values), -1, group)
    return np.asarray(groups.max(2) if largest else groups.mean(2))


def _image(values: Picture, low: float, high: float, stops: Stops, place: tuple[float, float, float, float]) -> str:
    x, y, width, height = place
    address = base64.b64encode(png(to_indices(values, low, high), palette_of(stops))).decode()
    return (
        f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{address}"/>'
    )


# ---- panels ----------------------------------------------------------------------------------------------------------


def picture_panel(
    values: Picture,
    scale: tuple[float, float],
    stops: Stops,
    *,
    ends: tuple[str, str, str],
    mel: bool,
    description: str,
    n_frames: int,
) -> str:
    """Values (rows, columns) over time, with the colour scale below; `ends` words its low end, its high end, its unit.

    Rows are mel bins from the bottom, or utterances from the top.
    """
    height = _plot_height(len(values), mel=mel)
    image = _image(values[::-1] if mel else values, *scale, stops, (_LEFT, _TOP, _PLOT, height))
    y = _TOP + height + 42
    low, high, unit = ends
    at = _LEFT + 5.8 * len(low) + 8
    ramp = _image(np.arange(255)[None], 0, 254, stops, (at, y - 8, 70, 8))
    words = _text(_LEFT, y, low) + _text(at + 76, y, f"{high}  {unit}")
    return _svg(y + 6, description, image + _axes(len(values), n_frames, height, mel=mel) + ramp + words)


def empty_panel(words: Sequence[str], rows: int, n_frames: int, *, mel: bool) -> str:
    """A panel of the same size that says why it shows no picture."""
    height = _plot_height(rows, mel=mel)
    middle = _TOP + height / 2 - 7 * (len(words) - 1) + 4
    lines = [
        _text(_LEFT + _PLOT / 2, middle + 15 * number, line, "strong" if number == 0 else "", anchor="middle")
        for number, line in enumerate(words)
    ]
    axes = _axes(rows, n_frames, height, mel=mel)
    return _svg(_TOP + height + 48, ", ".join(words), axes + "".join(lines))


def curve_panel(label: str, values: Sequence[float], tolerance: float | None, decades: tuple[int, int]) -> str:
    """Differences by layer on a log scale; exact zeros stand on a line of their own below it."""
    low, high = decades
    height, zero = 128, _TOP + 150
    bottom = _TOP + height

    def x_of(layer: float) -> float:
        return _LEFT + _PLOT * (layer + 0.5) / len(values)

    def y_of(value: float) -> float:
        if value == 0:
            return zero
        power = math.log10(value) if math.isfinite(value) else high
        return _TOP + height * (high - power) / (high - low)

    parts = []
    for power in range(low, high + 1, -(-(high - low) // 6)):
        y = y_of(10.0**power)
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "grid") + _text(_LEFT - 6, y + 4, f"1e{power:+03d}", "end"))
    parts.append(_line(_LEFT, _TOP, _LEFT, bottom, "axis") + _line(_LEFT, zero, _WIDTH - _RIGHT, zero, "axis"))
    parts.append(_text(_LEFT - 6, zero + 4, "exactly 0", "end"))
    if tolerance:
        y = y_of(tolerance)
        word = f"tolerance {scientific(tolerance)}"
        parts.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "limit") + _text(_WIDTH - _RIGHT, y - 4, word, "end"))
    for layer in _whole_ticks(len(values)):
        parts.append(_text(x_of(layer), zero + 15, str(layer), anchor="middle"))
    parts.append(_text(_LEFT + _PLOT / 2, zero + 29, "layer", anchor="middle"))

    places = [(x_of(layer), y_of(value)) for layer, value in enumerate(values)]
    parts.append(f'<polyline class="curve" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
    allowed = math.inf if tolerance is None else tolerance
    beyond = [layer for layer, value in enumerate(values) if not value <= allowed]
    for layer, (x, y) in enumerate(places):
        if layer in beyond:
            parts.append(f'<path class="bad" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0-8l-8 8"/>')
        else:
            parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{3 if len(values) <= 24 else 2.2}"/>')
    return _svg(zero + 34, f"{label}: {curve_in_words(values, tolerance)}", "".join(parts))


def curve_in_words(values: Sequence[float], tolerance: float | None) -> str:
    """What the curve shows, for those who do not see it and as its caption."""
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
    """Powers of ten between which all positive values and tolerances lie, with room above for a word."""
    numbers = [*(value for curve in curves for value in curve), *(limit or 0.0 for limit in tolerances)]
    powers = [math.log10(number) for number in numbers if number > 0 and math.isfinite(number)]
    low = math.floor(min([-7.5, *powers]))
    return low, max(math.floor(max([-5.0, *powers])) + 1, low + 2)


def _plot_height(rows: int, *, mel: bool) -> float:
    return 130 if mel else min(130, max(28, 16 * rows))


def _axes(rows: int, n_frames: int, height: float, *, mel: bool) -> str:
    parts = [f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{_PLOT}" height="{height:g}"/>']
    bottom = _TOP + height
    for row in _whole_ticks(rows):
        share = (row + 0.5) / rows
        y = bottom - height * share if mel else _TOP + height * share
        parts.append(_text(_LEFT - 6, y + 4, str(row if mel else row + 1), "end"))
    seconds = n_frames * SECONDS_PER_FRAME
    steps = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
    step = next((step for step in steps if seconds / step <= 6), seconds or 1.0)
    for number in range(int(seconds / step + 1e-6) + 1):
        x = _LEFT + _PLOT * number * step / (seconds or 1.0)
        parts.append(_line(x, bottom, x, bottom + 3, "axis"))
        parts.append(_text(x, bottom + 14, f"{number * step:g}", anchor="middle"))
    parts.append(_text(_LEFT + _PLOT / 2, bottom + 27, "time (s)", anchor="middle"))
    middle = _TOP + height / 2
    name = "mel bin" if mel else "item"
    turned = f'transform="rotate(-90 12 {middle:g})"'
    parts.append(f'<text x="12" y="{middle:g}" text-anchor="middle" {turned}>{name}</text>')
    return "".join(parts)


def _whole_ticks(count: int) -> list[int]:
    step = next((step for step in (1, 2, 5, 10, 20, 50, 100) if count <= 8 * step), count)
    return list(range(0, count, step))


def _svg(height: float, description: str, content: str) -> str:
    words = escape(description)
    return f'<svg role="img" aria-label="{words}" viewBox="0 0 {_WIDTH} {height:g}">{content}</svg>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, kind: str = "", *, anchor: str = "") -> str:
    attributes = f' class="{kind}"' if kind else ""
    attributes += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(words)}</text>'
