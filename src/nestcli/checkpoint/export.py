"""Write a checkpoint in another tool's format, and read the result again to verify it."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from nestcli.checkpoint.encoder import StoredEncoder, read_encoder
from nestcli.checkpoint.load import LoadedCheckpoint, load_checkpoint
from nestcli.checkpoint.nemo import write_nemo
from nestcli.checkpoint.onnx import Part, onnx_difference, write_onnx
from nestcli.checkpoint.safetensors_file import write_safetensors
from nestcli.checkpoint.transformers import write_transformers
from nestcli.errors import RunFailedError
from nestcli.model.speech_encoder import SpeechEncoder

Look: TypeAlias = Callable[[], tuple[str, float | None]]  # reads a result again: what was verified, the difference
Writer: TypeAlias = Callable[[str | os.PathLike[str], Path, Part, bool], tuple[int, Look]]
TOLERANCE = 1e-4  # largest difference of outputs on valid frames


@dataclass(frozen=True)
class Exported:
    """A written export and its verification; `difference` is None if nothing could be computed with it."""

    path: Path
    tensors: int
    n_bytes: int
    verified: str
    difference: float | None


def export(
    checkpoint: str | os.PathLike[str], to: str, out: Path, *, part: Part = "all", force: bool = False
) -> Exported:
    """Write a checkpoint as `to`, a key of WRITERS, at `out`, which is new unless `force` is set, and verify it.

    Raises CheckpointError, ConfigError, MissingDependencyError; RunFailedError if the result differs from the
    checkpoint or cannot be read. On any error, the previous file or folder at `out` is restored.
    """
    with _kept(out):
        return _export(checkpoint, to, out, part, force)


def _export(checkpoint: str | os.PathLike[str], to: str, out: Path, part: Part, force: bool) -> Exported:
    tensors, look = WRITERS[to](checkpoint, out, part, force)
    verified, difference = _verified(out, checkpoint, look)
    files = [out] if out.is_file() else list(out.iterdir())
    return Exported(out, tensors, sum(file.stat().st_size for file in files), verified, difference)


def _write_nemo(checkpoint: str | os.PathLike[str], out: Path, _part: Part, _force: bool) -> tuple[int, Look]:
    loaded = load_checkpoint(checkpoint)
    write_nemo(out, loaded.config, loaded.state_dict)
    return len(loaded.state_dict), partial(_whole, loaded, out)


def _write_safetensors(checkpoint: str | os.PathLike[str], out: Path, _part: Part, _force: bool) -> tuple[int, Look]:
    loaded = load_checkpoint(checkpoint)
    write_safetensors(out, loaded.config, loaded.state_dict)
    return len(loaded.state_dict), partial(_whole, loaded, out)


def _write_transformers(checkpoint: str | os.PathLike[str], out: Path, _part: Part, force: bool) -> tuple[int, Look]:
    stored = read_encoder(checkpoint)
    write_transformers(out, stored.config, stored.state_dict, force=force)
    return _encoder_tensors(stored), partial(_transformers, stored, out)


def _write_onnx(checkpoint: str | os.PathLike[str], out: Path, part: Part, _force: bool) -> tuple[int, Look]:
    stored = read_encoder(checkpoint)
    encoder = stored.build()
    write_onnx(out, encoder, part)
    return _encoder_tensors(stored), partial(_onnx, encoder, out, part)


# Each format's writer: it writes `out`, and returns the number of tensors and the function that reads `out` again.
WRITERS: dict[str, Writer] = {
    "nemo": _write_nemo,
    "safetensors": _write_safetensors,
    "transformers": _write_transformers,
    "onnx": _write_onnx,
}


def _encoder_tensors(stored: StoredEncoder) -> int:
    return sum(name.startswith("encoder.") for name in stored.state_dict)


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Restore the file or folder at a path if the block fails."""
    if not out.exists():
        yield
        return
    kept = out.with_name(f".{out.name}.{os.getpid()}.kept")
    try:
        if out.is_dir():
            shutil.copytree(out, kept, copy_function=_link)
        else:
            _link(out, kept)
        try:
            yield
        except BaseException:
            _remove(out)
            kept.rename(out)
            raise
    finally:
        _remove(kept)


def _link(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _verified(out: Path, checkpoint: str | os.PathLike[str], look: Look) -> tuple[str, float | None]:
    """Return the findings of `look`; remove `out` if it cannot be read or differs. Raises RunFailedError."""
    bug = "It was removed. This is a bug in nest, or of a version of the other library: please report both versions."
    try:
        verified, difference = look()
        if difference is not None and not difference <= TOLERANCE:
            raise RunFailedError(
                f"{out}: the export differs from {checkpoint} by {difference:.3g}, more than {TOLERANCE:g}. {bug}"
            )
    except RunFailedError:
        _remove(out)
        raise
    except Exception as error:  # the other library may raise anything
        _remove(out)
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunFailedError(f"{out}: the export cannot be used: {problem}. {bug}") from error
    except BaseException:
        _remove(out)
        raise
    return verified, difference


def _whole(loaded: LoadedCheckpoint, out: Path) -> tuple[str, float | None]:
    again = load_checkpoint(out)
    return "read again, all weights the same", _largest(loaded.state_dict, again.state_dict)


def _transformers(stored: StoredEncoder, out: Path) -> tuple[str, float | None]:
    encoder = {name: value for name, value in stored.state_dict.items() if name.startswith("encoder.")}
    weights = _largest(encoder, read_encoder(out).state_dict)
    try:
        output = _difference_in_transformers(out, stored)
    except ImportError as error:  # transformers is missing, or librosa, which its extractor needs up to 5.20
        why = str(error).strip().partition(". ")[0]
        return f"read again, all weights the same; no output was compared: {why}", weights
    return "loaded by transformers, features and output compared", max(weights, output)


def _difference_in_transformers(folder: Path, stored: StoredEncoder) -> float:
    """Return the largest difference between outputs on valid frames, for a padded batch of two noise utterances."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import ParakeetEncoder, ParakeetFeatureExtractor
        from transformers.utils import logging
    encoder, drawn = stored.build(), torch.Generator().manual_seed(1)
    audio = [0.1 * torch.randn(count, generator=drawn) for count in (encoder.sample_rate, 7 * encoder.sample_rate // 3)]
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        extractor = ParakeetFeatureExtractor.from_pretrained(folder)
        inputs = extractor([each.numpy() for each in audio], sampling_rate=encoder.sample_rate, return_tensors="pt")
        with torch.no_grad():
            theirs_BSM = ParakeetEncoder.from_pretrained(folder).eval()(**inputs).last_hidden_state
            ours = [encoder(each).features[0] for each in audio]
    finally:
        if shown:
            logging.enable_progress_bar()
    return max(float((theirs_BSM[i, : len(each)] - each).abs().max()) for i, each in enumerate(ours))


def _onnx(encoder: SpeechEncoder, out: Path, part: Part) -> tuple[str, float | None]:
    difference = onnx_difference(out, encoder, part)
    if difference is None:
        return "not verified: onnxruntime is not installed", None
    return "run by onnxruntime with other batch sizes and lengths", difference


def _largest(ours: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any weight; infinite if a weight is missing."""
    if any(name not in again for name in ours):
        return float("inf")
    return max(float((value.double() - again[name].double()).abs().max()) for name, value in ours.items())


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
