"""Fit the quantizer to speech before training: principal components as its projection, k-means centroids as its codes.

The model, its files and the search for the nearest code stay as they are: only the values of the frozen projection and
codebooks differ from random ones. Codes of k-means are used evenly, and tell sounds apart better than random ones
(docs/results.md).

Axes: S stacks of frames, W width of a stack, G codebooks, C codes of a codebook, E width of a code.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from nestcli.model.quantizer import RandomProjectionQuantizer

STACKS_A_CODE = 10  # minimum stacks per code; with fewer, centroids follow single stacks
_POWERS = (0.0, 0.25)  # exponents of the variances, in turn, so that codebooks differ; 0.5 would whiten
_ITERATIONS = 40
_ROWS = 8_192  # stacks that are compared with all codes at once


@torch.no_grad()
def fit_codes(quantizer: RandomProjectionQuantizer, stacks_SW: Tensor) -> None:
    """Set the projection and the codebooks from stacks of features (S, W), as the quantizer receives them.

    The result depends on nothing but the stacks. Raises ValueError if they are too few for the number of codes, or too
    narrow for the width of a code.
    """
    config, needed = quantizer.config, STACKS_A_CODE * quantizer.config.num_classes
    if len(stacks_SW) < needed:
        raise ValueError(f"{len(stacks_SW):,} tokens are too few for {config.num_classes:,} codes: give {needed:,}")
    if stacks_SW.size(1) < config.code_dim:
        raise ValueError(f"code_dim={config.code_dim} is more than the {stacks_SW.size(1)} features of a token")
    centred_SW = (stacks_SW - stacks_SW.mean(0)).double()
    variances_W, directions_WW = torch.linalg.eigh(centred_SW.T @ centred_SW / len(stacks_SW))
    strongest_E, components_WE = variances_W[-config.code_dim :].clamp_min(1e-12), directions_WW[:, -config.code_dim :]
    projections, codebooks = [], []
    for book in range(config.num_books):
        projection_EW = (components_WE * strongest_E.pow(-_POWERS[book % len(_POWERS)])).T.float()
        projections.append(projection_EW)
        unit_SE = normalize(stacks_SW @ projection_EW.T, dim=1)
        codebooks.append(spherical_centroids(unit_SE, config.num_classes, seed=book))
    quantizer.proj.weight.copy_(torch.cat(projections))
    quantizer.codebooks.copy_(torch.stack(codebooks))


def spherical_centroids(unit_SE: Tensor, n_codes: int, seed: int) -> Tensor:
    """Return the unit centroids (C, E) of k-means on the unit sphere, started from random stacks (see `seed`).

    An empty cluster starts again from a random stack.
    """
    generator = torch.Generator().manual_seed(seed)
    centroids_CE = unit_SE[torch.randperm(len(unit_SE), generator=generator)[:n_codes]].clone()
    for _ in range(_ITERATIONS):
        nearest_S = torch.cat([(part @ centroids_CE.T).argmax(1) for part in unit_SE.split(_ROWS)])
        sums_CE = torch.zeros_like(centroids_CE).index_add_(0, nearest_S, unit_SE)
        empty_C = torch.bincount(nearest_S, minlength=n_codes) == 0
        sums_CE[empty_C] = unit_SE[torch.randperm(len(unit_SE), generator=generator)[: int(empty_C.sum())]]
        centroids_CE = normalize(sums_CE, dim=1)
    return centroids_CE
