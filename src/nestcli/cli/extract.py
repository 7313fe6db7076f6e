"""`nest extract`: write features of chosen layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson, BatchDuration, Strict, amount


def extract(
    given: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A manifest, Lhotse cuts, a folder of audio, or one audio file.", show_default=False
        ),
    ],
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            metavar="FILE",
            help="A .nemo, .ckpt or .safetensors file, a folder of Hugging Face transformers, or `reference`: the "
            "small encoder that comes with nest.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for features and manifest.")],
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            metavar="LIST",
            help="all, last, or layer numbers such as 0,5,11; input is the input of layer 0, -1 the last layer.",
        ),
    ] = "all",
    format: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="Output format: npy, safetensors, hdf5 or lhotse.")
    ] = "npy",
    store: Annotated[
        str, typer.Option("--store", metavar="TYPE", help="Type of the stored numbers: float32 or float16.")
    ] = "float32",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Device to compute on: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="TYPE", help="Precision of the computation: fp32, bf16 or fp16.")
    ] = "fp32",
    batch_duration: BatchDuration = 120.0,
    max_duration: Annotated[float, amount("--max-duration", "Reject longer utterances.", metavar="SECONDS")] = 240.0,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Write features of chosen layers of an encoder.

    Each utterance becomes one array of (layers, dim, frames). The same command continues an interrupted extraction.
    """
    from nestcli.evaluation.extract import ExtractOptions
    from nestcli.evaluation.extract import extract as run

    options = ExtractOptions(layers, format, store, device, precision, batch_duration, max_duration)
    with console.progress("extracting") as advance:
        done = run(given, checkpoint, out, options, advance)
    if done.was_done:
        console.note(f"{out} is already complete: nothing to do.")
    if as_json:
        document = {
            **dataclasses.asdict(done),
            "path": str(done.path),
            "manifest": str(done.manifest),
            "format": format,
        }
        console.emit_json(document)
    else:
        numbers = ", ".join(map(str, done.layers))
        counted = f"{done.utterances:,} utterance{'s' if done.utterances != 1 else ''}"
        console.line(f"{counted}, {console.clock(done.seconds)} of audio; layers {numbers} of {done.dim}")
        console.line(f"features  {done.path}")
        console.line(f"manifest  {done.manifest}")
        if done.rejected:
            console.line(f"rejected  {done.rejected:,}, with reasons in {out / 'rejected.jsonl'}")
    if strict and done.rejected:
        raise typer.Exit(1)
