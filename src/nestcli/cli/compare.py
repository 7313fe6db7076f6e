"""`nest compare`: check that this is NeMo's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson
from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from nestcli.parity.report import Check, Report

_SECTIONS = (
    "config", "parameters", "preprocessor", "masking", "quantizer", "encoder", "decoder", "loss", "gradients",
    "training", "augmentation", "checkpoint",
)  # fmt: skip


def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG or CHECKPOINT] [key=value ...]",
            help="A preset, a YAML file, a .ckpt or a .nemo file; then overrides.",
            show_default=False,
        ),
    ] = None,
    live: Annotated[
        bool, typer.Option("--nemo", help="Compare with an installed NeMo instead of the recorded facts.")
    ] = False,
    nemo_python: Annotated[
        str | None,
        typer.Option(
            "--nemo-python",
            metavar="PATH",
            help="Python interpreter of an environment with NeMo; also $NEST_NEMO_PYTHON. Implies --nemo.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="SECTION", help=f"One of {', '.join(_SECTIONS)}. May be repeated."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option("--audio", metavar="FILE", help="Speech file for the comparison; needs --nemo. May be repeated."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model with NeMo 3.0.0, part by part.

    Compares configuration, parameters, forward pass, loss, gradients, training and checkpoints. Without --nemo, it
    compares with facts recorded from NeMo. Exits with 1 if anything differs.
    """
    for name in only or []:
        if name not in _SECTIONS:
            raise ConfigError(f"--only {name}: unknown section. Known: {', '.join(_SECTIONS)}.")
    live = live or nemo_python is not None
    if audio and not live:
        raise ConfigError("--audio needs a live NeMo: the recorded facts are for their own audio. Add --nemo.")
    report = _compared(words or [], live=live, python=nemo_python, only=only or [], audio=audio or [])
    if as_json:
        console.emit_json(report.to_json())
    else:
        _show(report)
    if html is not None:
        from nestcli.parity.page import write_page

        write_page(report, html)
        console.note(f"report {html}")
    if not report.passed:
        raise typer.Exit(1)


def _compared(words: list[str], *, live: bool, python: str | None, only: list[str], audio: list[Path]) -> Report:
    from nestcli.cli.named import read_named

    named = read_named(words)
    from nestcli.parity.compare import Request
    from nestcli.parity.compare import compare as run
    from nestcli.parity.nemo import RecordedNemo, find_nemo

    if live:
        console.note("starting NeMo ...")
    nemo = find_nemo(python) if live else RecordedNemo()
    try:
        with console.progress("comparing") as advance:

            def started(number: int, total: int, section: str) -> None:
                advance(number, total, section)

            return run(Request(named.name, named.config, named.state_dict, audio, only), nemo, started)
    finally:
        nemo.close()


def _show(report: Report) -> None:
    rows: list[tuple[object, ...]] = []
    for section in report.sections:
        verdict = "same" if section.passed else "DIFFERS"
        tightest = max(section.checks, key=_share_of_tolerance, default=None)
        rows.append((section.name, verdict, len(section.checks), *_shown(tightest)))
        rows += [("", "DIFFERS", "", check.name, *_shown(check)[1:]) for check in section.checks if not check.passed]
    columns = ["section", "", ">checks", "closest to its limit", ">difference", ">allowed"]
    console.table(f"{report.config} compared with NeMo {report.nemo_version}", columns, rows)
    is_whole = len(report.sections) == len(_SECTIONS)
    for difference in report.known_differences if is_whole else []:
        mark = {True: "shown", False: "NOT AS DESCRIBED", None: "known"}[difference.reproduced]
        console.line(f"{mark}: {difference.name}. NeMo: {difference.nemo}; here: {difference.ours}.")
    for note in report.notes:
        console.line(note)
    console.line(_verdict(report))


def _verdict(report: Report) -> str:
    count = sum(len(section.checks) for section in report.sections)
    same = "The same model as" if len(report.sections) == len(_SECTIONS) else "In these sections, the same as"
    source = f"NeMo {report.nemo_version}" + ("" if report.live else " as recorded")
    if report.first_divergence is not None:
        section, check = report.first_divergence
        return f"DIFFERENT from {source}. First divergence: {section.name}, {check.name}: {check.where}"
    if not report.passed:
        return f"{same} {source} in {count} checks, but a known difference is not as described."
    return f"{same} {source}: {count} checks, no difference beyond its tolerance."


def _share_of_tolerance(check: Check) -> float:
    if check.difference is None:
        return 0.0 if check.passed else float("inf")
    return check.difference / check.tolerance if check.tolerance else float(check.difference > 0)


def _shown(check: Check | None) -> tuple[str, str, str]:
    if check is None:
        return "", "", ""
    difference = "" if check.difference is None else f"{check.difference:.2g}"
    return check.name, difference, "" if check.tolerance is None else f"{check.tolerance:.2g}"
