"""The order in which an epoch goes through a corpus: shuffled, near to its shards, or mixed of several data sets.

Everything is computed from (seed, epoch) for the whole epoch, so any place of any epoch can be gone to at once. An
item is a line of the corpus; one that comes again in the same epoch, because a small data set is drawn from often, is
counted on: `item % n_lines` is its line, `item // n_lines` how often it came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Items = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixing:
    """How data sets take turns: with `shares` at random, or, without, each once in every round.

    `length` is the number of items in an epoch. Source: NeMo `ConcatDataset`.
    """

    shares: tuple[float, ...] | None
    length: int
    seed: int = 0

    def parts(self, n_parts: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        """The data set of every place in an epoch."""
        if self.shares is None:
            return np.arange(self.length) % n_parts
        rng = np.random.default_rng((seed, epoch, 1 + self.seed))
        return rng.choice(n_parts, size=self.length, p=self.shares)


def temperature_shares(sizes: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Shares in proportion to size^(1/temperature): 1 keeps the sizes, a high one draws from all alike."""
    weights = np.power(np.array(sizes) / np.sum(sizes), 1 / temperature)
    return tuple((weights / weights.sum()).tolist())


@dataclass(frozen=True, eq=False)
class Order:
    """The items of each epoch.

    `part_of` and `shard_of` tell the data set and the tar of every line, -1 for a loose file. Lines of shards are
    shuffled by shards, and then by at most `window` places, so that few shards are read at a time.
    """

    part_of: npt.NDArray[np.int16]
    shard_of: npt.NDArray[np.int32]
    shuffle: Literal["lines", "shards"] | None
    window: int
    seed: int
    mixing: Mixing | None = None

    def items(self, epoch: int) -> Items:
        """The items of an epoch in their order."""
        if self.mixing is None:
            return self._shuffled(np.arange(len(self.part_of)), (self.seed, epoch))
        n_parts = int(self.part_of.max()) + 1
        parts = self.mixing.parts(n_parts, self.seed, epoch)
        items = np.empty(len(parts), np.int64)
        for part in range(n_parts):
            places = np.flatnonzero(parts == part)
            items[places] = self._passes(part, len(places), epoch)
        return items

    def _passes(self, part: int, count: int, epoch: int) -> Items:
        """`count` items of one data set, in as many passes through it as that takes."""
        lines = np.flatnonzero(self.part_of == part)
        n_passes = -(-count // len(lines))
        passes = [
            self._shuffled(lines, (self.seed, epoch, part, number)) + number * len(self.part_of)
            for number in range(n_passes)
        ]
        return np.concatenate([np.empty(0, np.int64), *passes])[:count]

    def _shuffled(self, lines: Items, key: tuple[int, ...]) -> Items:
        if self.shuffle is None:
            return lines
        rng = np.random.default_rng(key)
        if self.shuffle == "lines":
            return rng.permutation(lines)
        shards = self.shard_of[lines]
        place_of_shard = rng.permutation(int(shards.max()) + 2)  # the last is for loose files
        near = lines[np.argsort(place_of_shard[shards], kind="stable")]
        return near[np.argsort(np.arange(len(near)) + rng.uniform(0, self.window, len(near)), kind="stable")]
