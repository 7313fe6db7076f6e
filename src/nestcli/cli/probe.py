"""`nest probe`: measure how much frozen features know."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson, BatchDuration, amount

if TYPE_CHECKING:
    from nestcli.evaluation.probes.options import ProbeOptions
    from nestcli.evaluation.probes.results import ProbeResult


def probe(
    manifest: Annotated[
        str,
        typer.Argument(metavar="MANIFEST", help="JSON lines or Lhotse cuts with the label.", show_default=False),
    ],
    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint",
            metavar="FILE",
            help="A .nemo, .ckpt or .safetensors file, a transformers folder, or `reference`: the small encoder that "
            "comes with nest.",
        ),
    ],
    label: Annotated[
        str,
        typer.Option(
            "--label",
            metavar="FIELD",
            help="The field to predict: speaker, word, text, lang, ... Default: text for ctc, speaker for verify.",
            show_default=False,
        ),
    ] = "",
    task: Annotated[
        str,
        typer.Option(
            "--task",
            help="classify: predict the label of an utterance. ctc: transcribe. verify: same speaker or not. abx: "
            "compare words or sounds across speakers.",
        ),
    ] = "classify",
    noise: Annotated[
        str | None,
        typer.Option("--noise", metavar="MANIFEST", help="Mix noise of this manifest into every utterance."),
    ] = None,
    snr: Annotated[
        float | None,
        amount(
            "--snr",
            "Level of the speech above the noise. Default: 5.",
            least=-200.0,
            most=200.0,
            metavar="DB",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            help="auto: no speaker on both sides, unless the label is the speaker. utterance: random. Or a field; each "
            "of its values stays on one side.",
        ),
    ] = "auto",
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            min=1,
            max=1000,
            help="Number of splits, validation folds and untrained encoders. Default: 5, and 3 for ctc.",
            show_default=False,
        ),
    ] = None,
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
    """Measure what frozen features know with a probe.

    Runs the same probe on an untrained encoder and on log-mel features, for comparison.
    """
    from nestcli.evaluation.probes.options import ProbeOptions
    from nestcli.evaluation.probes.run import probe as run

    options = ProbeOptions(
        label=label,
        split=split,
        seeds=seeds or 0,
        min_count=min_count,
        device=device,
        precision=precision,
        batch_duration=batch_duration,
        task=task,
        noise=noise,
        snr=snr,
    )
    with tempfile.TemporaryDirectory() as scratch, console.progress("encoding") as advance:
        result = run(manifest, checkpoint, Path(scratch), options, advance)
    document = _document(manifest, checkpoint, options, result)
    if out is not None:
        _write(out, result, document)
    for note in result.notes:
        console.note(note)
    if as_json:
        console.emit_json(document)
    else:
        _show(result, out)


def _document(manifest: str, checkpoint: str, options: ProbeOptions, result: ProbeResult) -> dict[str, Any]:
    systems = [
        {
            "name": each.name,
            "pool": each.pool,
            "mean": each.mean,
            "deviation": each.deviation,
            result.measure.replace(" ", "_").lower(): {
                "mean": each.mean,
                "std": each.deviation,
                "values": list(each.values),
            },
            "layers": list(each.layers),
            "layer_weights": [sum(column) / len(column) for column in zip(*each.layer_weights, strict=True)],
        }
        for each in result.outcomes
    ]
    margins = {
        name: {"mean": margin.lead, "std": margin.deviation, "clear": margin.clear}
        for name, margin in result.margins.items()
    }
    return {
        "task": result.task,
        "manifest": manifest,
        "checkpoint": checkpoint,
        "noise": None if options.noise is None else {"manifest": options.noise, "snr": options.snr},
        "label": result.label,
        "measure": result.measure,
        "split": result.split,
        "utterances": result.utterances,
        "rejected": result.rejected,
        "classes": list(result.classes),
        "chance": result.chance,
        "systems": systems,
        "margins": margins,
        "verdict": {name: verdict(result, name) for name in margins},
        "confusion": [list(row) for row in result.confusion],
        "notes": list(result.notes),
    }


def _write(out: Path, result: ProbeResult, document: dict[str, Any]) -> None:
    import json

    from nestcli.evaluation.probes.pictures import draw_confusion, draw_layers
    from nestcli.files import write_text

    write_text(out / "probe.json", [json.dumps(document, ensure_ascii=False, indent=2) + "\n"])
    if result.confusion and (note := draw_confusion(out / "confusion.png", result)):
        console.note(note)
    draw_layers(out / "layers.png", result)


def verdict(result: ProbeResult, baseline: str) -> str:
    """Return a sentence: is the pretrained encoder better than a baseline, and by how much?"""
    lead, deviation, clear = result.margins[baseline]
    words = "clearly better than" if clear else "not clearly better than" if lead > 0 else "no better than"
    points = f"{100 * lead:+.1f} points"
    if result.counts_errors and (theirs := result.best(baseline).mean) > 0:
        points = f"{abs(lead) / theirs:.0%} {'fewer' if lead > 0 else 'more'} errors, {100 * -lead:+.1f} points"
    return f"pretrained is {words} {baseline}: {points}, deviation {100 * deviation:.1f} between splits"


def _show(result: ProbeResult, out: Path | None) -> None:
    splits = len(result.outcomes[0].values)
    rows = [
        (each.name, each.pool, f"{each.mean:.1%}", f"{each.deviation:.1%}", _most(each)) for each in result.outcomes
    ]
    if result.chance is not None:
        rows.append(("guessing" if result.counts_errors else "most frequent class", "", f"{result.chance:.1%}", "", ""))
    kinds = "symbols" if result.task == "ctc" else "classes"
    size = f"{result.utterances:,} utterances of {len(result.classes):,} {kinds}"
    title = f"{result.label}: {size}; {result.split}; {splits} splits"
    console.table(title, ("system", "pooling", f">{result.measure}", ">deviation", "most weight on"), rows)
    for name in result.margins:
        console.line(verdict(result, name))
    if out is not None:
        console.line(f"written    {out}")


def _most(outcome: Any) -> str:
    """Name the layer with the largest mean weight, and the weight."""
    if len(outcome.layers) == 1:
        return ""
    mean = [sum(column) / len(column) for column in zip(*outcome.layer_weights, strict=True)]
    best = max(range(len(mean)), key=mean.__getitem__)
    return f"{outcome.layers[best]} ({mean[best]:.0%})"
