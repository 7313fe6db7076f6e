"""`nest doctor`: check this machine and installation."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson
from nestcli.errors import NestError

if TYPE_CHECKING:
    from nestcli.doctor.report import Check, Report

_STATES = {"ok": "ok", "note": "note", "problem": "PROBLEM"}


def doctor(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for results to check; it need not exist.")
    ] = Path("nest_experiments"),
    nemo_python: Annotated[
        str | None,
        typer.Option(
            "--nemo-python",
            metavar="PATH",
            help="Python interpreter of an environment with NeMo; also $NEST_NEMO_PYTHON.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and installation for problems.

    Checks installation, devices, audio, disk, NeMo and environment variables, and says how to fix what it finds. Exits
    with 1 if there is a problem; notes are for information.
    """
    if out.exists() and not out.is_dir():
        raise NestError(f"--out {out}: this is a file. Name a folder for the results.")
    if nemo_python is not None and shutil.which(nemo_python) is None:
        raise NestError(f"--nemo-python {nemo_python}: program not found. Give the path of a Python that has NeMo.")
    from nestcli.doctor.run import examine

    if _has_rich():
        with console.progress("checking") as advance:
            report = examine(out, nemo_python, advance)
    else:
        report = examine(out, nemo_python)
    if as_json:
        console.emit_json(report.to_json())
    else:
        _show(report)
    if not report.passed:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not UTF-8 is one of the findings
        sys.stdout.reconfigure(errors="backslashreplace")
    rows: list[tuple[str, str, str]] = []
    section = ""
    for check in report.checks:
        if check.section != section:
            section = check.section
            rows.append((section, "", ""))
        rows.append((f"  {check.name}", _STATES[check.state], _words(check)))
    _table(["check", "", "found, and -> what to do"], rows)
    problems, notes = report.of("problem"), report.of("note")
    if problems:
        console.line(f"{len(problems)} problem{_s(problems)}: {', '.join(check.name for check in problems)}.")
    if notes:
        console.line(f"{len(notes)} note{_s(notes)}: {', '.join(check.name for check in notes)}.")
    if not problems:
        console.line("nest works here.")


def _table(columns: list[str], rows: list[tuple[str, str, str]]) -> None:
    if _has_rich():
        console.table("nest doctor", columns, rows)
        return
    for name, state, words in rows:  # Rich is broken too
        console.line(f"{name:<24}{state:<9}{words}".rstrip())


def _has_rich() -> bool:
    try:
        import rich.progress
        import rich.table
    except Exception:  # a broken package may raise anything
        return False
    return bool(rich)


def _words(check: Check) -> str:
    return f"{check.found}\n-> {check.remedy}" if check.remedy else check.found


def _s(checks: list[Check]) -> str:
    return "s" * (len(checks) != 1)
