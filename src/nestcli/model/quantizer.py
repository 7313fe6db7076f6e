"""The frozen random projection and codebooks that turn features into target tokens.

Axes: B batch, D features, T frames, S tokens (stacks of frames), G codebooks, C codes in a codebook, E code width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.config import QuantizerConfig
from nestcli.model.fast import _BLOCK, nearest_by_blocks, nearest_in_fp64

_STACKS_AT_A_TIME = 256  # bounds the scores to 8 MiB with codebooks of 8192, which stay in the cache


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
