"""`nest export`: a checkpoint in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestcli.cli import console
from nestcli.errors import ConfigError

_LATER = ("safetensors", "transformers", "onnx")


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="A .ckpt of `nest pretrain`, or a .nemo file.", show_default=False),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="nemo: a .nemo file, for NeMo.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite PATH if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Hand a model on: its configuration and weights, in the format of another tool."""
    _check(to, out, force)
    from nestcli.checkpoint.load import load_checkpoint
    from nestcli.checkpoint.nemo import write_nemo

    loaded = load_checkpoint(checkpoint)
    write_nemo(out, loaded.config, loaded.state_dict)
    size, tensors = out.stat().st_size, len(loaded.state_dict)
    if as_json:
        console.emit_json({"checkpoint": checkpoint, "format": to, "path": str(out), "bytes": size, "tensors": tensors})
    else:
        console.line(f"{out}: {tensors} tensors, {size:,} bytes")


def _check(to: str, out: Path, force: bool) -> None:
    if to in _LATER:
        raise ConfigError(f"--to {to} is not there yet: only --to nemo is.")
    if to != "nemo":
        raise ConfigError(f"--to {to}: there is no such format. Known: nemo.")
    if out.suffix != ".nemo":
        raise ConfigError(f"--out {out}: the name of a .nemo file ends with .nemo.")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Name a file in it: {out / 'model.nemo'}")
    if out.exists() and not force:
        raise ConfigError(f"--out {out} is there already. Add --force to overwrite it.")
