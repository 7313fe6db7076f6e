"""Choose the lines of a manifest that take part in a probe, their labels, and the groups that stay together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nestcli.data.manifest import Manifest
from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.probes.options import CLASSIFY, ProbeOptions

MOST_CLASSES = 2_000
EVERY_CLASS = "utterances of every class"
_SPEAKERS = (
    " Prepare again with nest prepare-data --speaker-pattern, such as '([^/]+)/[^/]+$' for the folder above each file."
)


@dataclass(frozen=True)
class Asked:
    """The lines that take part, their labels, and the groups that must stay together, if any."""

    lines: list[int]
    labels: list[str]
    groups: list[str] | None
    split: str
    notes: tuple[str, ...]

    def kept(self, keep: np.ndarray) -> Asked:
        """Return it without the lines that could not be read. Raises DataError if none is left."""
        places = np.flatnonzero(keep)
        if not len(places):
            raise DataError("none of the utterances could be read; run nest prepare-data to see why.")
        groups = None if self.groups is None else [self.groups[place] for place in places]
        lines, labels = [self.lines[place] for place in places], [self.labels[place] for place in places]
        return replace(self, lines=lines, labels=labels, groups=groups)


def labelled(manifest: Manifest, options: ProbeOptions) -> Asked:
    """Return the lines that have the label. Raises ConfigError if none has it, or `--split` names a missing field."""
    rows = [manifest.row(line) for line in range(len(manifest))]
    lines = [line for line, row in enumerate(rows) if row.get(options.label) not in (None, "")]
    if not lines:
        known = sorted({key for row in rows for key in row} - {"audio_filepath", "duration", "offset"})
        fields, remedy = ", ".join(known) or "none", _SPEAKERS if options.label == "speaker" else ""
        raise ConfigError(f"--label {options.label}: no line has this field. Fields: {fields}.{remedy}")
    notes = []
    if unlabelled := len(rows) - len(lines):
        notes.append(f"{unlabelled:,} of {len(rows):,} lines have no {options.label}: left out")
    labels = [str(rows[line][options.label]) for line in lines]
    return _grouped(rows, lines, labels, options, notes)


def of_classes(manifest: Manifest, options: ProbeOptions) -> Asked:
    """Return the lines whose label is a class with enough utterances.

    Raises DataError if the number of classes does not suit a probe, and what `labelled` raises.
    """
    rows = [manifest.row(line) for line in range(len(manifest))]
    every = labelled(manifest, replace(options, split="utterance"))
    counts = Counter(every.labels)
    wanted = {label for label, count in counts.items() if count >= options.min_count}
    if len(wanted) < 2 or len(wanted) > MOST_CLASSES:
        raise DataError(
            f"--label {options.label} has {len(wanted):,} classes with at least {options.min_count} utterances; "
            f"a probe needs 2 to {MOST_CLASSES:,}."
        )
    notes = list(every.notes)
    if left := len(counts) - len(wanted):
        notes.insert(0, f"{left:,} of {len(counts):,} classes have fewer than {options.min_count} utterances: left out")
    chosen = [(line, label) for line, label in zip(every.lines, every.labels, strict=True) if label in wanted]
    lines, labels = [line for line, _ in chosen], [label for _, label in chosen]
    return _grouped(rows, lines, labels, options, notes)


def _grouped(
    rows: Sequence[dict[str, Any]], lines: list[int], labels: list[str], options: ProbeOptions, notes: list[str]
) -> Asked:
    groups, split, why = _groups([rows[line] for line in lines], labels, options)
    return Asked(lines, labels, groups, split, (*notes, *why))


def _groups(
    rows: Sequence[dict[str, Any]], labels: Sequence[str], options: ProbeOptions
) -> tuple[list[str] | None, str, list[str]]:
    """Return the groups that must not be on both sides, a description of the split, and notes.

    With `auto`, groups are speakers, unless the label is the speaker, a line has no speaker, or every class has only
    one.
    """
    key = options.split
    if key == "utterance" or (key == "auto" and options.label == "speaker"):
        return None, EVERY_CLASS, []
    key = "speaker" if key == "auto" else key
    values = [row.get(key) for row in rows]
    if any(value in (None, "") for value in values):
        if options.split == "auto":
            return None, EVERY_CLASS, ["not every line names its speaker: speakers may be on both sides"]
        raise ConfigError(f"--split {key}: {sum(value in (None, '') for value in values):,} lines lack this field.")
    groups = [str(value) for value in values]
    if options.split == "auto" and options.task == CLASSIFY and _each_has_one(labels, groups):
        return None, EVERY_CLASS, [f"every {options.label} has one {key} only: speakers are on both sides"]
    return groups, f"no {key} on both sides", []


def _each_has_one(labels: Sequence[str], groups: Sequence[str]) -> bool:
    of_label: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        of_label.setdefault(label, set()).add(group)
    return all(len(found) == 1 for found in of_label.values())
