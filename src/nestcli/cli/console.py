"""All output of the commands. Only this module uses Rich, and it imports Rich when first needed.

Results that a script may read go to stdout; messages, progress bars and logs go to stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import typer

from nestcli.cli import plain
from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # set by launchers to a process' rank
_WIDE = 125  # columns
_WORDS = 10  # minimum width of a text column in a table, in characters


class Advance(Protocol):
    """A progress callback: called with the items done, the total, and the name of the current item if it has one."""

    def __call__(self, done: int, total: int, doing: str = "") -> None: ...


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def error(message: str) -> None:
    """Print an error to stderr unchanged; markup in it is not interpreted."""
    print(f"error: {plain.message(message)}", file=sys.stderr)


def trace(text: str) -> None:
    """Print a traceback to stderr."""
    print(plain.shown(text), file=sys.stderr)


def note(message: str) -> None:
    """Print a line for the user to stderr. In a run of several processes, only the first one prints."""
    if is_first_process():
        print(plain.message(message), file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Return True if this process is rank 0 of a distributed run, or not part of one."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)


def check_ranks() -> None:
    """Raise ConfigError if a rank variable is not a number: importing Lightning would fail with an internal error."""
    for name in _RANKS:
        text = os.environ.get(name, "0")
        if not text.isdecimal():
            raise ConfigError(
                f"the environment variable {name} is {text[:100]!r}, but must be the rank of a process. Unset it."
            )


def line(text: str) -> None:
    """Print a line of a command's result to stdout."""
    print(plain.shown(text))


def emit_json(document: Any) -> None:
    """Print the JSON document of a `--json` call to stdout, in ASCII if stdout cannot encode its characters."""
    text = json.dumps(document, ensure_ascii=False, indent=2)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    print(plain.json_text(text))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, to_stderr: bool = False) -> None:
    """Print a table; columns whose name starts with '>' are aligned to the right.

    If the terminal is too narrow to keep every number on one line, each row is printed as several lines instead.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=to_stderr, highlight=False, markup=False)
    given = ([plain.shown(str(cell)) for cell in row] for row in rows)
    shown = [row + [""] * (len(columns) - len(row)) for row in given]
    if _least_width(columns, shown) > console.width:
        console.print(_as_lines(title, columns, shown), soft_wrap=True)
        return
    drawn = Table(title=plain.shown(title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        drawn.add_column(
            plain.shown(column.lstrip(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in shown:
        drawn.add_row(*row)
    console.print(drawn)


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return the minimum width, in columns, of a table in which text wraps but numbers do not."""
    longest = (max((len(row[place]) for row in rows), default=0) for place in range(len(columns)))
    numbers = (column.startswith(">") for column in columns)
    return sum(3 + (each if number else min(each, _WORDS)) for each, number in zip(longest, numbers, strict=True))


def _as_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    names = [plain.shown(column.lstrip(">")) for column in columns]
    blocks = [
        "\n".join([row[0], *(f"  {name}: {cell}" for name, cell in zip(names[1:], row[1:], strict=True) if cell)])
        for row in rows
    ]
    return "\n".join([plain.shown(title), *blocks])


def histogram(title: str, values: Mapping[str, float], width: int = 30) -> None:
    """Print a bar for each label, omitting empty bars at both ends."""
    labels = list(values)
    filled = [number for number, value in enumerate(values.values()) if value]
    if not filled:
        return
    highest = max(values.values())
    print(f"  {title}")
    for label in labels[filled[0] : filled[-1] + 1]:
        bar = "#" * min(width, math.ceil(width * values[label] / highest))
        print(f"  {'to ' + label:>8}  {bar:<{width}}  {values[label]:,.4g}")
    print()


def finite(value: Any) -> Any:
    """Return the number or numbers of an option if all are finite: bounds let `nan` pass. Raises BadParameter."""
    for each in value if isinstance(value, list) else [value]:
        if each is not None and not math.isfinite(each):
            raise typer.BadParameter(f"{each} must be a finite number.")
    return value


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """Show a progress bar on stderr; draw nothing if stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(description, total=None)

        def advance(done: int, total: int, doing: str = "") -> None:
            doing = plain.shown(doing).replace("[", r"\[")
            bar.update(task, completed=done, total=total, description=f"{description} {doing}".rstrip())

        yield advance


class TrainingDisplay:
    """Shows a training run: a live line on a terminal; elsewhere (a job's log) a line of text now and then."""

    def __init__(self, lines_every: float = 15.0, *, bar: bool = True) -> None:
        self._lines_every = lines_every  # seconds
        self._draws = bar and sys.stderr.isatty()
        self._last_line = float("-inf")
        self._bar: Any = None
        self._task: Any = None

    def step(self, report: Any) -> None:
        if not is_first_process():
            return
        if self._draws:
            self._draw(report)
        elif time.monotonic() - self._last_line >= self._lines_every or report.step == report.steps:
            self._last_line = time.monotonic()
            note(f"step {report.step}{f'/{report.steps}' if report.steps else ''}  {_numbers(report)}")

    def validation(self, step: int, loss: float, accuracy: float) -> None:
        self.note(f"step {step}  validation: loss {loss:.3f}, masked-token accuracy {accuracy:.1%}")

    def note(self, message: str) -> None:
        if self._bar is not None:
            self._bar.console.print(plain.shown(message), markup=False)
        else:
            note(message)

    def finished(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, report: Any) -> None:
        if self._bar is None:
            self._bar = _training_bar(report.steps)
            self._task = self._bar.add_task("", total=report.steps, n="")
            self._bar.start()
        self._bar.update(self._task, completed=report.step, n=_numbers(report))


def _training_bar(steps: int | None) -> Progress:
    """Build a line with steps, a bar if the terminal is wide enough, and numbers, which may be cut at the end."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    console = stderr()
    count = MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=len(f"{steps}/{steps}")))
    bar = [BarColumn(bar_width=20)] if console.width >= _WIDE else []
    numbers = TextColumn("{task.fields[n]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    return Progress(TextColumn("step"), count, *bar, numbers, console=console)


def _numbers(report: Any) -> str:
    """Format loss and accuracy, each with the value of guessing by frequency, and the pace.

    With the steps it fits 100 columns, but for the last part.
    """
    parts = [
        f"loss {report.loss:.3f}{_beside(' (base {:.3f})', report.unigram_loss)}",
        f"acc {report.accuracy:.1%}{_beside(' ({:.1%})', report.unigram_accuracy)}",
        f"lr {report.learning_rate:.1e}",
        _beside("wait {:.0%}", report.data_wait_share),
        _beside("{:,.0f}x", report.audio_per_second),  # seconds of audio per second
        "" if report.seconds_left is None else f"{_short(report.seconds_left)} left",
        _beside("mfu {:.0%}", report.mfu),  # last: the first to be cut
    ]
    return "  ".join(part for part in parts if part)


def _beside(text: str, value: float) -> str:
    """Format the text with the value, or return an empty string while the value is unknown (NaN)."""
    return "" if math.isnan(value) else text.format(value)


def _short(seconds: float) -> str:
    """Format a remaining time: 1:02:03, or 12h from ten hours on."""
    return clock(seconds) if seconds < 36_000 else f"{seconds / 3600:.0f}h"


def clock(seconds: float) -> str:
    """Format a duration as 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
