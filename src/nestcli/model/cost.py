"""Cost of training: memory held from step to step, and arithmetic per second of audio.

Sizes: B clips in a batch, T feature frames, D mel bins, S sub-sampled frames and tokens, M model width, C codes,
G codebooks, E code width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nestcli.errors import ConfigError
from nestcli.model.config import NestConfig
from nestcli.model.count import skeleton
from nestcli.model.loss import MaskedTokenLoss
from nestcli.model.masking import draw_mask

_MOMENTS = 2  # numbers that AdamW keeps for every parameter, in the parameter's type
_STEP_BYTES = 4  # AdamW's step count, one fp32 number for each parameter tensor
_FRAMES_DRAWN = 400_000  # frames to mask when estimating the share of predicted tokens; a rough share is enough


@dataclass(frozen=True)
class Memory:
    """Bytes that every process holds throughout training; docs/parameters.md lists what it needs besides."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_memory(config: DictConfig) -> Memory:
    """Return the memory of the weights, in training's types, and of the gradients and AdamW's states.

    Frozen parameters have neither gradient nor state. Nor has the quantizer, even if it is not frozen: tokens are
    computed without gradients.
    """
    model = skeleton(config)
    if precision_of(config) == "bf16-true":
        model.use_half(torch.bfloat16)
    frozen = {id(parameter) for parameter in model.quantizer.parameters()}
    learning = [value for value in model.parameters() if value.requires_grad and id(value) not in frozen]
    gradients = _bytes(learning)
    return Memory(
        weights=_bytes([*model.parameters(), *model.buffers()]),
        gradients=gradients,
        optimizer=_MOMENTS * gradients + _STEP_BYTES * len(learning),
    )


def precision_of(config: DictConfig) -> str:
    """Return the `trainer.precision` key, 32 by default."""
    return str(OmegaConf.select(config, "trainer.precision", default=32))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products and convolutions; a multiply-add counts as 2."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        """Work of forward and backward pass. The optimiser's is excluded: it does not depend on the audio."""
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Work:
        return Work(self.forward * factor, self.backward * factor)


def work_per_second(config: DictConfig, seconds: float) -> dict[str, Work]:
    """Return the work of each part of the model per second of audio, in full batches of clips of `seconds`."""
    nest = NestConfig.from_config(config)
    samples = round(seconds * nest.preprocessor.sample_rate)
    batch = batch_size(config, seconds)
    selected = batch * tokens_of(nest, samples) * selected_share(nest, samples)
    parts = batch_work(nest, samples, batch, selected)
    return {part: work * (1 / (batch * seconds)) for part, work in parts.items()}


