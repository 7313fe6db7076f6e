"""Depthwise-separable strided convolutions that shorten the features.

Axes: B batch, C channels, T time, D frequency, S sub-sampled frames, M model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_PIECE = 50  # frames; their largest intermediate result takes 8 MiB with 256 channels


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
            bins = _halved(bins)
        self.out = nn.Linear(channels * bins, d_model)  # registered before `conv`: the order of NeMo's state dict
        self.conv = conv

    def reset_parameters(self) -> None:
        """Draw the weights again, in the order in which they are built."""
        for layer in (*self.conv, self.out):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (B, S, M) and their valid lengths (B,)."""
        convolve = self.convolve_by_pieces if features_BTD.device.type == "cpu" else self.convolve
        x_BSW, lengths_B = convolve(features_BTD, lengths_B)
        return self.out(x_BSW), lengths_B

    def convolve(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Convolved frames (B, S, channels * bins), zero beyond their valid lengths (B,)."""
        x_BCTD = features_BTD[:, None]
        for layer in self.conv:
            if _strides(layer):
                # Only a strided layer looks at neighbours in time, so only its input must be clean of padding.
                x_BCTD = _zero_padding(x_BCTD, lengths_B)
                lengths_B = _halved(lengths_B)
            x_BCTD = self._applied(layer, x_BCTD, time_padding=1)
        return _zero_padding(x_BCTD, lengths_B).transpose(1, 2).flatten(2), lengths_B

    def convolve_by_pieces(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """`convolve` in stretches of frames that stay in the processor's cache; only valid frames are computed.

        The first layer alone makes 131 MB of 64 s of audio, ten times what it was made of.
        """
        stages = sum(map(_strides, self.conv))
        n_frames, frames_B = features_BTD.size(1), lengths_B
        for _ in range(stages):
            n_frames, frames_B = _halved(n_frames), _halved(frames_B)
        rows = []
        for features_TD, length, valid in zip(features_BTD, lengths_B.tolist(), frames_B.tolist(), strict=True):
            starts = range(0, valid, _PIECE)
            pieces = [self._piece(features_TD, length, start, min(start + _PIECE, valid)) for start in starts]
            pieces = pieces or [features_BTD.new_zeros(0, self.out.in_features)]
            rows.append(F.pad(torch.cat(pieces), (0, 0, 0, n_frames - valid)))
        return torch.stack(rows), frames_B

    def _piece(self, features_TD: Tensor, length: int, start: int, stop: int) -> Tensor:
        """Convolved frames start to stop (S, channels * bins) of one item with `length` valid feature frames."""
        spans = [(start, stop)]  # of every strided layer's input, the outermost first, and of the output
        for _ in range(sum(map(_strides, self.conv))):
            first, last = spans[0]
            spans.insert(0, (2 * first - 1, 2 * last))
        x_1CTD, begins, layers = features_TD[None, None], 0, list(self.conv)
        if len(layers) > 2:  # the first layer's result is the largest by far, and made anew sooner than kept
            x_1CTD = checkpoint(
                self._through, x_1CTD, begins, length, layers[:3], spans, use_reentrant=False, preserve_rng_state=False
            )
            begins, length, layers, spans = spans[2][0], _halved(_halved(length)), layers[3:], spans[2:]
        return self._through(x_1CTD, begins, length, layers, spans).squeeze(0).transpose(0, 1).flatten(1)

    def _through(
        self, x_1CTD: Tensor, begins: int, length: int, layers: list[nn.Module], spans: list[tuple[int, int]]
    ) -> Tensor:
        """Layers one after another on frames from `begins` on; strided ones on the first span, to give the second."""
        for layer in layers:
            if _strides(layer):
                x_1CTD, begins = _stretch(x_1CTD, begins, spans[0], length), spans[1][0]
                length, spans = _halved(length), spans[1:]
            x_1CTD = self._applied(layer, x_1CTD, time_padding=0)
        return x_1CTD

    def _applied(self, layer: nn.Module, x_BCTD: Tensor, time_padding: int) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return x_BCTD.relu_()
        weight = layer.weight.contiguous(memory_format=torch.channels_last)  # 2 to 8 times as fast on processors
        padding = (time_padding, 1) if _strides(layer) else 0
        return F.conv2d(x_BCTD, weight, layer.bias, layer.stride, padding, groups=layer.groups)


def _strided(channels_in: int, channels_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1, groups=groups)


def _strides(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.stride[0] == 2


def _halved(length):  # type: ignore[no-untyped-def]  # int or Tensor
    """Length after a convolution of kernel 3, stride 2 and padding 1."""
    return (length - 1) // 2 + 1


def _zero_padding(x_BCTD: Tensor, lengths_B: Tensor) -> Tensor:
    padding_BT = torch.arange(x_BCTD.size(2), device=x_BCTD.device) >= lengths_B[:, None]
    return x_BCTD.masked_fill(padding_BT[:, None, :, None], 0.0)


def _stretch(x_BCTD: Tensor, begins: int, span: tuple[int, int], length: int) -> Tensor:
    """Frames `span` of a tensor whose first one is number `begins`; zeros before frame 0 and from `length` on."""
    start, stop = max(span[0], 0), min(span[1], length)
    x_BCTD = x_BCTD[:, :, start - begins : stop - begins]
    return F.pad(x_BCTD, (0, 0, start - span[0], span[1] - stop)) if (start, stop) != span else x_BCTD
