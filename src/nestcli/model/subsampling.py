"""Depthwise-separable strided convolutions that shorten the features.

Axes: B batch, C channels, T time, D frequency, S sub-sampled frames, M model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestcli.model.fast import convolve_by_pieces, halved, strides


class DepthwiseStridingSubsampling(nn.Module):
    """Convolutions of stride 2 on time and frequency, then a linear layer over (channel, frequency).

    Source: Fast Conformer (arXiv:2305.05084 section 2); NeMo `ConvSubsampling` with `dw_striding`.
    """

    def __init__(self, feat_in: int, d_model: int, channels: int, factor: int) -> None:
        super().__init__()
        stages = factor.bit_length() - 1
        layers: list[nn.Module] = [_strided(1, channels), nn.ReLU()]
        for _ in range(stages - 1):
            layers += [
                _strided(channels, channels, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        conv = nn.Sequential(*layers)
        bins = feat_in
        for _ in range(stages):
            bins = halved(bins)
        self.out = nn.Linear(channels * bins, d_model)  # registered before `conv`: the order of NeMo's state dict
        self.conv = conv

    def reset_parameters(self) -> None:
        """Draw the weights again, in the order in which they are built."""
        for layer in (*self.conv, self.out):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, S, M) and their valid lengths (B,)."""
        by_pieces = features_BTD.device.type == "cpu" and not features_BTD.requires_grad
        by_pieces = by_pieces and not torch.compiler.is_exporting()  # a graph has no stretches
        x_BSW, lengths_B = (self.convolve_by_pieces if by_pieces else self.convolve)(features_BTD, lengths_B)
        return self.out(x_BSW), lengths_B

    def convolve(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Convolved frames (B, S, channels * bins), zero beyond their valid lengths (B,)."""
        x_BCTD = features_BTD[:, None]
        for layer in self.conv:
            if strides(layer):
                # Only a strided layer looks at neighbours in time, so only its input must be clean of padding.
                x_BCTD = _zero_padding(x_BCTD, lengths_B)
                lengths_B = halved(lengths_B)
            x_BCTD = layer(x_BCTD)
        return _zero_padding(x_BCTD, lengths_B).transpose(1, 2).flatten(2), lengths_B

    def convolve_by_pieces(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """`convolve` as a processor does it sooner, but without gradients of the features."""
        return convolve_by_pieces(list(self.conv), features_BTD, lengths_B, self.out.in_features)


def _strided(channels_in: int, channels_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1, groups=groups)


def _zero_padding(x_BCTD: Tensor, lengths_B: Tensor) -> Tensor:
    padding_BT = torch.arange(x_BCTD.size(2), device=x_BCTD.device) >= lengths_B[:, None]
    return x_BCTD.masked_fill(padding_BT[:, None, :, None], 0.0)