def batch_size(config: DictConfig, seconds: float) -> int:
    """Return the number of clips of `seconds` in a training batch, at least 1. Raises ConfigError."""
    size = OmegaConf.select(config, "model.train_ds.batch_size", throw_on_missing=False)
    duration = OmegaConf.select(config, "model.train_ds.batch_duration", throw_on_missing=False)
    if size is None and isinstance(duration, int | float):
        return max(1, int(duration // seconds))
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"model.train_ds.batch_size: {size!r} is not a number of utterances, give at least 1.")
    return size


def batch_work(nest: NestConfig, samples: int, batch: int, selected: float) -> dict[str, Work]:
    """Return the work of each part for `batch` clips of `samples` samples with `selected` predicted tokens.

    In the backward pass, the gradient of each factor of a product costs as much as the product. Features and the table
    of positions have no gradient; the table is projected once for the whole batch.
    """
    encoder, quantizer, decoder = nest.encoder, nest.quantizer, nest.decoder
    frames = 1 + samples // nest.preprocessor.hop_length
    B, S, M, layers = batch, tokens_of(nest, samples), encoder.d_model, encoder.n_layers
    R = 2 * S - 1
    mel = 2 * B * frames * nest.preprocessor.features * (1 + nest.preprocessor.n_fft // 2)
    projection = quantizer.feat_in * quantizer.combine_time_steps * quantizer.num_books * quantizer.code_dim
    codes = quantizer.num_books * quantizer.code_dim * quantizer.num_classes
    products = 4 * S * M * M + (2 * S * S + S * R) * M
    convolution = 3 * S * M * M + S * M * encoder.conv_kernel_size
    width = encoder.width_out
    parts = {
        "features": Work(2 * mel, 0),  # of the clean and of the noisy audio
        "quantizer": Work(2 * B * S * (projection + codes), 0),
        "subsampling": _subsampling(nest, samples) * B,
        "attention": _both(2 * B * layers * products) + _one(2 * layers * R * M * M),
        "feed_forward": _both(2 * B * layers * 4 * encoder.ff_expansion_factor * S * M * M),
        "convolution": _both(2 * B * layers * convolution),
        "decoder": _both(2 * selected * width * decoder.num_classes * decoder.num_decoders),
    }
    if width != M:
        parts["output"] = _both(2 * B * S * M * width)
    return parts


def _both(forward: float) -> Work:
    """Return the work of a product whose factors both have a gradient."""
    return Work(forward, 2 * forward)


def _one(forward: float) -> Work:
    """Return the work of a product of which only the weights have a gradient."""
    return Work(forward, forward)


def _subsampling(nest: NestConfig, samples: int) -> Work:
    """Return the work for one clip; with post_conv the clean audio is sub-sampled too, without gradients."""
    encoder = nest.encoder
    channels = encoder.subsampling_channels
    time, bins, first = _padded_frames(nest, samples), encoder.feat_in, True
    work = Work(0, 0)
    for _ in range(encoder.subsampling_factor.bit_length() - 1):
        time, bins = (time - 1) // 2 + 1, (bins - 1) // 2 + 1
        strided = 2 * time * bins * channels * 9  # depthwise, or from the one channel of the features
        work += _one(strided) if first else _both(strided) + _both(2 * time * bins * channels * channels)
        first = False
    work += _both(2 * time * bins * channels * encoder.d_model)
    return work + Work(work.forward, 0) if nest.mask_after_subsampling else work


def _padded_frames(nest: NestConfig, samples: int) -> int:
    frames = 1 + samples // nest.preprocessor.hop_length
    return frames + -frames % nest.preprocessor.pad_to


def tokens_of(nest: NestConfig, samples: int) -> int:
    """Return the number of sub-sampled frames of a clip, padding included."""
    return _padded_frames(nest, samples) // nest.encoder.subsampling_factor


def selected_share(nest: NestConfig, samples: int) -> float:
    """Draw masks to find the share of a clip's tokens that is predicted."""
    frames, padded = samples // nest.preprocessor.hop_length, _padded_frames(nest, samples)
    if nest.mask_after_subsampling:
        factor = nest.encoder.subsampling_factor
        frames, padded = -(-frames // factor), padded // factor
    clips = min(256, max(8, _FRAMES_DRAWN // padded))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mask_BT = draw_mask(torch.full((clips,), frames), padded, nest.masking)
    return float(MaskedTokenLoss(nest.loss).select(mask_BT).float().mean())


# ---- utilisation: the work of batches, as a share of what the device could do in the same time ----

# Operations per second of dense matrix products, from NVIDIA's data sheets; the key is part of the device's name.
_DATA_SHEETS = {
    "H200": {"32": 67e12, "tf32": 494e12, "bf16": 989e12},
    "H100": {"32": 67e12, "tf32": 494e12, "bf16": 989e12},
    "A100": {"32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
}
_CLIP_SECONDS = 10.0  # of the clips that estimate the share of predicted tokens


def peak_of(device: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return the operations per second of a device's data sheet in a precision of training; None if it is unknown.

    `precision` is a value of `trainer.precision`; `tf32` tells whether products in fp32 are rounded to TF32.
    """
    kind = "bf16" if precision.startswith(("bf16", "16")) else "tf32" if tf32 else "32"
    return next((peaks[kind] for name, peaks in _DATA_SHEETS.items() if name in device), None)


class Utilisation:
    """Adds up the work of training batches, padding included; with `peak` None nothing is counted."""

    def __init__(self, nest: NestConfig, peak: float | None) -> None:
        self.nest, self.peak = nest, peak
        self._share = selected_share(nest, round(_CLIP_SECONDS * nest.preprocessor.sample_rate)) if peak else 0.0
        self._known: dict[tuple[int, int], float] = {}  # work by clips and samples: epochs repeat the sizes
        self._done = 0.0

    def add(self, clips: int, samples: int) -> None:
        """Count forward and backward pass of a batch of `clips` clips, each padded to `samples` samples."""
        if self.peak is None:
            return
        if (clips, samples) not in self._known:
            selected = clips * tokens_of(self.nest, samples) * self._share
            work = batch_work(self.nest, samples, clips, selected)
            self._known[clips, samples] = sum(each.step for each in work.values())
        self._done += self._known[clips, samples]

    def take(self, seconds: float) -> float | None:
        """Return the utilisation over the seconds since the last call, and begin again; None without a peak."""
        done, self._done = self._done, 0.0
        return None if self.peak is None else done / max(seconds, 1e-9) / self.peak
