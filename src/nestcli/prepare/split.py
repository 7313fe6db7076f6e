"""Which utterances are for validation: a hash of a name decides, so that a growing corpus keeps its sides."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b


def for_validation(groups: Sequence[str | None], fraction: float) -> list[bool]:
    """Whether each utterance is for validation, given the group (speaker, path) that must stay together.

    About `fraction` of the groups are; at least one, and never all, where there are two. Without a group an
    utterance trains.
    """
    shares = {group: _share(group) for group in dict.fromkeys(groups) if group is not None}
    chosen = {group for group, share in shares.items() if share < fraction}
    if fraction > 0 and shares and not chosen:
        chosen = {min(shares, key=lambda group: shares[group])}
    if chosen and len(chosen) == len(set(groups)):
        chosen.remove(max(chosen, key=lambda group: shares[group]))
    return [group in chosen for group in groups]


def _share(group: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(blake2b(group.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64
