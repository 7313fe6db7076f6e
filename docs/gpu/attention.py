"""Attention with relative positions and depthwise convolutions in several ways: time, memory, difference to plain.

Axes: B batch, S frames, R relative offsets, H heads, K head width, M model width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from measure import Facts, Task, memory, peak, start_peak, timed, wait_for
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from nestcli.model.attention import MASKED_SCORE, Dropout, RelativeAttention, sinusoidal_table
from nestcli.model.fast import depthwise_by_taps, depthwise_of_image

KERNEL = 9  # frames that a depthwise convolution sees


@dataclass(frozen=True)
class Sizes:
    """Frames of each measurement, and the batch; a measurement takes about `seconds`."""

    frames: tuple[int, ...]
    clips: int
    heads: int
    head_width: int
    seconds: float

    @property
    def width(self) -> int:
        return self.heads * self.head_width


FULL = Sizes((200, 750), clips=32, heads=8, head_width=64, seconds=0.3)
TOY = Sizes((20,), clips=2, heads=2, head_width=16, seconds=0.02)


class FlexAttention(RelativeAttention):
    """A trial: FlexAttention, whose score function reads the shifted position scores."""

    kernel: Callable[..., Tensor] = staticmethod(flex_attention)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        hidden_BSS, scale = hidden[:, 0], q.size(-1) ** -0.5
        bias_BHSS = bias.to(v.dtype).contiguous()

        def score(content: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(hidden_BSS[b, i, j], MASKED_SCORE, content + scale * bias_BHSS[b, h, i, j])

        attended = self.kernel(q.to(v.dtype), k, v, score_mod=score, scale=scale)
        return attended.masked_fill(hidden.all(-1, keepdim=True), 0.0)


class UnshiftedFlexAttention(RelativeAttention):
    """A trial: FlexAttention, whose score function finds its place in the position scores as they are computed."""

    kernel: Callable[..., Tensor] = staticmethod(flex_attention)

    def forward(self, x_BSM: Tensor, positions_RM: Tensor, hidden_BSS: Tensor, key: Tensor | None = None) -> Tensor:
        q_BSHK, k_BHSK, v_BHSK = self._heads(x_BSM)
        r_HRK = self.linear_pos(positions_RM).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
        content_BHSK = (q_BSHK + self.pos_bias_u).transpose(1, 2).to(v_BHSK.dtype)
        scores_BHSR = (q_BSHK + self.pos_bias_v).transpose(1, 2) @ r_HRK.transpose(1, 2)
        centre, scale = x_BSM.size(1) - 1, content_BHSK.size(-1) ** -0.5

        def score(content: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            position = scores_BHSR[b, h, i, centre - i + j]
            return torch.where(hidden_BSS[b, i, j], MASKED_SCORE, content + scale * position)

        attended = self.kernel(content_BHSK, k_BHSK, v_BHSK, score_mod=score, scale=scale)
        attended = attended.masked_fill(hidden_BSS.all(-1)[:, None, :, None], 0.0)
        return self.linear_out(attended.transpose(1, 2).flatten(2))


WAYS: dict[str, type[RelativeAttention]] = {
    "plain": RelativeAttention,
    "sdpa": RelativeAttention,
    "flex": FlexAttention,
    "flex unshifted": UnshiftedFlexAttention,
}


@dataclass
class Inputs:
    """Frames, positions and masks of a batch, and the gradient of the output."""

    x: Tensor
    positions: Tensor
    hidden: Tensor
    wanted: Tensor
    valid: Tensor

    @classmethod
    def drawn(cls, sizes: Sizes, n_frames: int, device: torch.device) -> Inputs:
        torch.manual_seed(n_frames)
        x = torch.randn(sizes.clips, n_frames, sizes.width, device=device)
        lengths_B = torch.linspace(0.7, 1.0, sizes.clips, device=device).mul(n_frames).long()
        padding = torch.arange(n_frames, device=device) >= lengths_B[:, None]
        positions = sinusoidal_table(n_frames, sizes.width, device)
        hidden = padding[:, None, :] | padding[:, :, None]
        return cls(x, positions, hidden, torch.randn_like(x), ~padding[:, :, None])


def attention_of(way: str, sizes: Sizes, device: torch.device) -> RelativeAttention:
    """Return the module of a way; all have the same weights."""
    torch.manual_seed(0)
    module = WAYS[way](sizes.width, sizes.heads, dropout=Dropout(0.0), use_bias=True, use_sdpa=way != "plain")
    nn.init.normal_(module.pos_bias_u, std=0.1)
    nn.init.normal_(module.pos_bias_v, std=0.1)
    if isinstance(module, FlexAttention | UnshiftedFlexAttention) and device.type == "cuda":
        module.kernel = torch.compile(flex_attention, dynamic=False)
    return module.to(device).train()


def attended(module: RelativeAttention, given: Inputs, *, backward: bool = True) -> tuple[Tensor, Tensor | None]:
    """Return the output in bf16-mixed and the gradient of the input, if it is asked for."""
    x = given.x.detach().requires_grad_(backward)
    with nullcontext() if backward else torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        result = module(x, given.positions, given.hidden)
    if not backward:
        return result, None
    (gradient, *_) = torch.autograd.grad((result * given.wanted * given.valid).sum(), [x, *module.parameters()])
    return result.detach(), gradient


def attention_row(way: str, sizes: Sizes, n_frames: int, device: torch.device) -> Facts:
    """Measure one way, and compare output and gradient with the plain way's."""
    given = Inputs.drawn(sizes, n_frames, device)
    plain, module = attention_of("plain", sizes, device), attention_of(way, sizes, device)
    backward = device.type == "cuda" or not way.startswith("flex")  # FlexAttention has no gradients on a processor
    (wanted, wanted_gradient), (result, gradient) = (
        attended(each, given, backward=backward) for each in (plain, module)
    )
    difference = ((result - wanted).float() * given.valid).abs().max()
    row = {
        "forward_seconds": timed(device, lambda: attended(module, given, backward=False), sizes.seconds),
        "forward_backward_seconds": timed(device, lambda: attended(module, given), sizes.seconds) if backward else None,
        "difference": float(difference),
        "gradient_difference": None,
    }
    if gradient is not None and wanted_gradient is not None:
        row["gradient_difference"] = float((gradient - wanted_gradient).abs().max() / wanted_gradient.abs().max())
    return {**row, "extra_peak_bytes": _extra(device, lambda: attended(module, given, backward=backward))}


