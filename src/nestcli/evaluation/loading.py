"""Functions for notebooks: load an encoder from a file, and audio to feed it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nestcli.audio.load import load_audio as read_samples
from nestcli.checkpoint.encoder import read_encoder
from nestcli.files import user_path
from nestcli.model.speech_encoder import SpeechEncoder


def load_encoder(checkpoint: str | os.PathLike[str], device: str | torch.device = "cpu") -> SpeechEncoder:
    """Load the encoder of a checkpoint, in evaluation mode, on `device`.

    `checkpoint` is a .nemo (of NEST, or of an ASR model with a FastConformer encoder), .ckpt or .safetensors file, a
    folder that transformers' Parakeet encoder loads, or "reference", the small encoder in this package. To fine-tune
    the encoder, call `train()` on it or on the module that contains it. Nothing in the file is executed. Raises
    CheckpointError, ConfigError.
    """
    return read_encoder(user_path(os.fspath(checkpoint))).build().to(device)


def load_audio(
    path: str | os.PathLike[str], sample_rate: int = 16_000, *, offset: float = 0.0, duration: float | None = None
) -> Tensor:
    """Load a file, or `duration` seconds of it from `offset` seconds on, as mono float32 samples (N,).

    Samples are at `sample_rate` Hz. Raises DataError.
    """
    return torch.from_numpy(
        read_samples(user_path(os.fspath(path)), sample_rate=sample_rate, offset=offset, duration=duration)
    )
