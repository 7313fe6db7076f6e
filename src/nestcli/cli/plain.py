"""Escape control characters in untrusted text, which could move a terminal's cursor, colour it or reverse its lines."""

from __future__ import annotations

import re

# Control characters except tab and newline, characters that change the writing direction or are invisible (joiners are
# kept: they belong to letters), surrogates, and Unicode line separators.
_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)
_LONGEST = 4000  # characters in a message


def shown(text: str) -> str:
    """Return the text with unsafe characters escaped for a terminal."""
    return _ODD.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def message(text: str) -> str:
    """Return a message, escaped and shortened, with later lines indented so that they do not look like new messages."""
    cut = text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return shown(cut).replace("\n", "\n  ")


def json_text(text: str) -> str:
    """Return an equivalent JSON document in which the same characters are JSON escapes."""
    return _ODD.sub(lambda found: "".join(f"\\u{unit:04x}" for unit in _units(found[0])), text)


def _units(letter: str) -> list[int]:
    pair = letter.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(pair[place : place + 2], "big") for place in range(0, len(pair), 2)]
