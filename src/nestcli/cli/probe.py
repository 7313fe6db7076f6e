"""`nest probe`: measure how much frozen features know."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson, BatchDuration

if TYPE_CHECKING:
    from nestcli.evaluation.probes.classify import ProbeResult


def probe(
    manifest: Annotated[
        str,
        typer.Argument(metavar="MANIFEST", help="JSON lines or Lhotse cuts with the label.", show_default=False),
    ],
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint", metavar="FILE", help="A .nemo, .ckpt or .safetensors file, or a transformers folder."
        ),
    ],
    label: Annotated[
        str, typer.Option("--label", metavar="FIELD", help="The field to predict: speaker, text, lang, ...")
    ],
    split: Annotated[
        str,
        typer.Option(
            "--split",
            help="auto: no speaker on both sides, unless the label is the speaker. utterance: random. Or a field; each "
            "of its values stays on one side.",
        ),
    ] = "auto",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, max=1000, help="Number of splits, validation folds and untrained encoders.")
    ] = 5,
    min_count: Annotated[
        int, typer.Option("--min-count", min=2, max=10**6, help="Ignore classes with fewer utterances.")
    ] = 2,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for probe.json, confusion.png and layers.png.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", help="Precision of the encoder: fp32, bf16 or fp16.")
    ] = "fp32",
    batch_duration: BatchDuration = 120.0,
    as_json: AsJson = False,
) -> None:
    """Measure what frozen features know with a linear probe.

    Runs the same probe on an untrained encoder and on log-mel statistics, for comparison.
    """
    from nestcli.evaluation.probes.classify import ProbeOptions
    from nestcli.evaluation.probes.classify import probe as run

    options = ProbeOptions(label, split, seeds, min_count, device, precision, batch_duration)
    with tempfile.TemporaryDirectory() as scratch, console.progress("encoding") as advance:
        result = run(manifest, checkpoint, Path(scratch), options, advance)
    document = _document(manifest, checkpoint, result)
    if out is not None:
        _write(out, result, document)
    for note in result.notes:
        console.note(note)
    if as_json:
        console.emit_json(document)
    else:
        _show(result, out)


def _document(manifest: str, checkpoint: str, result: ProbeResult) -> dict[str, Any]:
    systems = [
        {
            "name": each.name,
            "pool": each.pool,
            "accuracy": {"mean": each.mean, "std": each.deviation, "values": list(each.accuracies)},
            "layers": list(each.layers),
            "layer_weights": [sum(column) / len(column) for column in zip(*each.layer_weights, strict=True)],
        }
        for each in result.outcomes
    ]
    margins = {
        name: {"mean": mean, "std": deviation, "clear": clear}
        for name, (mean, deviation, clear) in result.margins.items()
    }
    return {
        "manifest": manifest,
        "checkpoint": checkpoint,
        "label": result.label,
        "split": result.split,
        "utterances": result.utterances,
        "rejected": result.rejected,
        "classes": list(result.classes),
        "chance": result.chance,
        "systems": systems,
        "margins": margins,
        "confusion": [list(row) for row in result.confusion],
        "notes": list(result.notes),
    }


def _write(out: Path, result: ProbeResult, document: dict[str, Any]) -> None:
    import json

    from nestcli.evaluation.probes.pictures import draw_confusion, draw_layers
    from nestcli.files import write_text

    write_text(out / "probe.json", [json.dumps(document, ensure_ascii=False, indent=2) + "\n"])
    if note := draw_confusion(out / "confusion.png", result):
        console.note(note)
    draw_layers(out / "layers.png", result)


def _show(result: ProbeResult, out: Path | None) -> None:
    splits = len(result.outcomes[0].accuracies)
    rows = [
        (each.name, each.pool, f"{each.mean:.1%}", f"{each.deviation:.1%}", _most(each)) for each in result.outcomes
    ]
    rows.append(("most frequent class", "", f"{result.chance:.1%}", "", ""))
    size = f"{result.utterances:,} utterances of {len(result.classes):,} classes"
    title = f"{result.label}: {size}; {result.split}; {splits} splits"
    console.table(title, ("system", "pooling", ">accuracy", ">deviation", "most weight on"), rows)
    for name, (mean, deviation, clear) in result.margins.items():
        verdict = "clearly better than" if clear else "not clearly better than" if mean > 0 else "no better than"
        console.line(
            f"pretrained is {verdict} {name}: {100 * mean:+.1f} points, deviation {100 * deviation:.1f} between splits"
        )
    if out is not None:
        console.line(f"written    {out}")


def _most(outcome: Any) -> str:
    """Name the layer with the largest mean weight, and the weight."""
    if len(outcome.layers) == 1:
        return ""
    mean = [sum(column) / len(column) for column in zip(*outcome.layer_weights, strict=True)]
    best = max(range(len(mean)), key=mean.__getitem__)
    return f"{outcome.layers[best]} ({mean[best]:.0%})"