def _extra(device: torch.device, work: Callable[[], object]) -> int:
    """Return the largest number of bytes that `work` takes in addition."""
    wait_for(device)
    before = memory(device)
    start_peak(device)
    work()
    wait_for(device)
    return max(0, peak(device) - before)


# ---- the depthwise convolution of a layer ----


def depthwise_plain(x_BSM: Tensor, weight_M1K: Tensor, bias_M: Tensor, padding: tuple[int, int]) -> Tensor:
    """Convolve with channels before frames, as in NeMo."""
    x_BMS = F.conv1d(x_BSM.transpose(1, 2).contiguous(), weight_M1K, bias_M, padding=padding[0], groups=len(bias_M))
    return x_BMS.transpose(1, 2).contiguous()


CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": depthwise_plain,
    "image, channels last": depthwise_of_image,
    "taps, compiled": depthwise_by_taps,
}


def depthwise_row(way: str, sizes: Sizes, n_frames: int, device: torch.device) -> Facts:
    """Measure one way forward and backward in bf16, and compare with the plain way's output and gradient."""
    torch.manual_seed(n_frames)
    shapes = ((sizes.clips, n_frames, sizes.width), (sizes.width, 1, KERNEL), (sizes.width,))
    given = [torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    weights = torch.randn(shapes[0], device=device, dtype=torch.bfloat16)
    convolve = CONVOLUTIONS[way]
    if way == "taps, compiled":
        convolve = torch.compile(convolve, dynamic=False)

    def both(convolve: Callable[..., Tensor] = convolve) -> tuple[Tensor, Tensor]:
        result = convolve(*given, (KERNEL // 2, KERNEL // 2))
        return result.detach(), torch.autograd.grad((result * weights).sum(), given)[0]

    (result, gradient), (wanted, wanted_gradient) = both(), both(depthwise_plain)
    return {
        "forward_backward_seconds": timed(device, both, sizes.seconds),
        "difference": float((result - wanted).abs().max()),
        "gradient_difference": float((gradient - wanted_gradient).abs().max() / wanted_gradient.abs().max()),
        "extra_peak_bytes": _extra(device, both),
    }


def main() -> None:
    task = Task.given()
    sizes = TOY if task.rehearse else FULL
    rows: list[tuple[str, Callable[[], Facts]]] = []
    for way in WAYS:
        for n in sizes.frames:
            rows.append(
                (f"attention {n} frames, {way}", lambda way=way, n=n: attention_row(way, sizes, n, task.device))
            )
    convolutions: list[tuple[str, Callable[[], Facts]]] = []
    for way in CONVOLUTIONS:
        for n in sizes.frames:
            convolutions.append(
                (f"depthwise {n} frames, {way}", lambda way=way, n=n: depthwise_row(way, sizes, n, task.device))
            )
    known = len(sizes.frames) * 2  # what nest has comes before the trials, which take long to compile
    for name, row in (*rows[:known], *convolutions, *rows[known:]):
        task.measure(name, row)


if __name__ == "__main__":
    main()
