"""`nest demo`: run the whole workflow on synthetic speech."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestcli.cli import console
from nestcli.cli.options import amount

if TYPE_CHECKING:
    from nestcli.demo.results import Results


def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Overrides of the demo preset.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the results.")] = Path("nest_demo"),
    minutes: Annotated[
        float,
        amount("--minutes", "Length of the synthetic speech.", least=4.0, most=1440.0, metavar="MINUTES"),
    ] = 12.0,
) -> None:
    """Run the whole workflow on synthetic speech.

    Synthesizes speech and noise, then runs the steps of prepare-data, augment, pretrain (for a few minutes), compare
    and probe. DIR/index.html shows the results.
    """
    console.note("loading ...")

    from nestcli.demo.tour import take_tour

    with _guide() as guide:
        results = take_tour(out, overrides or [], guide, minutes=minutes)
    _show(results)


class _TerminalGuide:
    """Prints each chapter's heading and progress bar, and the training display during training."""

    def __init__(self) -> None:
        self._bar = ExitStack()
        self._advance: console.Advance | None = None

    def chapter(self, title: str) -> None:
        self.close()
        console.note(f"\n{title}")
        self._advance = None

    def progress(self, done: int, total: int) -> None:
        if self._advance is None:
            self._advance = self._bar.enter_context(console.progress("  "))
        self._advance(done, total)

    def display(self) -> console.TrainingDisplay:
        return console.TrainingDisplay(lines_every=10.0)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def _guide() -> Iterator[_TerminalGuide]:
    guide = _TerminalGuide()
    try:
        yield guide
    finally:
        guide.close()


def _show(results: Results) -> None:
    learned = results.learned
    console.note(
        f"\nThe loss fell from {learned.even_loss:.2f} (a uniform guess) to {learned.last_loss:.2f}; guessing by token "
        f"frequency gives {learned.frequency_loss:.2f}. {learned.last_accuracy:.1%} of the masked tokens are predicted "
        f"correctly; guessing by frequency gives {learned.frequency_accuracy:.1%}."
    )
    for name, (mean, _, clear) in results.probe.margins.items():
        lead = "" if clear else ", not a clear lead"
        console.note(f"Speaker probe: {100 * mean:+.1f} points compared with {name}{lead}.")
    console.note(
        "Speaker probe, utterances named correctly: the reference encoder that comes with nest "
        f"{results.reference.mean:.1%}, this one {results.probe.best('pretrained').mean:.1%}, "
        f"log-mel {results.probe.best('log-mel').mean:.1%}."
    )
    console.note("Such a short training learns little: see docs/probe.md and docs/training.md.")
    for what, where in (("RESULTS", results.page), *results.files()):
        console.note(f"  {what:21}  {where}")
    console.note(
        "\nNext, use your own speech:\n  nest prepare-data FOLDER --out data && nest pretrain small ... (see README.md)"
    )
