"""`nest export`: a checkpoint in another tool's format."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nestcli.cli import console
from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from nestcli.checkpoint.onnx import Part

# For each of WRITERS in checkpoint/export.py, which this module does not import at start-up; empty for a folder.
_SUFFIXES = {"nemo": ".nemo", "safetensors": ".safetensors", "transformers": "", "onnx": ".onnx"}
_PARTS = ("all", "encoder")
_OF_EXPORT = re.compile(  # names in a folder of transformers, and what its users put beside them
    r"(preprocessor_|generation_|processor_|tokenizer_)?config\.json|model.*\.safetensors(\.index\.json)?|README\.md"
)


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .ckpt of `nest pretrain`, a .nemo or .safetensors file; for transformers and onnx also another "
            "model with a FastConformer encoder (.nemo, or a folder of transformers).",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="nemo: the whole model, for NeMo. safetensors: the whole model without pickle. transformers: a folder "
            "for ParakeetEncoder. onnx: the encoder as a graph.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="The file, or for transformers the folder.")],
    part: Annotated[
        str, typer.Option("--part", help="Of onnx. all: from audio on; encoder: from log-mel features on.")
    ] = "all",
    force: Annotated[bool, typer.Option("--force", help="Replace PATH if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Hand a model on in the format of another tool; what was written is read again and compared."""
    _check(to, out, part, force)
    console.note("loading ...")
    from nestcli.checkpoint import export as formats

    done = formats.export(checkpoint, to, out, part=cast("Part", part), force=force)
    if as_json:
        document = {"checkpoint": checkpoint, "format": to, "path": str(out), "bytes": done.n_bytes}
        verified = {"verified": done.verified, "difference": done.difference}
        console.emit_json({**document, "tensors": done.tensors, **verified})
        return
    console.line(f"{out}: {done.tensors} tensors, {done.n_bytes:,} bytes")
    difference = "" if done.difference is None else f" (largest difference {done.difference:.2g})"
    console.line(f"{done.verified}{difference}")


def _check(to: str, out: Path, part: str, force: bool) -> None:
    if to not in _SUFFIXES:
        raise ConfigError(f"--to {to}: there is no such format. Known: {', '.join(_SUFFIXES)}.")
    if part not in _PARTS or (part != "all" and to != "onnx"):
        raise ConfigError(f"--part {part}: only --to onnx has parts: {' and '.join(_PARTS)}.")
    suffix = _SUFFIXES[to]
    if suffix and out.suffix != suffix:
        raise ConfigError(f"--out {out}: the name of such a file ends with {suffix}.")
    try:
        _check_place(out, suffix, force)
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte
        raise ConfigError(f"--out {out}: {getattr(error, 'strerror', None) or error}.") from None


def _check_place(out: Path, suffix: str, force: bool) -> None:
    """Refuse a place where nothing can be written, or where something would be lost, before anything is computed."""
    if out.name in ("", ".."):
        raise ConfigError(f"--out {out}: name a {'file' if suffix else 'new folder'} in it.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out}: {above} is a file, not a folder. Name another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out}: nothing may be written to {above}. Name another place, or change its permissions."
        )
    if suffix and out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Name a file in it: {out / f'model{suffix}'}")
    if not suffix and out.is_file():
        raise ConfigError(f"--out {out} is a file. Transformers wants a folder: name one that is not there yet.")
    if not out.exists():
        return
    there = [] if suffix else sorted(each.name for each in out.iterdir())
    if not force and (suffix or there):
        raise ConfigError(f"--out {out} is there already. Add --force to overwrite it.")
    if others := [name for name in there if not _OF_EXPORT.fullmatch(name)]:
        raise ConfigError(
            f"--out {out} holds {others[0]}, which is no file of an export; --force would remove it. Name a new folder."
        )
