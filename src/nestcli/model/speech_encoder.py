"""The encoder for use after pretraining: waveforms in, features of any layer out.

Axes: B batch, N samples, D mel bins, T feature frames, L chosen layers, S frames, M model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from nestcli.model.config import EncoderConfig, PreprocessorConfig
from nestcli.model.conformer import ConformerEncoder
from nestcli.model.features import LogMelPreprocessor

# The output of a layer, counted from 0, or backwards from -1; `input` is the input of layer 0.
Layer: TypeAlias = int | Literal["input"]
Layers: TypeAlias = Sequence[Layer] | Literal["all", "last"]


class Encoded(NamedTuple):
    """Features (B, S, M), or (B, L, S, M) of chosen layers, and the number of valid frames of each item (B,).

    Frames beyond an item's length are padding: ignore them.
    """

    features: Tensor
    lengths: Tensor


class SpeechEncoder(nn.Module):
    """Log-mel preprocessor and FastConformer encoder, with the names of weights that NEST and NeMo use.

    `load_encoder` makes one from a checkpoint. It is an ordinary module: put it into another one to fine-tune it. Call
    `eval()` to extract features; in training mode it applies dither and dropout, as in pretraining.
    """

    def __init__(self, preprocessor: PreprocessorConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.preprocessor = LogMelPreprocessor(preprocessor)
        self.encoder = ConformerEncoder(encoder)

    @property
    def sample_rate(self) -> int:
        """Sample rate of the audio to pass in, in Hz."""
        return self.preprocessor.config.sample_rate

    @property
    def frame_seconds(self) -> float:
        """Seconds from one frame to the next."""
        return self.preprocessor.config.window_stride * self.encoder.config.subsampling_factor

    @property
    def width(self) -> int:
        """M, the width of every layer's frames."""
        return self.encoder.config.d_model

    @property
    def n_layers(self) -> int:
        return len(self.encoder.layers)

    def chosen(self, layers: Layers) -> list[int]:
        """Return the indices of layers in [input, layer 0, layer 1, ...]. Raises ValueError for an unknown one."""
        if layers == "all":
            return list(range(1, self.n_layers + 1))
        if layers == "last":
            return [self.n_layers]
        return [self._place(layer) for layer in layers]

    def _place(self, layer: Layer | str) -> int:
        if layer == "input":
            return 0
        if not isinstance(layer, int) or not -self.n_layers <= layer < self.n_layers:
            raise ValueError(f"layer {layer} does not exist: the {self.n_layers} layers are 0 to {self.n_layers - 1}.")
        return layer % self.n_layers + 1

    def forward(self, audio: Tensor, lengths: Tensor | None = None, *, layers: Layers | None = None) -> Encoded:
        """Encode waveforms (B, N), or one of (N,), of `lengths` (B,) samples (all of them, by default).

        Features are (B, S, M) of the whole encoder, or (B, L, S, M) of the outputs of the named layers. Raises
        ValueError if a layer does not exist or the audio is shorter than a feature frame (10 ms).
        """
        audio_BN = audio[None] if audio.dim() == 1 else audio
        if lengths is None:
            lengths = torch.full(audio_BN.shape[:1], audio_BN.shape[1], device=audio_BN.device)
        if audio_BN.size(1) < self.preprocessor.config.hop_length:
            raise ValueError(f"{audio_BN.size(1)} samples are less than one frame.")
        hop, factor = self.preprocessor.config.hop_length, self.encoder.config.subsampling_factor
        n_frames = -(-(audio_BN.size(1) // hop) // factor)
        encoded = self.encode_features(*self.preprocessor(audio_BN, lengths), layers=layers)  # padded to whole tokens
        return Encoded(encoded.features[..., :n_frames, :], encoded.lengths)

    def encode_features(self, features_BDT: Tensor, frames_B: Tensor, *, layers: Layers | None = None) -> Encoded:
        """Encode features (B, D, T) as the preprocessor returns them, of `frames_B` valid frames (B,).

        The result is as that of `forward`. Raises ValueError if a layer does not exist.
        """
        places = None if layers is None else self.chosen(layers)
        dtype = self.encoder.pre_encode.out.weight.dtype
        subsampled_BSM, frames_B = self.encoder.pre_encode(features_BDT.transpose(1, 2).to(dtype), frames_B)
        by_layer: list[Tensor] | None = None if places is None else []
        encoded_BSM, frames_B = self.encoder.encode(subsampled_BSM, frames_B, by_layer)
        if by_layer is None or places is None:
            return Encoded(encoded_BSM, frames_B)
        return Encoded(torch.stack([by_layer[place] for place in places], 1), frames_B)
