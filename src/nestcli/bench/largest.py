"""Find the largest batch of each bucket with few trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TOLERANCE = 0.05  # stop when the batch is at most this share too small
_GROWTH = 8  # maximum growth from one trial to the next: the memory of one utterance does not predict that of hundreds


@dataclass(frozen=True)
class Trial:
    """The result of a training step on `batch` utterances of `seconds` each.

    `used` is the share of the memory beside the model that the batch took, None if it did not fit.
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
    """Trials of a training step, and the conclusions about other batches.

    A batch fits if a batch that was neither smaller nor shorter has fitted. It does not fit if a batch that was
    neither larger nor longer has failed.
    """

    attempt: Callable[[int, float], Trial]
    trials: list[Trial] = field(default_factory=list)

    def largest(self, bins: Sequence[float], most: Sequence[int]) -> list[int]:
        """Return the largest batch for utterances as long as each bin, at most `most`; 0 if not even one fits.

        Goes from the longest bin to the shortest. Each search starts with the seconds of audio that fitted last.
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
            if guess <= low * (1 + TOLERANCE):  # the memory is full
                break
            guess = min(guess, max((low + high) // 2, low + 1)) if high <= most else guess
        return low
