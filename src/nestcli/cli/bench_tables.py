"""Print the results of `nest bench` as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nestcli.cli import console

if TYPE_CHECKING:
    from nestcli.bench.run import BenchReport


def show(report: BenchReport) -> None:
    """Print a table for each section of a report."""
    shown = {
        "loader": _show_loader,
        "scale": _show_scale,
        "train_step": _show_train_step,
        "quantizer": _show_quantizer,
        "precisions": _show_precisions,
        "buckets": _show_buckets,
    }
    for section in report.sections:
        shown[section.name](section.to_json())


def _show_loader(section: dict[str, Any]) -> None:
    sides = {"ours, one loader process": section["ours"], "without a loader process": section["without_loader_process"]}
    sides["floor: plain reads and a sum"] = section["floor"]
    if section["nemo"]:
        sides[f"NeMo {section['nemo_version']}"] = section["nemo"]
    rows = [(name, *(f"{spread[key]:,.0f}" for key in ("median", "min", "max"))) for name, spread in sides.items()]
    console.table("loader: seconds of audio per second", ["", ">median", ">min", ">max"], rows)
    if section["ratio"]:
        console.line(f"{section['ratio']:.1f} times NeMo's speed.")
    console.line(f"{section['floor']['share']:.0%} of the floor.")
    busy = section["per_processor_second"]
    theirs = f"; {busy['ratio']:.1f} times NeMo" if busy["ratio"] else ""
    console.line(
        f"Per second of CPU time: {busy['ours']:,.0f} s of audio, {busy['share_of_floor']:.0%} of the floor{theirs}."
    )
    console.line(_memory(section))
    cost = section["microseconds_per_second_of_audio"]
    for side in ("ours", "floor"):
        stages = [(name, f"{value:,.1f}") for name, value in cost[side].items()]
        stages.append(("total", f"{cost[f'{side}_total']:,.1f}"))
        console.table(f"{side}: microseconds per second of audio", ["stage", ">µs"], stages)


def _show_scale(section: dict[str, Any]) -> None:
    rows = []
    for row in section["rows"]:
        rows += [_scale_row(f"{row['lines']:,}", row)]
        rows += [_scale_row("  NeMo", row["nemo"])] if "nemo" in row else []
    rows.append(_scale_row("resumed", section["resume"]))
    columns = ["lines", ">total", ">imports", ">manifest", ">batch", ">µs/line", ">MiB", ">worker"]
    console.table("scale: seconds from the start of a process to its first batch", columns, rows)
    console.line("resumed: the longest manifest, nine tenths through the fourth epoch. MiB: peak memory.")


def _scale_row(label: str, row: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{row[key]:.2f}" for key in ("seconds", "imports", "manifest", "first_batch"))
    memory = (f"{row['memory'][process]['peak'] / 2**20:,.0f}" for process in ("main", "worker"))
    return (label, *times, f"{row['microseconds_per_line']:.2f}", *memory)


def _show_train_step(section: dict[str, Any]) -> None:
    rows = []
    for name, way in section["ways"].items():
        ratio = f"{way['ratio']:.2f}" if way["ratio"] else ""
        share = f"{way['share_of_matrix_product_limit']:.0%}"
        rows.append((name, *_spread(way["seconds"]), ratio, share, f"{way['peak_memory_bytes'] / 2**20:,.0f}"))
    if section["nemo"]:
        memory = section["peak_memory_bytes"]["nemo"] / 2**20
        rows.append((f"NeMo {section['nemo_version']}", *_spread(section["nemo"]), "", "", f"{memory:,.0f}"))
    columns = ["", ">median", ">min", ">max", ">times NeMo", ">of the limit", ">MiB"]
    console.table(f"train_step: {section['unit']}", columns, rows)
    batch = f"{section['memory_clips']} clips of {section['memory_clip_seconds']:g} s"
    console.line(f"MiB: peak memory of the {_owner(section)}, with {batch}.")
    console.line("Limit: all operations at the speed of a large matrix product.")
    if section["nemo"] and section["nemo_precision"] != section["precision"]:
        console.line(f"NeMo's precision is {section['nemo_precision']}, ours {section['precision']}.")
    if section["not_compiled"]:
        console.line(f"Not compiled: {section['not_compiled']}")
    for name, way in section["ways"].items():
        spent = way["seconds_by_kind"]
        parts = (f"{kind} {value / sum(spent.values()):.0%}" for kind, value in spent.items() if value)
        console.line(f"{name}: {', '.join(parts)}.")


def _show_quantizer(section: dict[str, Any]) -> None:
    rows = [("ours", *_spread(section["ours"]))]
    if section["nemo"]:
        rows.append((f"NeMo {section['nemo_version']}", *_spread(section["nemo"])))
    console.table(f"quantizer: {section['unit']}", ["", ">median", ">min", ">max"], rows)
    peaks = section["peak_memory_bytes"]
    theirs = (
        f"; NeMo's {peaks['nemo'] / 2**20:,.0f} MiB, {section['ratio']:.0f} times the time" if peaks["nemo"] else ""
    )
    console.line(f"Additional memory of the {_owner(section)}: {peaks['ours'] / 2**20:,.0f} MiB{theirs}.")
    if section["tokens_that_differ"]:
        console.line(f"{section['tokens_that_differ']:.2%} of the tokens differ from NeMo's.")


def _show_precisions(section: dict[str, Any]) -> None:
    columns = ["", ">s/batch", ">s/s", ">s/s, loader", ">of a product", ">of data sheet", ">GiB"]
    rows = [_precision_row(row) for row in section["rows"] if "error" not in row]
    console.table(f"precisions on {section['device']}", columns, rows)
    for name, keys in section["keys"].items():
        console.line(f"{name}: {' '.join(f'{key}={value}' for key, value in keys.items())}")
    if section["not_compiled"]:
        console.line(f"Not compiled: {section['not_compiled']}")
    for row in section["rows"]:
        if "error" in row:
            console.line(f"{_precision(row)}, {row['audio_seconds']:g} s: {row['error']}")


def _precision_row(row: dict[str, Any]) -> tuple[str, ...]:
    speeds = (f"{row[key]:,.0f}" for key in ("audio_per_second", "fed_audio_per_second"))
    shares = (row["utilisation_of_measured_product"], row["utilisation_of_data_sheet"])
    used = ("" if share is None else f"{share:.0%}" for share in shares)
    return (_precision(row), f"{row['audio_seconds']:g}", *speeds, *used, f"{row['peak_memory_bytes'] / 2**30:.1f}")


def _precision(row: dict[str, Any]) -> str:
    return f"{row['precision']}, {'compiled' if row['compiled'] else 'plain'}"


def _owner(section: dict[str, Any]) -> str:
    return "GPU" if section["device"] == "cuda" else "process"


def _spread(spread: dict[str, float]) -> tuple[str, ...]:
    return tuple(f"{spread[key]:.4f}" for key in ("median", "min", "max"))


def _show_buckets(section: dict[str, Any]) -> None:
    rows = [
        (f"{row['upto_seconds']:g}", f"{row['utterances']:,}", row["batch_size"]) for row in section["bins"]
    ]  # fmt: skip
    console.table("buckets: the largest batches that fit", [">up to (s)", ">utterances", ">batch"], rows)
    console.line(f"Within {section['memory_budget_bytes'] / 2**30:.1f} GiB of {section['device']} memory.")
    padding = section["padding"]
    console.line(f"Padding: {padding['plain']:.1%} in plain batches, {padding['buckets']:.1%} in these buckets.")
    console.line("Add to the configuration, or to the command line of nest pretrain:")
    for word in section["words"]:
        console.line(f"  {word}")


def _memory(section: dict[str, Any]) -> str:
    peaks = section["peak_memory_bytes"]
    theirs = f"; NeMo's {peaks['nemo'] / 2**20:,.0f} MiB" if peaks["nemo"] else ""
    return f"Peak memory of the process and its loader process: {peaks['ours'] / 2**20:,.0f} MiB{theirs}."
