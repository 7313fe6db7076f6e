"""The frozen random projection and codebooks that turn features into target tokens.

Axes: B batch, D features, T frames, S tokens (stacks of frames), G codebooks, C codes in a codebook, E code width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.bounds import within

_STACKS_AT_A_TIME = 256  # bounds the scores to 8 MiB with codebooks of 8192, which stay in the cache
_BLOCK = 32  # codes
# More than the rounding of two dot products of unit vectors of 16 numbers, in fp32 and with TF32's 11 bits.
_FP32_MARGIN, _TF32_MARGIN = 4e-6, 4e-3


@dataclass(frozen=True)
class QuantizerConfig:
    """The `model.quantizer` block. `combine_time_steps` is the number of frames in a token."""

    feat_in: int
    code_dim: int
    num_books: int
    num_classes: int
    dist_fn: str
    freeze: bool
    squeeze_single: bool
    combine_time_steps: int

    def __post_init__(self) -> None:
        within(self, 1, 1 << 16, "feat_in")
        within(self, 1, 1 << 14, "code_dim")
        within(self, 1, 1 << 12, "num_books")
        within(self, 2, 1 << 24, "num_classes")
        within(self, 1, 64, "combine_time_steps")
        if self.dist_fn not in ("l2", "cosine"):
            raise ValueError(f"dist_fn: {self.dist_fn!r} is not a distance. Use l2 or cosine.")


class RandomProjectionQuantizer(nn.Module):
    """Tokens of a fixed random projection: the nearest code of each codebook to the projected, normalised stack.

    Source: BEST-RQ (arXiv:2202.01855 section 3.1); NeMo `RandomProjectionVectorQuantizer`. The projected stack and
    the codes are unit vectors, so the nearest code by Euclidean distance, by angle and by dot product is the same;
    the dot product needs no tensor of differences. Codebooks are float64 as in NeMo's checkpoints.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.feat_in * config.combine_time_steps
        # Drawn in the order in which NeMo draws: the projection twice, the codes in fp32 (discarded) and in fp64.
        projection = nn.Linear(width, config.num_books * config.code_dim, bias=False)
        nn.init.xavier_normal_(projection.weight)
        codes_GCE = torch.randn(config.num_books, config.num_classes, config.code_dim).double()
        nn.init.normal_(codes_GCE)
        self.codebooks = nn.Parameter(F.normalize(codes_GCE, dim=-1))
        self.proj = projection
        self.requires_grad_(not config.freeze)

    @torch.no_grad()
    def forward(self, features_BDT: Tensor) -> Tensor:
        """Tokens (B, S, G) as int64, or (B, S) with one codebook and `squeeze_single`; S = T / combine_time_steps.

        Always in fp32 or better, so that the targets do not depend on the training precision.
        """
        with torch.autocast(features_BDT.device.type, enabled=False):
            unit_BSGE = self.project(features_BDT.float())
        tokens_BSG = self.nearest_codes(unit_BSGE)
        return tokens_BSG.squeeze(-1) if self.config.squeeze_single and self.config.num_books == 1 else tokens_BSG

    def project(self, features_BDT: Tensor) -> Tensor:
        """Unit vectors (B, S, G, E) of the frames stacked time-major."""
        B, D, T = features_BDT.shape
        steps = self.config.combine_time_steps
        if T % steps:
            raise ValueError(f"{T} frames cannot be stacked by {steps}: pad them to a multiple of it.")
        stacks_BSW = features_BDT.transpose(1, 2).reshape(B, T // steps, steps * D)
        projected = F.linear(stacks_BSW, self.proj.weight.float())
        return F.normalize(projected.view(B, T // steps, self.config.num_books, self.config.code_dim), dim=-1)

    def nearest_codes(self, unit_BSGE: Tensor) -> Tensor:
        """Index of the most similar code, the lowest one on ties, found in fp64: (B, S, G)."""
        blocks, rest = divmod(self.config.num_classes, _BLOCK)
        nearest = nearest_by_blocks if blocks > 1 and not rest else nearest_in_fp64
        flat_GME = unit_BSGE.flatten(0, 1).transpose(0, 1)
        found = [
            torch.cat([nearest(part_ME, codes_CE) for part_ME in flat_ME.split(_STACKS_AT_A_TIME)])
            for flat_ME, codes_CE in zip(flat_GME, self.codebooks, strict=True)
        ]
        return torch.stack(found, dim=-1).view(unit_BSGE.shape[:3])

    def lookup(self, tokens_BSG: Tensor) -> Tensor:
        """The quantised vectors (B, S, G, E) of tokens."""
        books_G = torch.arange(self.config.num_books, device=tokens_BSG.device)
        return self.codebooks[books_G, tokens_BSG]


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
