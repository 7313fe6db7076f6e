"""Options of `nest prepare-data`, and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nestcli.audio.load import RATES
from nestcli.errors import DataError
from nestcli.jobs.patience import PATIENCE
from nestcli.prepare.inputs import Item
from nestcli.prepare.select import MAX_CLIPPED

VAL_FRACTION = {"speech": 0.05, "noise": 0.0}


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """Options of a preparation; durations in seconds, None for no limit; `max_clipped` as a share of the samples.

    `val_fraction` None means 0.05 for speech and 0 for noise. `jobs` None means one process per core; `ray` is the
    address of a Ray cluster to use instead. `channel` applies to files whose manifest chooses none; None averages all
    channels. `sample_rate` (Hz) is the rate of converted files and shards. A file that does not respond within
    `patience` seconds is skipped.
    """

    kind: Literal["speech", "noise"] = "speech"
    val_fraction: float | None = None
    split_by: Literal["utterance", "speaker"] = "utterance"
    speaker_pattern: str | None = None
    min_duration: float | None = None
    max_duration: float | None = None
    max_clipped: float = MAX_CLIPPED
    segment: float | None = None
    convert: bool = False
    channel: int | None = None
    sample_rate: int = 16000
    shards: int | None = None
    shard_format: Literal["nemo-tar", "shar"] = "nemo-tar"
    jobs: int | None = None
    ray: str | None = None
    patience: float = PATIENCE


def checked_fraction(options: PrepareOptions) -> float:
    """Check the options and return the share of validation. Raises DataError for an impossible value."""
    fraction = VAL_FRACTION[options.kind] if options.val_fraction is None else options.val_fraction
    if not 0 <= fraction < 1:
        raise DataError(f"a validation share of {fraction:g} is not possible; give 0 or more, and less than 1")
    low, high = options.min_duration or 0.0, options.max_duration
    if not math.isfinite(low) or (high is not None and not low <= high):
        raise DataError(f"no duration lies between {low:g} s and {high} s; raise the maximum")
    if not 0 <= options.max_clipped <= 1:
        raise DataError(
            f"a share of {options.max_clipped:g} clipped samples is not possible; give --max-clipped 0 to 1"
        )
    if options.segment is not None and not 0 < options.segment < math.inf:
        raise DataError(f"pieces of {options.segment:g} s are not possible; give --segment more than 0")
    if not RATES[0] <= options.sample_rate <= RATES[1]:
        raise DataError(
            f"a sample rate must be from {RATES[0]} to {RATES[1]} Hz, not {options.sample_rate}; "
            "give --sample-rate 16000"
        )
    if options.channel is not None and options.channel < 0:
        raise DataError(f"channel {options.channel} does not exist; the first is 0")
    if not options.patience > 0:
        raise DataError(f"{options.patience:g} s is too short for any file; give --patience more than 0")
    if options.shards is not None and options.shards < 1:
        raise DataError(f"{options.shards} shards are not possible; give 1 or more")
    if options.jobs is not None and options.jobs < 1:
        raise DataError(f"{options.jobs} jobs are not possible; give 1 or more")
    return fraction


def speaker_finder(pattern: str | None) -> Callable[[Item], str | None]:
    """Return a function that finds an item's speaker: by the pattern in its path, else from its manifest.

    Raises DataError for an invalid pattern.
    """
    if pattern is None:
        return lambda item: item.speaker or None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"the speaker pattern {pattern!r} must be a valid regular expression: {error}") from None
    if not compiled.groups:
        raise DataError(f"the speaker pattern {pattern!r} has no group; put ( ) around the speaker's part of it")
    group = "speaker" if "speaker" in compiled.groupindex else 1

    def find(item: Item) -> str | None:
        found = compiled.search(item.path)
        return (found[group] if found else None) or item.speaker or None

    return find
