"""`nest count-params`: parameters by module, beside NeMo's figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestcli.cli import console
from nestcli.cli.named import CHECKPOINTS
from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def count_params(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG or CHECKPOINT] [key=value ...]",
            help="A preset, a YAML file, a .ckpt of `nest pretrain` or a .nemo file, then overrides.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Parts of the parameters' names to count by.")] = 1,
    every: Annotated[bool, typer.Option("--all", help="Every preset.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Count parameters by module, trainable and frozen, against NeMo's count for the same configuration."""
    from nestcli.config import PRESETS, split_words

    name, overrides = split_words(words or [])
    if every and words and "=" not in words[0]:
        raise ConfigError(f"--all counts every preset; leave out {words[0]!r}.")
    counts = [_counted(preset, overrides, depth) for preset in (PRESETS[1:] if every else [name])]
    if as_json:
        console.emit_json(counts if every else counts[0])
    elif every:
        rows = [_row(count["config"], count["total"], count["frozen"], count["nemo"]) for count in counts]
        console.table("Parameters", ["preset", ">total", ">frozen", ">NeMo 3.0.0", ">difference"], rows)
    else:
        _show(counts[0])


def _counted(name: str, overrides: list[str], depth: int) -> dict[str, Any]:
    config = _load(name, overrides)
    from nestcli.model.count import NEMO_VERSION, count_parameters, nemo_count

    counted, theirs = count_parameters(config), nemo_count(config)
    modules = {module: trainable + frozen for module, (trainable, frozen) in counted.to_depth(depth).items()}
    return {
        "config": name,
        "total": counted.total,
        "trainable": counted.trainable,
        "frozen": counted.frozen,
        "modules": modules,
        "nemo": {
            "version": NEMO_VERSION,
            "total": theirs,
            "difference": None if theirs is None else counted.total - theirs,
        },
    }


def _load(name: str, overrides: list[str]) -> DictConfig:
    if name.endswith(CHECKPOINTS):
        from nestcli.checkpoint.load import checkpoint_config

        return checkpoint_config(name, overrides)
    from nestcli.config import load_config

    return load_config(name, overrides)


def _show(count: dict[str, Any]) -> None:
    rows = [(module, f"{number:,}") for module, number in count["modules"].items()]
    rows += [("total", f"{count['total']:,}"), ("  trainable", f"{count['trainable']:,}")]
    rows += [("  frozen", f"{count['frozen']:,}")]
    nemo = count["nemo"]
    if nemo["total"] is None:
        rows.append((f"NeMo {nemo['version']}", "not recorded for these settings"))
    else:
        rows.append((f"NeMo {nemo['version']}", f"{nemo['total']:,} (difference {nemo['difference']})"))
    console.table(f"Parameters of {count['config']}", ["module", ">parameters"], rows)


def _row(name: str, total: int, frozen: int, nemo: dict[str, Any]) -> tuple[str, ...]:
    return name, f"{total:,}", f"{frozen:,}", f"{nemo['total']:,}", str(nemo["difference"])
