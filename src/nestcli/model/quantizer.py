"""The frozen random projection and codebooks that turn features into target tokens.

Axes: B batch, D features, T frames, S tokens (stacks of frames), G codebooks, C codes in a codebook, E code width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.config import QuantizerConfig
from nestcli.model.fast import nearest_in_codebook, on_a_gpu


class RandomProjectionQuantizer(nn.Module):
    """Random-projection quantizer: a token is the nearest code to the projected, normalised stack of frames.

    Stacks and codes are unit vectors, so Euclidean distance, angle and dot product have the same nearest code; the dot
    product needs the least memory. Codebooks are float64, as in NeMo's checkpoints.
    Source: BEST-RQ (arXiv:2202.01855 section 3.1); NeMo `RandomProjectionVectorQuantizer`.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.feat_in * config.combine_time_steps
        # NeMo's order of draws: the projection twice, then the codes in fp32 (discarded) and in fp64.
        projection = nn.Linear(width, config.num_books * config.code_dim, bias=False)
        nn.init.xavier_normal_(projection.weight)
        codes_GCE = torch.randn(config.num_books, config.num_classes, config.code_dim).double()
        nn.init.normal_(codes_GCE)
        self.codebooks = nn.Parameter(F.normalize(codes_GCE, dim=-1))
        self.proj = projection
        self.requires_grad_(not config.freeze)

    @torch.no_grad()
    def forward(self, features_BDT: Tensor) -> Tensor:
        """Return tokens (B, S, G), or (B, S) with one codebook and `squeeze_single`; S = T / combine_time_steps.

        Computes in fp32 or fp64 in every precision of training, so that the targets do not depend on it.
        """
        with torch.autocast(features_BDT.device.type, enabled=False):
            unit_BSGE = self.project(features_BDT.float())
        tokens_BSG = self.nearest_codes(unit_BSGE)
        return tokens_BSG.squeeze(-1) if self.config.squeeze_single and self.config.num_books == 1 else tokens_BSG

    def project(self, features_BDT: Tensor) -> Tensor:
        """Return unit vectors (B, S, G, E) of stacks of `combine_time_steps` frames, one frame after the other."""
        B, D, T = features_BDT.shape
        steps = self.config.combine_time_steps
        if T % steps:
            raise ValueError(f"{T} frames cannot be stacked by {steps}: pad them to a multiple of {steps}.")
        stacks_BSW = features_BDT.transpose(1, 2).reshape(B, T // steps, steps * D)
        weight = self.proj.weight.float()
        if on_a_gpu(stacks_BSW):  # in fp32 a GPU may round products to TF32 (nest.matmul_precision)
            stacks_BSW, weight = stacks_BSW.double(), weight.double()
        projected = F.linear(stacks_BSW, weight).float()
        return F.normalize(projected.view(B, T // steps, self.config.num_books, self.config.code_dim), dim=-1)

    def nearest_codes(self, unit_BSGE: Tensor) -> Tensor:
        """Return the index of the most similar code, the lowest one on ties, found in fp64: (B, S, G)."""
        unit_GME = unit_BSGE.flatten(0, 1).transpose(0, 1)
        found = [nearest_in_codebook(unit_ME, codes) for unit_ME, codes in zip(unit_GME, self.codebooks, strict=True)]
        return torch.stack(found, dim=-1).view(unit_BSGE.shape[:3])
