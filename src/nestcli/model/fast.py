"""Faster variants of the model's operations, each next to its plain variant; the first section chooses between them.

The rest of the model calls the first section only. The variants of an operation give the same numbers, apart from
rounding; the two kinds of dropout differ in their draws. tests/model/test_fast_paths.py compares them.

Axes: B batch, T feature frames, D mel bins, S sub-sampled frames, M model width, R relative offsets, H heads,
C channels or codes, E code width, N windows of the sub-sampling's first layer, K places in a window or kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.torch_private import activation_memory_budget, convolution_backward, mark_dynamic, relu_backward_

# ---- the choices ----


def on_a_gpu(x: Tensor) -> bool:
    """Return True if the host does not compute x itself, and would have to wait to see its values."""
    return x.device.type != "cpu"


def convolved(layers: Sequence[nn.Module], features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the sub-sampling's convolutions: frames (B, S, channels * bins), 0 beyond their valid lengths (B,)."""
    on_processor = not (on_a_gpu(features_BTD) or torch.compiler.is_exporting())
    if on_processor and not features_BTD.requires_grad:  # pieces give the features no gradient
        return convolved_by_pieces(layers, features_BTD, lengths_B)
    items = len(features_BTD) if torch.compiler.is_exporting() else _items_at_a_time(layers[0], features_BTD)
    if items < len(features_BTD):
        return convolved_by_items(layers, features_BTD, lengths_B, items)
    return convolved_whole(layers, features_BTD, lengths_B)


def depthwise(x_BSM: Tensor, conv: nn.Conv1d, padding: tuple[int, ...]) -> Tensor:
    """Apply a depthwise convolution over frames, padded with so many zeros on the left and on the right."""
    if torch.compiler.is_compiling():
        return depthwise_by_taps(x_BSM, conv.weight, conv.bias, padding)
    return depthwise_of_image(x_BSM, conv.weight, conv.bias, padding)


def relative_shift(scores_BHSR: Tensor) -> Tensor:
    """Turn scores by offset into scores by frame: out[..., i, j] = scores[..., i, S - 1 - i + j]."""
    if torch.compiler.is_exporting() or scores_BHSR.size(-2) == 1:
        return relative_shift_by_padding(scores_BHSR)
    return relative_shift_by_strides(scores_BHSR)


