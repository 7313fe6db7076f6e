"""Depthwise-separable strided convolutions that shorten the features.

Axes: B batch, C channels, T time, D frequency, S sub-sampled frames, M model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from nestcli.model.fast import convolved, halved


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
        """Draw the weights again, in the order of construction."""
        for layer in (*self.conv, self.out):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return frames (B, S, M) and their valid lengths (B,)."""
        x_BSW, lengths_B = convolved(list(self.conv), features_BTD, lengths_B)
        return self.out(x_BSW), lengths_B


def _strided(channels_in: int, channels_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1, groups=groups)
