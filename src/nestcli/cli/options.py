"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nestcli.cli import console


def amount(name: str, words: str, *, most: float = 1e6, least: float = 0.1, **more: Any) -> Any:
    """Define an option for a float between two bounds; `words` is its help text."""
    return typer.Option(name, min=least, max=most, callback=console.finite, help=words, **more)


Patience = Annotated[float, amount("--patience", "Skip a file that does not respond for this long.", metavar="SECONDS")]
BatchDuration = Annotated[
    float, amount("--batch-duration", "Seconds of audio per batch, including padding.", metavar="SECONDS")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 1 if any input is rejected.")]
