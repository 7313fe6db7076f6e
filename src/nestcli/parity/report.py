"""Report of a comparison: checks in sections, the first divergence, and its JSON.

A check holds our value, NeMo's value, the largest difference between them and the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

SECTIONS = (
    "config", "parameters", "preprocessor", "masking", "quantizer", "encoder", "decoder", "loss", "gradients",
    "training", "augmentation", "checkpoint",
)  # fmt: skip

ROUNDINGS = 10  # where rounding decides, the sides may differ by this many times our own rounding


@dataclass(frozen=True)
class Check:
    """One comparison; `where` names the first element at which the sides differ, if they do."""

    name: str
    passed: bool
    ours: Any
    nemo: Any
    difference: float | None = None
    tolerance: float | None = None
    where: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "name": self.name,
            "passed": self.passed,
            "ours": self.ours,
            "nemo": self.nemo,
            "difference": _finite(self.difference),
            "tolerance": self.tolerance,
        }
        return document | {key: getattr(self, key) for key in ("where", "note") if getattr(self, key) is not None}


@dataclass
class Section:
    """The checks of one part of the model; curves and pictures are only for the HTML page."""

    name: str
    checks: list[Check] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)  # label -> largest difference after each layer
    pictures: dict[str, npt.NDArray[Any]] = field(default_factory=dict)  # label -> (rows, columns)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def add(self, *checks: Check) -> None:
        self.checks.extend(checks)


@dataclass(frozen=True)
class KnownDifference:
    """An intentional difference between our default and NeMo."""

    name: str
    nemo: str  # NeMo's behaviour
    ours: str  # our behaviour
    switch: str | None  # the key that restores NeMo's behaviour, None without one
    shown: str | None = None  # the result of a small reproduction on both sides; None if it did not run
    reproduced: bool | None = None  # True if the result confirms `nemo` and `ours`; None if it did not run


@dataclass
class Report:
    """The result of a whole comparison."""

    config: str
    nemo_version: str
    live: bool
    sections: list[Section]
    known_differences: list[KnownDifference]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        reproduced = all(difference.reproduced is not False for difference in self.known_differences)
        return reproduced and all(section.passed for section in self.sections)

    @property
    def first_divergence(self) -> tuple[Section, Check] | None:
        """The first check that failed, in the order in which a batch passes through the sections."""
        for section in self.sections:
            for check in section.checks:
                if not check.passed:
                    return section, check
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "config": self.config,
            "nemo": {"version": self.nemo_version, "live": self.live},
            "sections": [
                {
                    "name": section.name,
                    "passed": section.passed,
                    "checks": [check.to_json() for check in section.checks],
                }
                for section in self.sections
            ],
            "known_differences": [vars(difference) for difference in self.known_differences],
            "notes": self.notes,
        }


# ---- checks ------------------------------------------------------------------------------------------------------


def equal(name: str, ours: Any, nemo: Any, *, note: str | None = None) -> Check:
    """Check that both plain values are equal; for two lists, name the first place where they differ."""
    if ours == nemo:
        return Check(name, True, ours, nemo, 0.0, 0.0, None, note)
    where = f"ours {ours!r}, NeMo's {nemo!r}"
    if isinstance(ours, list) and isinstance(nemo, list):
        parts = (place for place, (a, b) in enumerate(zip(ours, nemo, strict=False)) if a != b)
        place = next(parts, min(len(ours), len(nemo)))
        here, there = (side[place] if place < len(side) else "nothing" for side in (ours, nemo))
        where = f"first at place {place}: ours {here!r}, NeMo's {there!r}"
    return Check(name, False, ours, nemo, None, 0.0, where, note)


def same_entries(name: str, ours: Mapping[str, Any], nemo: Mapping[str, Any], *, note: str | None = None) -> Check:
    """Check that both sides have the same keys, order and values; the difference is the number of differing keys."""
    differing = [key for key in {**nemo, **ours} if key not in ours or key not in nemo or ours[key] != nemo[key]]
    where = None
    if differing:
        key = differing[0]
        where = f"{key}: ours {ours.get(key, 'is missing')}, NeMo's {nemo.get(key, 'is missing')}"
    elif list(ours) != list(nemo):
        place = next(place for place, (a, b) in enumerate(zip(ours, nemo, strict=True)) if a != b)
        where = f"order, place {place}: ours {list(ours)[place]}, NeMo's {list(nemo)[place]}"
    return Check(
        name, where is None, len(ours), len(nemo), float(max(len(differing), where is not None)), 0.0, where, note
    )


def same_elements(name: str, ours: Tensor, nemo: Tensor, *, note: str | None = None) -> Check:
    """Check that two tensors of masks or numbers are equal; show their sums, and the number of differing elements."""
    if ours.shape != nemo.shape:
        return close(name, ours, nemo, 0.0, note=note)
    differences = (ours.double() - nemo.double()).abs()
    count = int((differences > 0).sum())
    where = _first_beyond(differences, ours.double(), nemo.double(), 0.0) if count else None
    return Check(name, count == 0, float(ours.sum()), float(nemo.sum()), float(count), 0.0, where, note)


def close(
    name: str,
    ours: Tensor,
    nemo: Tensor,
    tolerance: float,
    *,
    relative: bool = False,
    rounding: Tensor | None = None,
    note: str | None = None,
) -> Check:
    """Check the largest difference of two tensors, absolute or as a share of NeMo's value; show the values there.

    `rounding` is how far our own numbers move when the input changes in its last bits; it has, or broadcasts to, their
    shape. Where ten times as much is more than the tolerance, it is the limit instead, and the difference is scaled to
    it.
    """
    if ours.shape != nemo.shape:
        shapes = tuple(ours.shape), tuple(nemo.shape)
        return Check(name, False, str(shapes[0]), str(shapes[1]), None, tolerance, "the shapes differ", note)
    if ours.numel() == 0:
        return Check(name, True, 0, 0, 0.0, tolerance, None, note)
    ours, nemo = ours.detach().double(), nemo.detach().double()
    differences = (ours - nemo).abs()
    if relative:
        differences = differences / nemo.abs().clamp_min(1e-30)
    if rounding is not None:
        differences = differences / (ROUNDINGS * rounding.double() / tolerance).clamp_min(1.0)
    same = (ours == nemo) | (ours.isnan() & nemo.isnan())
    differences = torch.where(same, 0.0, differences).nan_to_num(nan=math.inf)
    largest = int(differences.argmax())
    difference = float(differences.flatten()[largest])
    passed = difference <= tolerance
    where = None if passed else _first_beyond(differences, ours, nemo, tolerance)
    here, there = float(ours.flatten()[largest]), float(nemo.flatten()[largest])
    return Check(name, passed, here, there, difference, tolerance, where, note)


def close_in_norm(
    name: str, ours: Tensor, nemo: Tensor, tolerance: float, *, rounding: float = 0.0, note: str | None = None
) -> Check:
    """Check the L2 norm of the difference of two tensors as a share of NeMo's norm.

    `rounding` is the distance that our own tensor moves when the weights change in their last bits. If ten times this
    distance is more than the tolerance allows, it is the limit instead, and the share refers to the norm for which the
    tolerance allows that much.
    """
    if ours.shape != nemo.shape:
        return close(name, ours, nemo, tolerance, note=note)
    ours, nemo = ours.detach().double(), nemo.detach().double()
    norm = float(nemo.norm())
    distance = float((ours - nemo).norm())
    difference = distance / max(norm, ROUNDINGS * rounding / tolerance, 1e-300) if distance else 0.0
    passed = difference <= tolerance  # False for NaN too
    where = None
    if not passed:
        differences = (ours - nemo).abs().nan_to_num(nan=math.inf)
        where = _first_beyond(differences, ours, nemo, 0.5 * float(differences.max()))
    return Check(name, passed, float(ours.norm()), norm, difference, tolerance, where, note)


def worst(name: str, checks: list[Check], *, note: str | None = None) -> Check:
    """Combine many checks of one kind: the first that failed, or else the one with the largest difference."""
    failed = [check for check in checks if not check.passed]
    chosen = failed[0] if failed else max(checks, key=lambda check: check.difference or 0.0)
    where = chosen.name if chosen.where is None else f"{chosen.name}: {chosen.where}"
    count = f"{len(failed)} of {len(checks)} differ" if failed else f"the largest of {len(checks)}: {chosen.name}"
    return Check(
        name,
        not failed,
        chosen.ours,
        chosen.nemo,
        chosen.difference,
        chosen.tolerance,
        where if failed else None,
        f"{count}. {note}" if note else count,
    )


def _first_beyond(differences: Tensor, ours: Tensor, nemo: Tensor, tolerance: float) -> str:
    beyond = differences > tolerance
    place = [int(number) for number in beyond.nonzero()[0]]
    a, b = float(ours[tuple(place)]), float(nemo[tuple(place)])
    count = f"{int(beyond.sum())} of {beyond.numel()} elements differ"
    return f"first at element {place}: ours {a:.7g}, NeMo's {b:.7g}; {count}"


def _finite(number: float | None) -> float | None:
    return number if number is None or math.isfinite(number) else None
