"""The sub-sampling's convolutions as a processor likes them: in stretches of frames that stay in its cache.

The first layer alone makes 131 MB of 64 s of audio, ten times what it was made of. Channels are the last axis, so that
pointwise convolutions are matrix products and depthwise ones run over neighbouring numbers. Only valid frames are
computed. `DepthwiseStridingSubsampling.convolve` is the plain way.

Axes: B batch, C channels, T time, D frequency, S sub-sampled frames; N windows of the first layer, K their places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PIECE = 50  # frames; their largest intermediate result takes 8 MiB with 256 channels
_aten = torch.ops.aten


def convolve_by_pieces(
    layers: Sequence[nn.Module], features_BTD: Tensor, lengths_B: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Convolved frames (B, S, width), zero beyond their valid lengths (B,). The features get no gradient."""
    n_frames, frames_B = features_BTD.size(1), lengths_B
    for _ in range(sum(map(strides, layers))):
        n_frames, frames_B = halved(n_frames), halved(frames_B)
    rows = []
    for features_TD, length, valid in zip(features_BTD, lengths_B.tolist(), frames_B.tolist(), strict=True):
        spans = ((start, min(start + _PIECE, valid)) for start in range(0, valid, _PIECE))
        pieces = [_piece(layers, features_TD, length, *span) for span in spans]
        pieces = pieces or [features_BTD.new_zeros(0, width)]
        rows.append(F.pad(torch.cat(pieces), (0, 0, 0, n_frames - valid)))
    return torch.stack(rows), frames_B


