"""`nest export`: write a checkpoint in the format of another tool."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nestcli.cli import console
from nestcli.cli.options import AsJson
from nestcli.errors import ConfigError

if TYPE_CHECKING:
    from nestcli.checkpoint.onnx import Part

# For each of WRITERS in checkpoint/export.py, which this module does not import at start-up; empty for a folder.
_SUFFIXES = {"nemo": ".nemo", "safetensors": ".safetensors", "transformers": "", "onnx": ".onnx"}
_PARTS = ("all", "encoder")
_OF_EXPORT = re.compile(  # files of a transformers folder, and files that users commonly add there
    r"(preprocessor_|generation_|processor_|tokenizer_)?config\.json|model.*\.safetensors(\.index\.json)?|README\.md"
)


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .ckpt of `nest pretrain`, a .nemo or a .safetensors file, or `reference`: the small encoder that "
            "comes with nest. For transformers and onnx, also another "
            "model with a FastConformer encoder (a .nemo file, or a folder of Hugging Face transformers).",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="nemo: the whole model, for NeMo. safetensors: the whole model, in one file without pickle. "
            "transformers: the encoder, as a folder for Hugging Face transformers (class ParakeetEncoder). onnx: the "
            "encoder, as an ONNX graph.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="Output file; for transformers, a folder.")],
    part: Annotated[
        str,
        typer.Option(
            "--part", metavar="PART", help="Input of an ONNX graph: all (audio) or encoder (log-mel features)."
        ),
    ] = "all",
    force: Annotated[bool, typer.Option("--force", help="Replace PATH if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export a model to the format of another tool.

    Reads the written file back and compares it with the model.
    """
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
        raise ConfigError(f"--to {to}: unknown format. Known: {', '.join(_SUFFIXES)}.")
    if part not in _PARTS or (part != "all" and to != "onnx"):
        raise ConfigError(f"--part {part}: only --to onnx has parts: {' and '.join(_PARTS)}.")
    suffix = _SUFFIXES[to]
    if suffix and out.suffix != suffix:
        raise ConfigError(f"--out {out}: the file name must end with {suffix}.")
    try:
        _check_place(out, suffix, force)
    except (OSError, ValueError) as error:  # a name that is too long or contains a zero byte
        raise ConfigError(f"--out {out}: {getattr(error, 'strerror', None) or error}.") from None


def _check_place(out: Path, suffix: str, force: bool) -> None:
    """Raise ConfigError for a place that cannot be written to or whose files would be lost, before any computation."""
    if out.name in ("", ".."):
        raise ConfigError(f"--out {out}: name a {'file' if suffix else 'new folder'} in it.")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out}: {above} is a file, not a folder. Name another place.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {out}: {above} is not writable. Name another place, or change its permissions.")
    if suffix and out.is_dir():
        raise ConfigError(f"--out {out} is a folder. Name a file in it: {out / f'model{suffix}'}")
    if not suffix and out.is_file():
        raise ConfigError(f"--out {out} is a file. transformers needs a folder: name a new one.")
    if not out.exists():
        return
    there = [] if suffix else sorted(each.name for each in out.iterdir())
    if not force and (suffix or there):
        raise ConfigError(f"--out {out} already exists. Add --force to overwrite it.")
    if others := [name for name in there if not _OF_EXPORT.fullmatch(name)]:
        raise ConfigError(
            f"--out {out} contains {others[0]}, which is not part of an export; --force would delete it. "
            "Name a new folder."
        )
