"""Export the encoder as an ONNX graph for any batch size and length, with or without log-mel features in the graph.

Axes: B batch, N samples, D mel bins, T feature frames, S frames, M model width.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nestcli.checkpoint.atomic import atomic_file
from nestcli.errors import CheckpointError, MissingDependencyError
from nestcli.model.speech_encoder import SpeechEncoder

Part: TypeAlias = Literal["all", "encoder"]
OPSET = 18
_LARGEST = (2 << 30) - (1 << 24)  # bytes of weights in one protobuf file, with room for the graph
_TRACED_SECONDS = 2.5
_HINT = 'pip install "nestcli[onnx]"'


class FromFeatures(nn.Module):
    """Encode log-mel features (B, D, T) with frame counts (B,) into frames (B, S, M) with counts (B,)."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.whole = encoder

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        encoded: tuple[Tensor, Tensor] = self.whole.encoder(features, lengths)
        return encoded


class FromAudio(nn.Module):
    """Encode waveforms (B, N) with sample counts (B,) into frames (B, S, M) with counts (B,)."""

    def __init__(self, encoder: SpeechEncoder) -> None:
        super().__init__()
        self.whole = encoder

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features_BDT, frames_B = self.whole.preprocessor(audio, lengths)
        encoded: tuple[Tensor, Tensor] = self.whole.encoder(features_BDT, frames_B)
        return encoded


def write_onnx(path: str | os.PathLike[str], encoder: SpeechEncoder, part: Part = "all") -> None:
    """Write an encoder in evaluation mode, atomically; batch size and length stay dynamic.

    Inputs: `audio` (B, N) or `features` (B, D, T), and `lengths` (B,) int64. Outputs: `encoded` (B, S, M) and
    `encoded_lengths` (B,). Ignore frames beyond an item's length. Raises CheckpointError for weights that do not fit
    into one file, MissingDependencyError without onnx.
    """
    size = sum(value.numel() * value.element_size() for value in encoder.state_dict().values())
    if size > _LARGEST:
        raise CheckpointError(
            f"{path}: weights of {size:,} bytes do not fit into one ONNX file of 2 GiB. Export as safetensors."
        )
    module, inputs, names = _module(encoder.eval(), part)
    axes = {names[0]: {0: "batch", inputs[0].dim() - 1: "time"}, names[1]: {0: "batch"}}
    with _quiet():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=names,
            output_names=["encoded", "encoded_lengths"],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for key, value in _facts(encoder, part).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, str(value)
    with atomic_file(path) as file:
        file.write(proto.SerializeToString())


def onnx_difference(path: str | os.PathLike[str], encoder: SpeechEncoder, part: Part = "all") -> float | None:
    """Return the largest difference on valid frames between the graph in onnxruntime and the module.

    The shapes differ from those that were traced. Returns None without onnxruntime, infinity if the lengths differ.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    module, _, names = _module(encoder.eval(), part)
    largest = 0.0
    for items, seconds in ((1, 1.0), (3, 4.1)):
        audio_BN, lengths_B = _noise(encoder, items, seconds)
        inputs = (audio_BN, lengths_B) if part == "all" else encoder.preprocessor(audio_BN, lengths_B)
        with torch.no_grad():
            ours_BSM, frames_B = module(*inputs)
        theirs_BSM, theirs_B = session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))
        if theirs_B.tolist() != frames_B.tolist():
            return float("inf")
        for ours_SM, theirs_SM, frames in zip(ours_BSM, torch.from_numpy(theirs_BSM), frames_B, strict=True):
            largest = max(largest, float((ours_SM[:frames] - theirs_SM[:frames]).abs().max()))
    return largest


def _module(encoder: SpeechEncoder, part: Part) -> tuple[nn.Module, tuple[Tensor, Tensor], list[str]]:
    audio_BN, lengths_B = _noise(encoder, 2, _TRACED_SECONDS)
    if part == "all":
        return FromAudio(encoder).eval(), (audio_BN, lengths_B), ["audio", "lengths"]
    return FromFeatures(encoder).eval(), encoder.preprocessor(audio_BN, lengths_B), ["features", "lengths"]


def _noise(encoder: SpeechEncoder, items: int, seconds: float) -> tuple[Tensor, Tensor]:
    """Return a batch of noise with unequal lengths, the same at every call."""
    drawn = torch.Generator().manual_seed(items)
    samples = int(seconds * encoder.sample_rate)
    lengths_B = torch.linspace(samples, samples / 2, items).long()
    return 0.1 * torch.randn(items, samples, generator=drawn), lengths_B


def _facts(encoder: SpeechEncoder, part: Part) -> dict[str, Any]:
    return {
        "nest.part": part,
        "nest.sample_rate": encoder.sample_rate,
        "nest.frame_seconds": encoder.frame_seconds,
        "nest.width": encoder.encoder.config.width_out,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on optional packages and on its progress.

    Raises MissingDependencyError without onnx or onnxscript.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"--to onnx needs onnx and onnxscript ({error}). Install them: {_HINT}") from None
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
