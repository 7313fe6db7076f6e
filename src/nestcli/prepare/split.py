"""Choose the utterances for validation by a hash of a name, so that utterances keep their side as a corpus grows."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b


def for_validation(groups: Sequence[str | None], fraction: float) -> list[bool]:
    """Return True for each utterance that goes to validation, given the groups (speaker, path) to keep together.

    About `fraction` of the groups go to validation: at least one, but never all, if there are two or more. Utterances
    without a group go to training.
    """
    shares = {group: _share(group) for group in dict.fromkeys(groups) if group is not None}
    chosen = {group for group, share in shares.items() if share < fraction}
    if fraction > 0 and shares and not chosen:
        chosen = {min(shares, key=lambda group: shares[group])}
    if chosen and len(chosen) == len(set(groups)):
        chosen.remove(max(chosen, key=lambda group: shares[group]))
    return [group in chosen for group in groups]


def _share(group: str) -> float:
    """Return a number in [0, 1) that depends only on the name."""
    return int.from_bytes(blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64
