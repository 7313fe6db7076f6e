"""`nest demo`: the whole workflow on speech that it makes itself."""

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
        amount("--minutes", "Minutes of speech to make.", least=4.0, most=1440.0),
    ] = 12.0,
) -> None:
    """The whole way on speech that it makes itself: prepare, augment, pretrain for minutes, compare, probe.

    DIR/index.html shows what came of it.
    """
    console.note("loading ...")

    from nestcli.demo.tour import take_tour

    with _guide() as guide:
        results = take_tour(out, overrides or [], guide, minutes=minutes)
    _show(results)


class _TerminalGuide:
    """Chapters as headings, a progress bar for each, the training display for the training."""

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
        f"\nThe loss fell from {learned.even_loss:.2f}, knowing nothing, to {learned.last_loss:.2f}; guessing by how "
        f"often each token comes gives {learned.frequency_loss:.2f}. {learned.last_accuracy:.1%} of the masked tokens "
        f"are predicted right, by frequency {learned.frequency_accuracy:.1%}."
    )
    for name, (mean, _, clear) in results.probe.margins.items():
        console.note(f"Who speaks: {100 * mean:+.1f} points beside {name}{'' if clear else ', no clear lead'}.")
    console.note("So short a training knows little yet: docs/probe.md, docs/training.md.")
    for what, where in (("PAGE OF RESULTS", results.page), *results.files()):
        console.note(f"  {what:21}  {where}")
    console.note(
        "\nNext, your own speech:\n  nest prepare-data FOLDER --out data && nest pretrain small ... (see README.md)"
    )
