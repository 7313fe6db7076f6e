"""`nest prepare-data`: turn audio folders, files and manifests into checked manifests."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson, Patience, Strict
from nestcli.errors import DataError, RunFailedError

if TYPE_CHECKING:
    from nestcli.prepare.summary import PrepareSummary


Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...",
        help="Audio folders, audio files, globs, manifests, Lhotse cuts or recordings, Kaldi data folders.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the manifests.")]
Kind = Annotated[Literal["speech", "noise"], typer.Option("--kind", help="Type of audio.")]
ValFraction = Annotated[
    float | None,
    typer.Option("--val-fraction", help="Share for validation. Default: 0.05 for speech, 0 for noise."),
]
SplitBy = Annotated[
    Literal["utterance", "speaker"],
    typer.Option("--split-by", help="speaker: no speaker is in both training and validation."),
]
SpeakerPattern = Annotated[
    str | None,
    typer.Option(
        "--speaker-pattern",
        metavar="REGEX",
        help="A group in it finds the speaker in a path: '/([^/]+)/[^/]+$' takes the folder's name.",
    ),
]
MinDuration = Annotated[float | None, typer.Option("--min-duration", metavar="SECONDS", help="Reject shorter files.")]
MaxDuration = Annotated[float | None, typer.Option("--max-duration", metavar="SECONDS", help="Reject longer files.")]
MaxClipped = Annotated[
    float,
    typer.Option("--max-clipped", metavar="SHARE", help="Reject files with a larger share of clipped samples."),
]
Segment = Annotated[
    float | None,
    typer.Option("--segment", metavar="SECONDS", help="Cut longer files into pieces, at quiet places."),
]
Convert = Annotated[bool, typer.Option("--convert", help="Write the parts that are used to DIR/audio, as mono FLAC.")]
SampleRate = Annotated[
    int, typer.Option("--sample-rate", metavar="HZ", help="Sample rate of converted files and shards.")
]
Channel = Annotated[
    int | None,
    typer.Option(
        "--channel",
        metavar="N",
        help="Use this channel (from 0) instead of the average of all. A manifest's own choice has priority.",
    ),
]
Shards = Annotated[
    int | None, typer.Option("--shards", metavar="N", help="Also pack the audio into N tar files for training.")
]
ShardFormat = Annotated[
    Literal["nemo-tar", "shar"],
    typer.Option("--format", help="Format of the shards: NeMo's tar files or Lhotse's Shar."),
]
Jobs = Annotated[int | None, typer.Option("--jobs", "-j", metavar="N", help="Worker processes. Default: one per core.")]
Ray = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: local, auto or HOST:PORT.")
]
OnlyBelow = Annotated[
    Path | None,
    typer.Option("--jail", metavar="DIR", help="Read audio only below this folder, links resolved; also $NEST_JAIL."),
]


def prepare_data(
    inputs: Inputs,
    out: Out,
    kind: Kind = "speech",
    val_fraction: ValFraction = None,
    split_by: SplitBy = "utterance",
    speaker_pattern: SpeakerPattern = None,
    min_duration: MinDuration = None,
    max_duration: MaxDuration = None,
    max_clipped: MaxClipped = 0.01,
    segment: Segment = None,
    convert: Convert = False,
    sample_rate: SampleRate = 16000,
    channel: Channel = None,
    shards: Shards = None,
    shard_format: ShardFormat = "nemo-tar",
    jobs: Jobs = None,
    ray: Ray = None,
    patience: Patience = 120.0,
    only_below: OnlyBelow = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Check audio and write manifests for training.

    Decodes every file completely. Broken, truncated, empty, silent, clipped and duplicate files are rejected and
    listed in DIR/rejected.jsonl with the reason; the others go to DIR/train_manifest.json and
    DIR/val_manifest.json. The same command continues an interrupted run.
    """
    from nestcli.prepare.pipeline import PrepareOptions, first_rejection, prepare
    from nestcli.storage import allowed_folders

    if only_below is not None:
        if not only_below.is_dir():
            raise DataError(f"--jail {only_below} is not a folder; name the folder that contains the audio")
        os.environ[allowed_folders.VARIABLE] = str(only_below.absolute())  # worker processes inherit it
    options = PrepareOptions(
        kind=kind,
        val_fraction=val_fraction,
        split_by=split_by,
        speaker_pattern=speaker_pattern,
        min_duration=min_duration,
        max_duration=max_duration,
        max_clipped=max_clipped,
        segment=segment,
        convert=convert,
        sample_rate=sample_rate,
        channel=channel,
        shards=shards,
        shard_format=shard_format,
        jobs=jobs,
        ray=ray,
        patience=patience,
    )
    with console.progress("checking audio") as advance:
        summary = prepare(inputs, out, options, advance)
    if as_json:
        console.emit_json(summary.as_json())
    elif summary.accepted:
        _show(summary, out, pattern_given=speaker_pattern is not None)
    if not summary.accepted:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.rejections.items())
        raise RunFailedError(
            f"no input is usable ({reasons}); see {out / 'rejected.jsonl'}. The first: {first_rejection(out)}"
        )
    if strict and summary.rejected:
        raise RunFailedError(f"{summary.rejected} inputs were rejected (--strict); see {out / 'rejected.jsonl'}")


