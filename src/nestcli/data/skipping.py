"""Utterances that cannot be read while training goes on: told once, counted, and too much when they are many."""

from __future__ import annotations

from collections.abc import Callable

from nestcli.data.batch import Skipped
from nestcli.errors import DataError

_JUDGED_FROM = 100  # utterances; below, one rotten file is a large share


class SkipCounter:
    """Counts what was left out. `tell` hears of every line once."""

    def __init__(self, max_share: float, tell: Callable[[str], None]) -> None:
        self.max_share, self.tell = max_share, tell
        self.skipped = self.read = 0
        self._told: set[str] = set()

    def add(self, n_read: int, skipped: tuple[Skipped, ...]) -> None:
        """Count a batch. Raises DataError when more than `max_share` of what was asked for cannot be read."""
        self.read += n_read
        self.skipped += len(skipped)
        for each in skipped:
            if each.line not in self._told:
                self._told.add(each.line)
                self.tell(f"left out: {each.why}")
        asked = self.read + self.skipped
        if asked >= _JUDGED_FROM and self.skipped > self.max_share * asked:
            raise DataError(
                f"{self.skipped} of {asked} utterances could not be read, more than the share of {self.max_share:g} "
                f"that model.train_ds.max_failed_share allows. The last: {skipped[-1].why}"
            )
