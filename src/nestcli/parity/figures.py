"""The figures of a comparison's page: differences layer by layer, and features and masks of both sides.

Every function returns HTML in which all text from the report is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from nestcli.parity.drawing import (
    DIFFERENCE,
    FEATURES,
    MASK,
    SECONDS_PER_FRAME,
    Picture,
    curve_in_words,
    curve_panel,
    empty_panel,
    picture_panel,
    pooled,
    scientific,
    shared_decades,
)
from nestcli.parity.report import Section


def curves_figure(section: Section) -> str:
    """Return a figure of the section's differences by layer, with their tolerance."""
    limits = {label: _limit(section, label) for label in section.curves}
    decades = shared_decades(list(section.curves.values()), list(limits.values()))
    panels = [
        _panel(label, curve_in_words(values, limits[label]), curve_panel(label, values, limits[label], decades))
        for label, values in section.curves.items()
        if values
    ]
    caption = (
        "Largest difference between our output and NeMo's after each layer, on a logarithmic scale. "
        "A dot on the lowest line means that both are equal; a cross means beyond the tolerance."
    )
    return _figure(f"{section.name.capitalize()}, layer by layer", caption, panels)


def _limit(section: Section, label: str) -> float | None:
    """Return the tolerance of the checks behind a curve."""
    limits = (check.tolerance for check in section.checks if check.name.startswith(f"{label}: ") and check.tolerance)
    return next(limits, None)


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
        scale = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        ends = (f"{scale[0]:.1f}", f"{scale[1]:.1f}", "standard deviations")
    panels = []
    for side, values in named.items():
        what = f"{side}, {label}" if label else side
        n_bad = int((~np.isfinite(values)).sum())
        remark = f"not finite: {n_bad:,} of {values.size:,}" if n_bad else ""
        description = f"{what}: {'features' if mel else 'masks'}, {values.shape[0]} rows, {values.shape[1]} frames"
        drawn = picture_panel(
            pooled(values),
            scale,
            FEATURES if mel else MASK,
            ends=ends,
            mel=mel,
            description=description,
            n_frames=values.shape[1],
        )
        panels.append(_panel(what, remark, drawn))
    return [*panels, _difference(label, named["ours"], named["NeMo"], mel=mel)]


def _difference(label: str, ours: Picture, nemo: Picture, *, mel: bool) -> str:
    title = f"difference, {label}" if label else "difference"
    if ours.shape != nemo.shape:
        words = ["the shapes differ", f"ours {ours.shape}, NeMo's {nemo.shape}"]
        return _panel(title, "", empty_panel(words, len(nemo), nemo.shape[1], mel=mel))
    with np.errstate(invalid="ignore"):
        differences = np.where((ours == nemo) | (np.isnan(ours) & np.isnan(nemo)), 0.0, np.abs(ours - nemo))
    rows, n_frames = differences.shape
    n_differing = int((differences != 0).sum())
    if not n_differing:
        words = ["identical", f"all {differences.size:,} values are equal"]
        return _panel(title, "", empty_panel(words, rows, n_frames, mel=mel))
    largest = float(differences[np.isfinite(differences)].max(initial=0.0)) or 1.0
    share = f"{n_differing:,} of {differences.size:,} values differ"
    first = int(np.flatnonzero((differences != 0).any(0))[0]) * SECONDS_PER_FRAME
    drawn = picture_panel(
        pooled(differences, largest=True),
        (0.0, largest),
        DIFFERENCE,
        ends=("0", scientific(largest), "") if mel else ("same", "not the same", ""),
        mel=mel,
        description=f"{title}: {share}, the largest by {scientific(largest)}, from {first:.2f} s on",
        n_frames=n_frames,
    )
    return _panel(title, share, drawn)


def _is_mask(values: Picture) -> bool:
    return values.dtype.kind in "bui"


def _panel(title: str, remark: str, drawn: str) -> str:
    remark = f" <span>{escape(remark)}</span>" if remark else ""
    return f"<figure><figcaption><b>{escape(title)}</b>{remark}</figcaption>{drawn}</figure>"


def _figure(heading: str, caption: str, panels: Sequence[str]) -> str:
    if not panels:
        return ""
    return (
        f"<section>\n<h2>{escape(heading)}</h2>\n<p>{escape(caption)}</p>\n"
        f'<div class="panels">\n{chr(10).join(panels)}\n</div>\n</section>'
    )