def _show(summary: PrepareSummary, out: Path, *, pattern_given: bool) -> None:
    """Print the table, remarks, and the next command."""
    console.table("", [f"{summary.kind} in {out}", ">"], _rows(summary))
    titles = ("hours by duration (s)", "utterances by level (dBFS)")
    for title, values in zip(titles, summary.histograms.values(), strict=True):
        console.histogram(title, values)
    picture = out / "summary.svg"
    drawn = f"{picture} shows durations and levels."
    console.note(
        drawn if picture.exists() else "No picture was drawn: `nest doctor` tells why matplotlib does not work."
    )
    for remark in _remarks(summary, out, pattern_given):
        console.note(remark)
    console.note(f"next: {_next_command(summary, out)}")


def _rows(summary: PrepareSummary) -> list[tuple[str, str]]:
    durations = " / ".join(f"{summary.durations[key]:.2f} s" for key in ("min", "median", "max"))
    levels = " / ".join(f"{summary.levels[key]:.0f} dBFS" for key in ("min", "median", "max"))
    rates = ", ".join(f"{hz / 1000:g} ({count:,})" for hz, count in summary.sample_rates.items())
    rows = [
        ("accepted", f"{summary.accepted:,}"),
        ("  for training", f"{summary.utterances['train']:,}"),
        ("  for validation", f"{summary.utterances['val']:,}"),
        ("hours", f"{summary.hours:,.2f}"),
        ("shortest, median, longest", durations),
        ("quietest, median, loudest", levels),
        ("sample rates, kHz (files)", rates),
    ]
    if summary.speakers:
        rows.append(("speakers", f"{summary.speakers:,}"))
    rows.append(("rejected", f"{summary.rejected:,}"))
    rows.extend((f"  {reason}", f"{count:,}") for reason, count in summary.rejections.items())
    for side, keys in summary.shards.items():
        rows.append((f"{side} shards", str(keys.get("tarred_audio_filepaths") or keys.get("shar_path"))))
    if summary.not_packed:
        rows.append(("not packed (see its skipped.jsonl)", f"{summary.not_packed:,}"))
    if summary.passed_over:
        rows.append(("ignored, not audio by name", f"{summary.passed_over:,}"))
    return rows


def _remarks(summary: PrepareSummary, out: Path, pattern_given: bool) -> list[str]:
    remarks = []
    if summary.rejected:
        remarks.append(f"{out / 'rejected.jsonl'} gives the reason for each rejected input.")
    if summary.without_speaker and (summary.speakers or pattern_given):
        remarks.append(f"Utterances without a known speaker: {summary.without_speaker:,}.")
    if summary.kind == "speech" and summary.shorter_than_1s:
        remarks.append(
            f"Utterances shorter than 1 s: {summary.shorter_than_1s:,}. `nest pretrain` skips these unless you lower"
            " model.train_ds.min_duration."
        )
    return remarks


def _next_command(summary: PrepareSummary, out: Path) -> str:
    """Return the next command to type, with this run's paths as the user wrote them, or with its shards."""
    blocks = {"train": "model.train_ds", "val": "model.validation_ds"}
    if summary.kind == "noise":
        words = [f"model.train_ds.noise_manifest={out / 'train_manifest.json'}"]
        words += ["model.train_ds.manifest_filepath=SPEECH_MANIFEST", "model.validation_ds.manifest_filepath=null"]
        return shlex.join(["nest", "pretrain", "small", *words])
    words = []
    for side, block in blocks.items():
        if keys := summary.shards.get(side):
            words += [f"{block}.{key}={str(value).lower() if value is True else value}" for key, value in keys.items()]
        elif summary.manifests[side]:
            words.append(f"{block}.manifest_filepath={out / f'{side}_manifest.json'}")
    words.append("model.train_ds.noise_manifest=null")
    if not summary.manifests["val"]:
        words.append("model.validation_ds.manifest_filepath=null")
    return shlex.join(["nest", "pretrain", "small", *words])
