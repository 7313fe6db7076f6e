"""Settings and inputs of the property tests: text of every kind, JSON, and damaged files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

VARIABLE = "NEST_FUZZ_EXAMPLES"


def bounded(examples: int) -> Callable[[Any], Any]:
    """Use the same examples on every run and machine; with $NEST_FUZZ_EXAMPLES, that many new ones each time."""
    more = os.environ.get(VARIABLE)
    phases = [phase for phase in Phase if phase is not Phase.explain]  # it doubles the time of a failure
    unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=phases)
    if more:
        return settings(unhurried, max_examples=int(more))
    return settings(unhurried, max_examples=examples, derandomize=True, database=None)


# ---- text and JSON ---------------------------------------------------------------------------------------------


def joined_pairs(text: str) -> str:
    """Join the two halves of a surrogate pair: side by side, they are one letter in JSON."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


# Lone surrogates are in it: that is how names that are not UTF-8 arrive.
any_text = st.text(st.characters(), max_size=20).map(joined_pairs)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
scalars = st.none() | st.booleans() | numbers | any_text
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6
)


def places_in(value: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path to each value in a JSON value: its keys and numbers, the innermost last."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (key,)
        for path in places_in(inner):
            yield key, *path


@st.composite
def altered(draw: st.DrawFn, whole: Any, *likely: Any) -> Any:
    """Draw a JSON value in which one to three values are removed, or replaced by likely or arbitrary ones."""
    whole = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([*places_in(whole)] or [(None,)]))
        parent = whole
        for key in way:
            parent = parent[key]
        if isinstance(parent, dict | list) and len(parent):
            if draw(st.booleans()):
                parent[last] = copy.deepcopy(draw(st.sampled_from(likely) | json_values if likely else json_values))
            elif draw(st.booleans()):
                del parent[last]
    return whole


def one_line(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


# ---- damage ----------------------------------------------------------------------------------------------------

_SNIPPETS = (
    b"\0", b"\xff", b"\xc3", b"\n", b"\r", b" ", b"{", b"}", b"[" * 50, b'"',
    b",", b":", b"-1", b"1e999", b"NaN", b"null",
    b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf", b"../", b"${", b"&a ", b"*a", b"!!", b"? ", b"<<: ", b"- ", b"\xff" * 8,
    b"\x7f\xff\xff\xff", b"PK\x01\x02",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, places: Sequence[tuple[int, int]] = ()) -> bytes:
    """Draw a file with one to three changes: flipped bits, other bytes, pieces added, removed or doubled, a cut end.

    Most changes fall into one of `places` (from, to): headers are what decides, and are small beside what they head.
    """
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        first, last = draw(st.sampled_from([*places, *places, (0, len(whole))] if places else [(0, len(whole))]))
        at = min(draw(st.integers(first, max(first, last - 1))), max(0, len(data) - 1))
        length = draw(st.integers(1, 40))
        match draw(st.sampled_from(["flip", "set", "put", "take", "double", "cut"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "put":
                data[at:at] = draw(st.sampled_from(_SNIPPETS) | st.binary(max_size=8))
            case "take":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
    return bytes(data)
