"""The largest batch of each bucket, found with few trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TOLERANCE = 0.05  # a batch that may be too small by this share is not looked into
_GROWTH = 8  # at most from one trial to the next: what one utterance takes says little about hundreds


@dataclass(frozen=True)
class Trial:
    """How a training step on `batch` utterances of `seconds` each ended.

    `used` is the share that the batch took of the memory left beside the model, None if it did not fit.
    """

    batch: int
    seconds: float
    used: float | None
    step_seconds: float | None = None
    peak: int = 0  # bytes

    @property
    def fits(self) -> bool:
        return self.used is not None


@dataclass
class Search:
    """Trials of a training step, and what follows from them for other batches.

    A batch fits if one fitted that was neither smaller nor shorter, and does not if one failed that was neither
    larger nor longer.
    """

    attempt: Callable[[int, float], Trial]
    trials: list[Trial] = field(default_factory=list)

    def largest(self, bins: Sequence[float], most: Sequence[int]) -> list[int]:
        """The largest batch for utterances as long as each bin, at most `most`; 0 where not even one fits.

        From the longest bin to the shortest, each search starts where the seconds of audio of the last one lead.
        """
        found, guess = [], 1
        for number in reversed(range(len(bins))):
            size = self._largest(bins[number], most[number], guess)
            found.append(size)
            if number:
                guess = int(size * bins[number] / bins[number - 1])
        return found[::-1]

    def _largest(self, seconds: float, most: int, guess: int) -> int:
        low = min(most, max((t.batch for t in self.trials if t.fits and t.seconds >= seconds), default=0))
        failed = [t.batch for t in self.trials if not t.fits and t.seconds <= seconds]
        high = min([most + 1, *failed])
        while high - low > max(1, TOLERANCE * low):
            guess = min(max(guess, low + 1), high - 1)
            trial = self.attempt(guess, seconds)
            self.trials.append(trial)
            if trial.used is None:
                high = guess
                guess = (low + high) // 2
                continue
            low = guess
            guess = int(min(low / max(trial.used, 1e-9), low * _GROWTH))
            if guess <= low * (1 + TOLERANCE):  # as full as it will get
                break
            guess = min(guess, max((low + high) // 2, low + 1)) if high <= most else guess
        return low