def nearest_in_codebook(unit_ME: Tensor, codes_CE: Tensor) -> Tensor:
    """Return the index of the code with the largest dot product, the lowest one on ties, for M unit vectors: (M,)."""
    at_a_time = _VECTORS_AT_A_TIME
    blocks, rest = divmod(len(codes_CE), _BLOCK)
    nearest = nearest_by_blocks if blocks > 1 and not rest else nearest_in_fp64
    if on_a_gpu(unit_ME):  # few kernels, and no decision for which the host would wait
        at_a_time, nearest = max(1, _SCORES_ON_A_GPU // len(codes_CE)), nearest_in_fp64
    return torch.cat([nearest(part_ME, codes_CE) for part_ME in unit_ME.split(at_a_time)])


def apply_dropout(x: Tensor, p: float, key: Tensor | None, site: int, *, channels_first: bool) -> Tensor:
    """Zero a share `p` of the elements and scale the others by 1 / (1 - p). `attention.Dropout` has the details."""
    return dropout_drawn(x, p, channels_first) if key is None else dropout_hashed(x, p, key, site)


def compile_layer(layer: nn.Module, *, hashes_dropout: bool) -> None:
    """Have torch.compile compile a layer; layers of one class share one compilation."""
    layer.compile(options={"fallback_random": not hashes_dropout})


@contextmanager
def running_layers(compiled: bool, positions_RM: Tensor, *others: tuple[Tensor, int]) -> Iterator[Tensor]:
    """Mark the dynamic axes of compiled layers' inputs, and yield the positions to use; plain layers need nothing.

    `others` are the other inputs, each with the number of leading axes whose sizes differ between batches.
    """
    if not compiled:
        yield positions_RM
        return
    positions_RM = positions_RM.clone()  # a slice would be compiled again for every size of the whole table
    for tensor, axes in ((positions_RM, 1), *others):
        for axis in range(axes):
            mark_dynamic(tensor, axis)
    with activation_memory_budget(_KEPT):
        yield positions_RM


# Share of activations that compiled layers keep; the cheapest remainder is recomputed in the backward pass. 0.9 takes
# two thirds of the memory that 1 takes, and a twentieth less time (docs/log.md).
_KEPT = 0.9

# ---- the sub-sampling's convolutions: whole, by items, or in pieces ----

_INDEXED = 2**31 - 1  # elements of a tensor that a GPU's convolutions can number: 70 minutes of audio with 256 channels


def convolved_whole(layers: Sequence[nn.Module], features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Apply each layer to the whole batch: the plain variant."""
    x_BCTD = features_BTD[:, None]
    for layer in layers:
        if halves(layer):
            # Only a strided layer looks at neighbours in time, so only its input must be clean of padding.
            x_BCTD = _zero_padding(x_BCTD, lengths_B)
            lengths_B = halved(lengths_B)
        x_BCTD = layer(x_BCTD)
    return _zero_padding(x_BCTD, lengths_B).transpose(1, 2).flatten(2), lengths_B


def _items_at_a_time(first: nn.Module, features_BTD: Tensor) -> int:
    assert isinstance(first, nn.Conv2d)
    of_an_item = first.out_channels * math.prod(map(halved, features_BTD.shape[1:]))  # elements after the first layer
    return max(1, _INDEXED // max(1, of_an_item))


def convolved_by_items(
    layers: Sequence[nn.Module], features_BTD: Tensor, lengths_B: Tensor, items: int
) -> tuple[Tensor, Tensor]:
    """Apply all layers to so many items of the batch at a time."""
    parts = zip(features_BTD.split(items), lengths_B.split(items), strict=True)
    frames, lengths = zip(*(convolved_whole(layers, *part) for part in parts), strict=True)
    return torch.cat(frames), torch.cat(lengths)


def halves(layer: nn.Module) -> bool:
    """Say whether a layer halves time and frequency."""
    return isinstance(layer, nn.Conv2d) and layer.stride[0] == 2


def halved(length):  # type: ignore[no-untyped-def]  # int or Tensor
    """Return the length after a convolution of kernel 3, stride 2 and padding 1."""
    return (length - 1) // 2 + 1


def _zero_padding(x_BCTD: Tensor, lengths_B: Tensor) -> Tensor:
    padding_BT = torch.arange(x_BCTD.size(2), device=x_BCTD.device) >= lengths_B[:, None]
    return x_BCTD.masked_fill(padding_BT[:, None, :, None], 0.0)


_PIECE = 50  # frames; their largest intermediate result takes 8 MiB with 256 channels


def convolved_by_pieces(layers: Sequence[nn.Module], features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Apply all layers to a stretch of frames that fits the processor's cache, then to the next stretch.

    The first layer alone makes 131 MB from 64 s of audio, ten times its input. Channels are the last axis here, so
    that pointwise convolutions are matrix products and depthwise ones read neighbouring numbers. Only valid frames
    are computed. The features get no gradient.
    """
    (n_frames, bins), frames_B = features_BTD.shape[1:], lengths_B
    for _ in range(sum(map(halves, layers))):
        n_frames, bins, frames_B = halved(n_frames), halved(bins), halved(frames_B)
    last = layers[-2]
    assert isinstance(last, nn.Conv2d)
    rows = []
    for features_TD, length, valid in zip(features_BTD, lengths_B.tolist(), frames_B.tolist(), strict=True):
        spans = ((start, min(start + _PIECE, valid)) for start in range(0, valid, _PIECE))
        pieces = [_piece(layers, features_TD, length, *span) for span in spans]
        pieces = pieces or [features_BTD.new_zeros(0, last.out_channels * bins)]
        rows.append(F.pad(torch.cat(pieces), (0, 0, 0, n_frames - valid)))
    return torch.stack(rows), frames_B


def _piece(layers: Sequence[nn.Module], features_TD: Tensor, length: int, start: int, stop: int) -> Tensor:
    """Return convolved frames start to stop (S, channels * bins) of one item with `length` valid feature frames."""
    spans = [(start, stop)]  # the input of each strided layer, the first layer's first, then the output
    for _ in range(sum(map(halves, layers))):
        first, last = spans[0]
        spans.insert(0, (2 * first - 1, 2 * last))
    x_TDC, begins = features_TD[:, :, None], 0
    if len(layers) > 2:
        between = halved(length)
        outside = max(0, -spans[1][0]), max(0, spans[1][1] - between)
        x_TDC, begins = _first_two(layers, _stretch(x_TDC, 0, spans[0], length), outside), spans[2][0]
        length, layers, spans = halved(between), layers[3:], spans[2:]
    for layer in layers:
        if halves(layer):
            x_TDC, begins = _stretch(x_TDC, begins, spans[0], length), spans[1][0]
            length, spans = halved(length), spans[1:]
        x_TDC = _applied(layer, x_TDC)
    return x_TDC.transpose(1, 2).flatten(1)


def _stretch(x_TDC: Tensor, begins: int, span: tuple[int, int], length: int) -> Tensor:
    """Return frames `span` of a tensor that begins with frame `begins`; zeros before frame 0 and from `length` on."""
    start, stop = max(span[0], 0), min(span[1], length)
    x_TDC = x_TDC[start - begins : stop - begins]
    return F.pad(x_TDC, (0, 0, 0, 0, start - span[0], span[1] - stop)) if (start, stop) != span else x_TDC


def _applied(layer: nn.Module, x_TDC: Tensor) -> Tensor:
    """Apply a layer without padding the time axis."""
    if not isinstance(layer, nn.Conv2d):
        return x_TDC.relu_()
    if layer.kernel_size == (1, 1):
        return F.linear(x_TDC, layer.weight.flatten(1), layer.bias)
    if layer.in_channels == 1:
        return F.linear(_windows(x_TDC), layer.weight.flatten(1), layer.bias)
    return _strided_depthwise(x_TDC, layer.weight, layer.bias)


def _strided_depthwise(x_TDC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels = x_TDC.size(-1)
    weight = weight.flatten(1).view_as(weight)  # so that its gradient has the weight's strides
    return F.conv2d(_image(x_TDC), weight, bias, stride=2, padding=(0, 1), groups=channels)[0].permute(1, 2, 0)


def _image(x_TDC: Tensor) -> Tensor:
    """View as (1, C, T, D) in channels-last order, which PyTorch recognises by the strides, those of the 1 included."""
    return x_TDC[None].permute(0, 3, 1, 2)


def _windows(x_TD1: Tensor) -> Tensor:
    """Return the 3 x 3 neighbours of every second place: (T, D, 9)."""
    return F.pad(x_TD1.squeeze(-1), (1, 1)).unfold(0, 3, 2).unfold(1, 3, 2).flatten(2)


def _first_two(layers: Sequence[nn.Module], x_TD1: Tensor, outside: tuple[int, int]) -> Tensor:
    """Apply the first convolution, ReLU and the second, depthwise convolution."""
    first, _, second = layers[:3]
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TD1.dtype
    tensors = (x_TD1, first.weight, first.bias, second.weight, second.bias)
    with torch.autocast("cpu", enabled=False):
        convolved: Tensor = _FirstTwo.apply(outside, *(tensor.to(cast) for tensor in tensors))
    return convolved


class _FirstTwo(torch.autograd.Function):
    """Two convolutions with a ReLU between them that recompute the tensor between them in the backward pass.

    That tensor is the largest of all, so it is not kept. `outside` counts its frames before the first and after the
    last valid frame, which the second convolution must see as zeros.
    """

    @staticmethod
    def forward(ctx: Any, outside: tuple[int, int], *tensors: Tensor) -> Tensor:
        x_TD1, weight1, bias1, weight2, bias2 = tensors
        ctx.save_for_backward(*tensors)
        ctx.outside = outside
        return _strided_depthwise(_between(x_TD1, weight1, bias1, outside)[1], weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_TDC: Tensor) -> tuple[Tensor | None, ...]:
        x_TD1, weight1, bias1, weight2, _ = ctx.saved_tensors
        windows_NK, between_TDC = _between(x_TD1, weight1, bias1, ctx.outside)
        channels = weight2.size(0)
        grad_between, grad_weight2, grad_bias2 = convolution_backward(
            _image(grad_TDC.contiguous()), _image(between_TDC), weight2, [channels],
            [2, 2], [0, 1], [1, 1], False, [0, 0], channels, [True, True, True],
        )  # fmt: skip
        relu_backward_(grad_between, _image(between_TDC))
        grad_NC = grad_between.permute(0, 2, 3, 1).flatten(0, 2)
        grad_CK = (windows_NK.t() @ grad_NC).t().contiguous()
        grad_weights = grad_CK[:, :-1].reshape(weight1.shape), grad_weight2.flatten(1).view(weight2.shape)
        return None, None, grad_weights[0], grad_CK[:, -1], grad_weights[1], grad_bias2


def _between(x_TD1: Tensor, weight: Tensor, bias: Tensor, outside: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the first layer's windows, each with a 1 that the bias multiplies (N, 10), and the result after ReLU."""
    windows_TDK = F.pad(_windows(x_TD1), (0, 1), value=1.0)
    T, D, K = windows_TDK.shape
    windows_NK = windows_TDK.view(T * D, K)
    result_TDC = (windows_NK @ torch.cat((weight.flatten(1), bias[:, None]), dim=1).t()).relu_().view(T, D, -1)
    result_TDC[: outside[0]] = 0.0
    result_TDC[T - outside[1] :] = 0.0
    return windows_NK, result_TDC


# ---- the depthwise convolution of a Conformer layer; the plain variant is F.conv1d ----


def depthwise_of_image(x_BSM: Tensor, weight_M1K: Tensor, bias_M: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """Convolve an image of one row in channels-last order, PyTorch's fastest kernel for it."""
    left, right = padding
    both = min(left, right)
    if left != right:
        x_BSM = F.pad(x_BSM, (0, 0, left - both, right - both))
    x_BM1S = x_BSM.transpose(1, 2)[:, :, None]
    weight_M11K = weight_M1K.flatten(1)[:, None, None]  # so that its gradient has the weight's strides
    x_BM1S = F.conv2d(x_BM1S, weight_M11K, bias_M, padding=(0, both), groups=len(weight_M1K))
    return x_BM1S.squeeze(2).transpose(1, 2)


def depthwise_by_taps(x_BSM: Tensor, weight_M1K: Tensor, bias_M: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    """Sum shifted products, which the compiler fuses into one loop with the operations around them."""
    n_frames, padded_BSM = x_BSM.size(1), F.pad(x_BSM, (0, 0, *padding))
    taps = [padded_BSM[:, tap : tap + n_frames] * weight_M1K[:, 0, tap] for tap in range(weight_M1K.size(-1))]
    if bias_M is not None:
        taps[0] = taps[0] + bias_M
    return sum(taps[1:], start=taps[0])


# ---- the relative shift: by padding, or by strides ----


def relative_shift_by_padding(scores_BHSR: Tensor) -> Tensor:
    """Shift each row by one place with a column of padding: the plain variant, for graphs of any length."""
    S, R = scores_BHSR.shape[-2:]
    padded = F.pad(scores_BHSR, (1, 0)).flatten(-2)
    return padded[..., S:].unflatten(-1, (S, R))[..., :S]


def relative_shift_by_strides(scores_BHSR: Tensor) -> Tensor:
    """Read rows of two or more frames R - 1 places apart in the flattened scores, without a copy."""
    S = scores_BHSR.size(-2)
    flat = scores_BHSR.flatten(-2)
    return flat.narrow(-1, S - 1, S * (2 * S - 2)).unflatten(-1, (S, 2 * S - 2))[..., :S]


# ---- the nearest code: in fp64, or by blocks ----

_VECTORS_AT_A_TIME = 256  # bounds the scores to 8 MiB with codebooks of 8192, which stay in the cache
_SCORES_ON_A_GPU = 1 << 25  # of one product, in fp64: 256 MiB
_BLOCK = 32  # codes
_MARGIN = 4e-6  # larger than the rounding error of two dot products of unit vectors of 16 numbers in fp32


def nearest_in_fp64(unit_ME: Tensor, codes_CE: Tensor) -> Tensor:
    """Compare with every code in fp64: the plain variant."""
    return (unit_ME.to(codes_CE.dtype) @ codes_CE.t().contiguous()).argmax(-1)


def nearest_by_blocks(unit_ME: Tensor, codes_CE: Tensor) -> Tensor:
    """Find the best block of codes in fp32, then the best code of that block in fp64.

    Takes half the time on a processor. Where rounding could have decided between two blocks, every code is compared in
    fp64.
    """
    scores_MC = unit_ME.float() @ codes_CE.float().t().contiguous()
    best_M2, blocks_M2 = scores_MC.unflatten(-1, (-1, _BLOCK)).amax(-1).topk(2, dim=-1)
    block_M = blocks_M2[:, 0]
    wide_ME = unit_ME.to(codes_CE.dtype)
    of_block_MKE = codes_CE.unflatten(0, (-1, _BLOCK))[block_M]
    in_block_M = (of_block_MKE @ wide_ME[:, :, None]).squeeze(-1).argmax(-1)
    nearest_M = block_M * _BLOCK + in_block_M
    doubtful_M = best_M2[:, 0] - best_M2[:, 1] < _MARGIN
    if not bool(doubtful_M.any()):
        return nearest_M
    return nearest_M.masked_scatter(doubtful_M, nearest_in_fp64(unit_ME[doubtful_M], codes_CE))


# ---- dropout: drawn by torch's generator, or hashed ----

# Odd multipliers known to mix well: 2^32 / golden ratio, and two of Chris Wellons's "hash prospector" (triple32).
_SPREAD, _FIRST, _SECOND = -1640531527, 0x7FEB352D, -2073254261


def dropout_drawn(x: Tensor, p: float, channels_first: bool) -> Tensor:
    """Draw from torch's generator, for an input (B, S, M) in the order (B, M, S) if asked to: the plain variant."""
    if channels_first:
        return F.dropout(x.transpose(1, 2).contiguous(), p).transpose(1, 2)
    return F.dropout(x, p)


def dropout_hashed(x: Tensor, p: float, key: Tensor, site: int) -> Tensor:
    """Hash the key, the site and the element's place; compiled kernels recompute the draws instead of keeping them."""
    if p >= 1.0:
        return x * 0.0
    return torch.where(hashed_keep(x.shape, key + _wrapped(site * _SPREAD), p), x / (1.0 - p), 0.0)


def hashed_keep(shape: torch.Size, key: Tensor, p: float) -> Tensor:
    """Return True with probability 1 - p (to 2^-32) for each place of `shape`, from a keyed hash of its number.

    Numbers are modulo 2^32, so that tensors of more than 2^31 elements have draws too.
    """
    others = shape[1:]
    row = torch.arange(shape[0], dtype=torch.int32, device=key.device).view(-1, *[1] * len(others))
    in_row = torch.arange(math.prod(others), dtype=torch.int32, device=key.device).view(others)
    x = (row * math.prod(others) + key + in_row) * _SPREAD
    x = (x ^ _shifted_right(x, 16) ^ key) * _FIRST
    x = (x ^ _shifted_right(x, 15)) * _SECOND
    x = x ^ _shifted_right(x, 16)
    return x >= round(p * 2**32) - 2**31


def _wrapped(number: int) -> int:
    """Return the int32 number that is equal modulo 2^32: a compiled kernel takes no larger constant."""
    return (number + 2**31) % 2**32 - 2**31


def _shifted_right(x: Tensor, bits: int) -> Tensor:
    """Shift right as if x were unsigned."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
