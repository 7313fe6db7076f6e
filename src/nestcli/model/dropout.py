"""Dropout whose random numbers cost next to nothing when they are compiled into the kernels around them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Odd multipliers of known good mixing: 2^32 / golden ratio, and two of Chris Wellons's "hash prospector" (triple32).
_SPREAD, _FIRST, _SECOND = -1640531527, 0x7FEB352D, -2073254261


class Dropout(nn.Module):
    """Zeroes a share `p` of the elements in training and scales the others by 1 / (1 - p).

    Without a key the draws are those of torch's generator, and so NeMo's. With one, a scalar of int32, each element's
    draw is a hash of the key, the element's place and `site`: the same compiled or not, and made anew in the backward
    pass instead of being kept. Modules that share a key need sites of their own. `channels_first`: torch's generator
    draws for an input (B, S, M) in the order (B, M, S), which is that of NeMo's tensor at this place.
    """

    def __init__(self, p: float, site: int = 0, *, channels_first: bool = False) -> None:
        super().__init__()
        self.p, self.site, self.channels_first = p, site, channels_first

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        if not self.training or self.p <= 0.0:
            return x
        if key is None:
            if self.channels_first:
                return F.dropout(x.transpose(1, 2).contiguous(), self.p).transpose(1, 2)
            return F.dropout(x, self.p)
        kept = hashed_keep(x.shape, key + self.site * _SPREAD, self.p)
        return torch.where(kept, x / (1.0 - self.p), 0.0) if self.p < 1.0 else x * 0.0

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
