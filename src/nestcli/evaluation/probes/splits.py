"""Splits of utterances into those that a probe is trained on and those that it is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestcli.errors import ConfigError

Indices = npt.NDArray[np.intp]

TEST_SHARE = 1 / 3
MOST_FOLDS = 10  # up to this many groups are left out one by one; of more, a third at a time


@dataclass(frozen=True)
class Split:
    """Places of the utterances to train on and to test on, and the seeds to use.

    `left_out` is the tested group, if it is a single one.
    """

    train: Indices
    test: Indices
    left_out: str | None = None
    seeds: tuple[int, ...] = (0,)


def splits(labels: Sequence[str], groups: Sequence[str] | None, seeds: int) -> list[Split]:
    """Return the splits. Without `groups`, one per seed with every class on both sides.

    With `groups`, no group is on both sides: up to ten groups are left out in turn, each with all seeds; of more, a
    third is drawn for each seed. Raises ConfigError if no class remains on both sides.
    """
    if groups is None:
        return [_stratified(np.asarray(labels), seed) for seed in range(seeds)]
    names = sorted(set(groups))
    if len(names) < 2:
        raise ConfigError(f"all utterances belong to one group, {names[0]!r}: use --split utterance.")
    where = np.asarray(groups)
    if len(names) <= MOST_FOLDS:
        chosen = [(name,) for name in names]
        seeds_of = [tuple(range(seeds))] * len(names)
    else:
        drawn = [np.random.default_rng(seed).permutation(names) for seed in range(seeds)]
        chosen = [tuple(order[: max(1, round(TEST_SHARE * len(names)))]) for order in drawn]
        seeds_of = [(seed,) for seed in range(seeds)]
    found = [_by_group(np.asarray(labels), where, *each) for each in zip(chosen, seeds_of, strict=True)]
    if any(not len(each.test) for each in found):
        raise ConfigError(
            "no class has utterances in several groups, so no class can be tested: use --split utterance."
        )
    return found


def _stratified(labels: npt.NDArray[np.str_], seed: int) -> Split:
    """Return a split that tests a third of every class, and at least one utterance of it."""
    rng = np.random.default_rng(seed)
    test = []
    for label in sorted(set(labels.tolist())):
        places = rng.permutation(np.flatnonzero(labels == label))
        test.append(places[: max(1, round(TEST_SHARE * len(places)))])
    chosen = np.sort(np.concatenate(test))
    return Split(np.setdiff1d(np.arange(len(labels)), chosen), chosen, seeds=(seed,))


def _by_group(
    labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_], left_out: Sequence[str], seeds: tuple[int, ...]
) -> Split:
    """Return a split that tests the utterances of the `left_out` groups, except classes that no other group has."""
    there = np.isin(groups, left_out)
    train = np.flatnonzero(~there)
    test = np.flatnonzero(there & np.isin(labels, labels[train]))
    return Split(train, test, left_out[0] if len(left_out) == 1 else None, seeds)
