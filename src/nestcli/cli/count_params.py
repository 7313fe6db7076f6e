"""`nest count-params`: parameters by module compared with NeMo's count, and the cost of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestcli.cli import console
from nestcli.cli.named import read_config
from nestcli.cli.options import AsJson, amount
from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def count_params(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG or CHECKPOINT] [key=value ...]",
            help="A preset, a YAML file, a .ckpt of `nest pretrain` or a .nemo file; then overrides.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option("--depth", metavar="N", min=1, max=100, help="Number of levels of module names.")
    ] = 1,
    seconds: Annotated[
        float, amount("--seconds", "Length of the clips for which FLOPs are counted.", most=3600, metavar="SECONDS")
    ] = 15.0,
    every: Annotated[bool, typer.Option("--all", help="Count every preset.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count parameters by module and compare with NeMo's count.

    Lists trainable and frozen parameters, the memory that training holds, and floating-point operations (FLOPs) per
    second of audio.
    """
    from nestcli.config import PRESETS, split_words

    name, overrides = split_words(words or [])
    if every and words and "=" not in words[0]:
        raise ConfigError(f"--all counts every preset; remove {words[0]!r}.")
    counts = [_counted(preset, overrides, depth, seconds) for preset in (PRESETS[1:] if every else [name])]
    if as_json:
        console.emit_json(counts if every else counts[0])
    elif every:
        _show_all(counts)
    else:
        _show(counts[0])


def _counted(name: str, overrides: list[str], depth: int, seconds: float) -> dict[str, Any]:
    config = read_config([name, *overrides]).config
    from nestcli.model.count import NEMO_VERSION, count_parameters, nemo_count

    counted, theirs = count_parameters(config), nemo_count(config)
    modules = counted.to_depth(depth)
    return {
        "config": name,
        "total": counted.total,
        "trainable": counted.trainable,
        "frozen": counted.frozen,
        "modules": {module: sum(numbers) for module, numbers in modules.items()},
        "trainable_by_module": {module: trainable for module, (trainable, _) in modules.items()},
        "nemo": {
            "version": NEMO_VERSION,
            "total": theirs,
            "difference": None if theirs is None else counted.total - theirs,
        },
        "memory": _memory(config),
        "flops": _flops(config, seconds),
    }


def _memory(config: DictConfig) -> dict[str, Any]:
    from nestcli.model.cost import precision_of, training_memory

    memory = training_memory(config)
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    return {"precision": precision_of(config), **parts, "total": memory.total}


def _flops(config: DictConfig, seconds: float) -> dict[str, Any]:
    """Return the floating-point operations per second of audio, rounded to integers."""
    from nestcli.model.cost import Work, batch_size, work_per_second

    parts = work_per_second(config, seconds)
    whole = sum(parts.values(), start=Work(0, 0))
    return {
        "clip_seconds": seconds,
        "batch_size": batch_size(config, seconds),
        "forward": round(whole.forward),
        "training_step": round(whole.step),
        "parts": {
            part: {"forward": round(work.forward), "training_step": round(work.step)} for part, work in parts.items()
        },
    }


def _show(count: dict[str, Any]) -> None:
    trainable, nemo = count["trainable_by_module"], count["nemo"]
    rows = [
        (module, f"{number:,}", f"{trainable[module]:,}", f"{number - trainable[module]:,}")
        for module, number in count["modules"].items()
    ]
    rows.append(("total", f"{count['total']:,}", f"{count['trainable']:,}", f"{count['frozen']:,}"))
    rows.append((f"NeMo {nemo['version']}", _nemo_total(nemo), "", ""))
    rows.append(("difference", _difference(nemo), "", ""))
    console.table(f"Parameters of {count['config']}", ["module", ">parameters", ">trainable", ">frozen"], rows)
    memory, flops = count["memory"], count["flops"]
    held = [(part, f"{memory[part]:,}", _mib(memory[part])) for part in ("weights", "gradients", "optimizer", "total")]
    console.table("Memory held in training", [f"precision {memory['precision']}", ">bytes", ">MiB"], held)
    work = [(part, _giga(numbers["forward"]), _giga(numbers["training_step"])) for part, numbers in _by_part(flops)]
    batch = f"{flops['batch_size']} clips of {flops['clip_seconds']:g} s"
    console.table("GFLOP per second of audio", [batch, ">forward", ">training step"], work)


def _by_part(flops: dict[str, Any]) -> list[tuple[str, dict[str, int]]]:
    return [*flops["parts"].items(), ("total", flops)]


def _show_all(counts: list[dict[str, Any]]) -> None:
    rows = [
        (
            count["config"],
            *(f"{count[key]:,}" for key in ("total", "frozen")),
            _nemo_total(count["nemo"]),
            _difference(count["nemo"]),
        )
        for count in counts
    ]
    columns = ["preset", ">total", ">frozen", f">NeMo {counts[0]['nemo']['version']}", ">difference"]
    console.table("Parameters", columns, rows)
    costs = [
        (
            count["config"],
            *(_mib(count["memory"][key]) for key in ("weights", "gradients", "optimizer", "total")),
            *(_giga(count["flops"][key]) for key in ("forward", "training_step")),
        )
        for count in counts
    ]
    columns = ["preset", ">weights", ">gradients", ">optimizer", ">total", ">forward", ">step"]
    clip = counts[0]["flops"]["clip_seconds"]
    console.table(f"MiB held in training; GFLOP per second of audio, clips of {clip:g} s", columns, costs)


def _nemo_total(nemo: dict[str, Any]) -> str:
    return "not recorded" if nemo["total"] is None else f"{nemo['total']:,}"


def _difference(nemo: dict[str, Any]) -> str:
    return "" if nemo["difference"] is None else f"{nemo['difference']:,}"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f}"


def _giga(number: int) -> str:
    return f"{number / 1e9:,.3f}"
