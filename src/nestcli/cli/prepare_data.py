"""`nest prepare-data`: audio folders, files and manifests become checked manifests."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nestcli.cli import console
from nestcli.errors import RunFailedError

if TYPE_CHECKING:
    from nestcli.data.prepare import PrepareSummary


def prepare_data(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Audio folders, audio files, manifests, Lhotse cuts."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the manifests.")],
    kind: Annotated[Literal["speech", "noise"], typer.Option("--kind", help="What the audio is used for.")] = "speech",
    val_fraction: Annotated[
        float | None,
        typer.Option("--val-fraction", help="Share for validation. Default: 0.05 of speech, 0 of noise."),
    ] = None,
    split_by: Annotated[
        Literal["utterance", "speaker"],
        typer.Option("--split-by", help="speaker: nobody is in training and validation."),
    ] = "utterance",
    speaker_pattern: Annotated[
        str | None,
        typer.Option(
            "--speaker-pattern",
            metavar="REGEX",
            help="Finds the speaker in a path, as its group: '/([^/]+)/[^/]+$' is the folder's name.",
        ),
    ] = None,
    min_duration: Annotated[
        float | None, typer.Option("--min-duration", metavar="SECONDS", help="Reject what is shorter.")
    ] = None,
    max_duration: Annotated[
        float | None, typer.Option("--max-duration", metavar="SECONDS", help="Reject what is longer.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", "-j", metavar="N", help="Files checked at once. Default: one a core."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with exit code 1 if anything is rejected.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Check audio and write manifests for training.

    Decodes every file to its end. What is broken, cut off, empty, silent or there twice is left out and
    listed in DIR/rejected.jsonl with the reason; the rest goes to DIR/train_manifest.json and
    DIR/val_manifest.json.
    """
    from nestcli.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        kind=kind,
        val_fraction=val_fraction,
        split_by=split_by,
        speaker_pattern=speaker_pattern,
        min_duration=min_duration,
        max_duration=max_duration,
        jobs=jobs,
    )
    with console.progress("checking audio") as advance:
        summary = prepare(inputs, out, options, advance)
    if as_json:
        console.emit_json(summary.as_json())
    else:
        _show(summary, out, pattern_given=speaker_pattern is not None)
    if strict and summary.rejected:
        raise RunFailedError(f"{summary.rejected} inputs were rejected (--strict); see {out / 'rejected.jsonl'}")


def _show(summary: PrepareSummary, out: Path, *, pattern_given: bool) -> None:
    """Print the table, what deserves a remark, and the next command."""
    console.table("", [f"{summary.kind} in {out}", ">"], _rows(summary))
    for remark in _remarks(summary, out, pattern_given):
        console.note(remark)
    console.note(f"next: {_next_command(summary.kind, summary.manifests, out)}")


def _rows(summary: PrepareSummary) -> list[tuple[str, str]]:
    durations = " / ".join(f"{summary.durations[key]:.2f} s" for key in ("min", "median", "max"))
    rates = ", ".join(f"{hz / 1000:g} ({count:,})" for hz, count in summary.sample_rates.items())
    rows = [
        ("accepted", f"{summary.accepted:,}"),
        ("  for training", f"{summary.utterances['train']:,}"),
        ("  for validation", f"{summary.utterances['val']:,}"),
        ("hours", f"{summary.hours:,.2f}"),
        ("shortest, median, longest", durations),
        ("sample rates, kHz (files)", rates),
    ]
    if summary.speakers:
        rows.append(("speakers", f"{summary.speakers:,}"))
    rows.append(("rejected", f"{summary.rejected:,}"))
    rows.extend((f"  {reason}", f"{count:,}") for reason, count in summary.rejections.items())
    if summary.passed_over:
        rows.append(("passed over, not audio by name", f"{summary.passed_over:,}"))
    return rows


def _remarks(summary: PrepareSummary, out: Path, pattern_given: bool) -> list[str]:
    remarks = []
    if summary.rejected:
        remarks.append(f"{out / 'rejected.jsonl'} says what is wrong with what was rejected.")
    if summary.without_speaker and (summary.speakers or pattern_given):
        remarks.append(f"Without a known speaker: {summary.without_speaker:,}.")
    if summary.kind == "speech" and summary.shorter_than_1s:
        remarks.append(
            f"Shorter than 1 s: {summary.shorter_than_1s:,}. `nest pretrain` leaves these out unless"
            " model.train_ds.min_duration is lowered."
        )
    return remarks


def _next_command(kind: str, manifests: dict[str, str | None], out: Path) -> str:
    """What to type next, with this run's paths as the user wrote them."""
    if kind == "noise":
        keys = {"train": "model.train_ds.noise_manifest"}
        others = ["model.train_ds.manifest_filepath=SPEECH_MANIFEST", "model.validation_ds.manifest_filepath=null"]
    else:
        keys = {"train": "model.train_ds.manifest_filepath", "val": "model.validation_ds.manifest_filepath"}
        others = ["model.train_ds.noise_manifest=null"]
        if not manifests["val"]:
            others.append("model.validation_ds.manifest_filepath=null")
    words = [f"{key}={out / f'{side}_manifest.json'}" for side, key in keys.items() if manifests[side]]
    return shlex.join(["nest", "pretrain", "nest_fast-conformer", *words, *others])
