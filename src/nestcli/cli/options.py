"""Options that several commands have, each written once."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestcli.cli import console


def amount(name: str, words: str, *, most: float = 1e6, least: float = 0.1, **more: Any) -> Any:
    """An option for a number with a fraction, which must lie between two bounds; `words` are its help."""
    return typer.Option(name, min=least, max=most, callback=console.finite, help=words, **more)


Patience = Annotated[
    float, amount("--patience", "Leave out a file that gives no answer for this long.", metavar="SECONDS")
]
BatchDuration = Annotated[float, amount("--batch-duration", "Seconds of audio in a batch, padding included.")]