def strides(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.stride[0] == 2


def halved(length):  # type: ignore[no-untyped-def]  # int or Tensor
    """Length after a convolution of kernel 3, stride 2 and padding 1."""
    return (length - 1) // 2 + 1


def _piece(layers: Sequence[nn.Module], features_TD: Tensor, length: int, start: int, stop: int) -> Tensor:
    """Convolved frames start to stop (S, channels * bins) of one item with `length` valid feature frames."""
    spans = [(start, stop)]  # of every strided layer's input, the outermost first, and of the output
    for _ in range(sum(map(strides, layers))):
        first, last = spans[0]
        spans.insert(0, (2 * first - 1, 2 * last))
    x_TDC, begins = features_TD[:, :, None], 0
    if len(layers) > 2:
        between = halved(length)
        outside = max(0, -spans[1][0]), max(0, spans[1][1] - between)
        x_TDC, begins = _first_two(layers, _stretch(x_TDC, 0, spans[0], length), outside), spans[2][0]
        length, layers, spans = halved(between), layers[3:], spans[2:]
    for layer in layers:
        if strides(layer):
            x_TDC, begins = _stretch(x_TDC, begins, spans[0], length), spans[1][0]
            length, spans = halved(length), spans[1:]
        x_TDC = _applied(layer, x_TDC)
    return x_TDC.transpose(1, 2).flatten(1)


def _stretch(x_TDC: Tensor, begins: int, span: tuple[int, int], length: int) -> Tensor:
    """Frames `span` of a tensor whose first one is number `begins`; zeros before frame 0 and from `length` on."""
    start, stop = max(span[0], 0), min(span[1], length)
    x_TDC = x_TDC[start - begins : stop - begins]
    return F.pad(x_TDC, (0, 0, 0, 0, start - span[0], span[1] - stop)) if (start, stop) != span else x_TDC


def _applied(layer: nn.Module, x_TDC: Tensor) -> Tensor:
    """A layer without padding in time."""
    if not isinstance(layer, nn.Conv2d):
        return x_TDC.relu_()
    if layer.kernel_size == (1, 1):
        return F.linear(x_TDC, layer.weight.flatten(1), layer.bias)
    if layer.in_channels == 1:
        return F.linear(_windows(x_TDC), layer.weight.flatten(1), layer.bias)
    return _depthwise(x_TDC, layer.weight, layer.bias)


def _depthwise(x_TDC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels = x_TDC.size(-1)
    weight = weight.flatten(1).view_as(weight)  # whose gradient comes back in the weight's own strides
    return F.conv2d(_image(x_TDC), weight, bias, stride=2, padding=(0, 1), groups=channels)[0].permute(1, 2, 0)


def _image(x_TDC: Tensor) -> Tensor:
    """(1, C, T, D) in PyTorch's channels-last order, which it tells by the strides, that of the 1 among them."""
    return x_TDC[None].permute(0, 3, 1, 2)


def _windows(x_TD1: Tensor) -> Tensor:
    """The 3 x 3 neighbours of every second place: (T, D, 9)."""
    return F.pad(x_TD1.squeeze(-1), (1, 1)).unfold(0, 3, 2).unfold(1, 3, 2).flatten(2)


def _first_two(layers: Sequence[nn.Module], x_TD1: Tensor, outside: tuple[int, int]) -> Tensor:
    """The first convolution, ReLU and the second, depthwise convolution."""
    first, _, second = layers[:3]
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TD1.dtype
    tensors = (x_TD1, first.weight, first.bias, second.weight, second.bias)
    with torch.autocast("cpu", enabled=False):
        convolved: Tensor = _FirstTwo.apply(outside, *(tensor.to(cast) for tensor in tensors))
    return convolved


class _FirstTwo(torch.autograd.Function):
    """What lies between the two layers is the largest result of all: made anew for the gradients, not kept.

    `outside` counts its frames before the first and after the last valid one, which the second layer sees as zeros.
    """

    @staticmethod
    def forward(ctx: Any, outside: tuple[int, int], *tensors: Tensor) -> Tensor:
        x_TD1, weight1, bias1, weight2, bias2 = tensors
        ctx.save_for_backward(*tensors)
        ctx.outside = outside
        return _depthwise(_between(x_TD1, weight1, bias1, outside)[1], weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_TDC: Tensor) -> tuple[Tensor | None, ...]:
        x_TD1, weight1, bias1, weight2, _ = ctx.saved_tensors
        windows_NK, between_TDC = _between(x_TD1, weight1, bias1, ctx.outside)
        channels = weight2.size(0)
        grad_between, grad_weight2, grad_bias2 = _aten.convolution_backward(
            _image(grad_TDC.contiguous()), _image(between_TDC), weight2, [channels],
            [2, 2], [0, 1], [1, 1], False, [0, 0], channels, [True, True, True],
        )  # fmt: skip
        _aten.threshold_backward(grad_between, _image(between_TDC), 0, grad_input=grad_between)
        grad_NC = grad_between.permute(0, 2, 3, 1).flatten(0, 2)
        grad_CK = (windows_NK.t() @ grad_NC).t().contiguous()
        grad_weights = grad_CK[:, :-1].reshape(weight1.shape), grad_weight2.flatten(1).view(weight2.shape)
        return None, None, grad_weights[0], grad_CK[:, -1], grad_weights[1], grad_bias2


def _between(x_TD1: Tensor, weight: Tensor, bias: Tensor, outside: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first layer's windows with a one beside them, which takes the bias (N, 10); their result after ReLU."""
    windows_TDK = F.pad(_windows(x_TD1), (0, 1), value=1.0)
    T, D, K = windows_TDK.shape
    windows_NK = windows_TDK.view(T * D, K)
    result_TDC = (windows_NK @ torch.cat((weight.flatten(1), bias[:, None]), dim=1).t()).relu_().view(T, D, -1)
    result_TDC[: outside[0]] = 0.0
    result_TDC[T - outside[1] :] = 0.0
    return windows_NK, result_TDC


def depthwise_by_taps(x_BSM: Tensor, weight_M1K: Tensor, bias_M: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """A depthwise convolution as a sum of shifted products, which compiles into one loop with its neighbours."""
    n_frames, padded_BSM = x_BSM.size(1), F.pad(x_BSM, (0, 0, *padding))
    taps = [padded_BSM[:, tap : tap + n_frames] * weight_M1K[:, 0, tap] for tap in range(weight_M1K.size(-1))]
    if bias_M is not None:
        taps[0] = taps[0] + bias_M
    return sum(taps[1:], start=taps[0])


def relative_shift(scores_BHSR: Tensor) -> Tensor:
    """Bring scores by offset into scores by frame: out[..., i, j] = scores[..., i, S - 1 - i + j].

    Row i of the result starts one column further left than row i - 1: in the flattened rows, each starts R - 1 after
    the one before. No copy is made.
    """
    S = scores_BHSR.size(-2)
    if torch.compiler.is_exporting():
        return _relative_shift_by_reshaping(scores_BHSR)
    if S == 1:
        return scores_BHSR
    flat = scores_BHSR.flatten(-2)
    return flat.narrow(-1, S - 1, S * (2 * S - 2)).unflatten(-1, (S, 2 * S - 2))[..., :S]


def _relative_shift_by_reshaping(scores_BHSR: Tensor) -> Tensor:
    """The same for graphs of any length, one frame included: a column of padding makes rows start one further on."""
    S, R = scores_BHSR.shape[-2:]
    padded = F.pad(scores_BHSR, (1, 0)).flatten(-2)
    return padded[..., S:].unflatten(-1, (S, R))[..., :S]


_BLOCK = 32  # codes
# More than the rounding of two dot products of unit vectors of 16 numbers, in fp32 and with TF32's 11 bits.
_FP32_MARGIN, _TF32_MARGIN = 4e-6, 4e-3


def nearest_in_fp64(unit_ME: Tensor, codes_CE: Tensor) -> Tensor:
    """Index of the code with the largest dot product for each of M unit vectors: (M,)."""
    return (unit_ME.to(codes_CE.dtype) @ codes_CE.t().contiguous()).argmax(-1)


def nearest_by_blocks(unit_ME: Tensor, codes_CE: Tensor) -> Tensor:
    """`nearest_in_fp64` in half the time on a processor, and without many products in fp64, which most GPUs lack.

    Products in fp32 find the block of codes that the best one is in, products in fp64 the best one of the block. Where
    another block comes as near as rounding can take it, all codes are looked at.
    """
    margin = _TF32_MARGIN if unit_ME.is_cuda and torch.backends.cuda.matmul.allow_tf32 else _FP32_MARGIN
    scores_MC = unit_ME.float() @ codes_CE.float().t().contiguous()
    best_M2, blocks_M2 = scores_MC.unflatten(-1, (-1, _BLOCK)).amax(-1).topk(2, dim=-1)
    block_M = blocks_M2[:, 0]
    wide_ME = unit_ME.to(codes_CE.dtype)
    of_block_MKE = codes_CE.unflatten(0, (-1, _BLOCK))[block_M]
    within_M = (of_block_MKE @ wide_ME[:, :, None]).squeeze(-1).argmax(-1)
    nearest_M = block_M * _BLOCK + within_M
    doubtful_M = best_M2[:, 0] - best_M2[:, 1] < margin
    if not bool(doubtful_M.any()):
        return nearest_M
    return nearest_M.masked_scatter(doubtful_M, nearest_in_fp64(unit_ME[doubtful_M], codes_CE))


# Odd multipliers of known good mixing: 2^32 / golden ratio, and two of Chris Wellons's "hash prospector" (triple32).
_SPREAD, _FIRST, _SECOND = -1640531527, 0x7FEB352D, -2073254261


def hashed_keep(shape: torch.Size, key: Tensor, p: float) -> Tensor:
    """True with probability 1 - p, to 2^-32, for each place of `shape`: a keyed hash of its number."""
    place = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device).view(shape)
    x = (place + key) * _SPREAD
    x = (x ^ _shifted_right(x, 16) ^ key) * _FIRST
    x = (x ^ _shifted_right(x, 15)) * _SECOND
    x = x ^ _shifted_right(x, 16)
    return x >= round(p * 2**32) - 2**31


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """As if x were unsigned."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
