"""One softmax head a codebook on the encoder's frames.

Axes: N frames in any arrangement, M model width, C codes, G codebooks, B batch, S sub-sampled frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.bounds import within


@dataclass(frozen=True)
class DecoderConfig:
    """The `model.decoder` block."""

    feat_in: int
    num_classes: int
    num_decoders: int
    squeeze_single: bool
    use_bias: bool

    def __post_init__(self) -> None:
        within(self, 1, 1 << 16, "feat_in")
        within(self, 2, 1 << 24, "num_classes")
        within(self, 1, 1 << 12, "num_decoders")


class MultiSoftmaxDecoder(nn.Module):
    """A linear layer from frames to the codes of every codebook; output channel = code * books + book.

    Source: arXiv:2202.01855 section 3; NeMo `MultiSoftmaxDecoder`, whose parameters are those of a 1x1 convolution.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.num_classes * config.num_decoders
        self.decoder_layers = nn.Sequential(nn.Conv1d(config.feat_in, channels, 1, bias=config.use_bias))
        nn.init.xavier_uniform_(self.layer.weight)

    @property
    def layer(self) -> nn.Conv1d:
        """The one layer; its place in a list is NeMo's."""
        layer = self.decoder_layers[0]
        assert isinstance(layer, nn.Conv1d)
        return layer

    def reset_parameters(self) -> None:
        """Draw the weights again: PyTorch's default, then Xavier's uniform for the matrix, as at construction."""
        self.layer.reset_parameters()
        nn.init.xavier_uniform_(self.layer.weight)

    def forward(self, frames_NM: Tensor) -> Tensor:
        """Logits (..., C, G) of frames (..., M)."""
        logits = F.linear(frames_NM, self.layer.weight.squeeze(-1), self.layer.bias)
        return logits.unflatten(-1, (self.config.num_classes, self.config.num_decoders))

    def log_probs(self, encoded_BSM: Tensor) -> Tensor:
        """Log-probabilities (B, S, C, G), or (B, S, C) with one codebook and `squeeze_single`."""
        log_probs = self(encoded_BSM).log_softmax(-2)
        return log_probs.squeeze(-1) if self.config.squeeze_single and self.config.num_decoders == 1 else log_probs
