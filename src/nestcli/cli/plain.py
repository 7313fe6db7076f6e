"""Words of strangers on a terminal: what would move its cursor, colour it or turn its lines around is spelled out."""

from __future__ import annotations

import re

# Control characters but tab and newline, those that change the direction of writing or show nothing (joiners belong to
# letters), halves of characters, and line ends that only Unicode knows.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)
_LONGEST = 4000  # characters of a message


def shown(text: str) -> str:
    """The text as a terminal may have it."""
    return _ODD.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def message(text: str) -> str:
    """A message: not longer than a screen, and its second and later lines cannot pass for messages of their own."""
    cut = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return shown(cut).replace("\n", "\n  ")


def json_text(text: str) -> str:
    """A JSON document in which the same characters are escapes of JSON; it means the same."""
    return _ODD.sub(lambda found: "".join(f"\\u{unit:04x}" for unit in _units(found[0])), text)


def _units(letter: str) -> list[int]:
    pair = letter.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(pair[place : place + 2], "big") for place in range(0, len(pair), 2)]
