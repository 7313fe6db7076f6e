"""Measures of how self-supervised training is doing: pure functions on tensors.

Only `effective_rank` makes the host wait for a GPU, which needs the host for eigenvalues.

Axes: B batch, S sub-sampled frames, M model width, K frames looked at, N selected tokens, C codes, G codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from nestcli.model.torch_private import norms_in_fp32

_FLOOR = 1e-10  # share of the frames' mean square below which a variance is rounding noise


def count_codes(counts_GC: Tensor, tokens_NG: Tensor) -> None:
    """Add the codes of tokens to the counts, in place. Negative tokens are not counted."""
    n_codes = counts_GC.size(1)
    offsets_G = n_codes * torch.arange(counts_GC.size(0), device=counts_GC.device)
    places = (tokens_NG.clamp_min(0) + offsets_G).flatten()
    counts_GC.view(-1).index_add_(0, places, (tokens_NG >= 0).flatten().to(counts_GC.dtype))


def perplexity(counts_GC: Tensor) -> Tensor:
    """Return exp(entropy) of the codes, averaged over codebooks: their number if used evenly. NaN without any."""
    shares_GC = counts_GC.double() / counts_GC.sum(1, keepdim=True)
    return torch.special.entr(shares_GC).sum(1).exp().mean()


def dead_codes(counts_GC: Tensor) -> Tensor:
    """Return the number of codes that never occurred, averaged over codebooks."""
    return (counts_GC == 0).sum(1).double().mean()


def unigram_baseline(seen_GC: Tensor, window_GC: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss (nats) and accuracy, on the window's tokens, of a guess by the frequencies seen before.

    Frequencies are smoothed by adding one to every count. NaN if the window is empty.
    """
    smoothed_GC = seen_GC.double() + 1
    nats_GC = smoothed_GC.sum(1, keepdim=True).log() - smoothed_GC.log()
    window_GC = window_GC.double()
    total_G = window_GC.sum(1)
    hits_G1 = window_GC.gather(1, seen_GC.argmax(1, keepdim=True))
    return ((window_GC * nats_GC).sum(1) / total_G).mean(), (hits_G1[:, 0] / total_G).mean()


@torch.no_grad()
def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, in fp32. 0 without any."""
    if not tensors:
        return torch.zeros(())
    norm = torch.stack(norms_in_fp32(tensors)).norm()
    whole: Tensor = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2 shards it
    return whole


@torch.no_grad()
def effective_rank(encoded_BSM: Tensor, frames_B: Tensor, most_frames: int = 2048) -> Tensor:
    """Return exp(entropy) of the singular values of the centred valid frames, scaled to sum 1: from 1 to M.

    Uses at most `most_frames` places, evenly spread over the batch. 1 if all frames are equal up to rounding, NaN if
    one is not finite. Source: Roy & Vetterli, The effective rank (EUSIPCO 2007).
    """
    valid_BS = torch.arange(encoded_BSM.size(1), device=encoded_BSM.device) < frames_B[:, None]
    stride = max(1, -(-valid_BS.numel() // most_frames))
    valid_K1 = valid_BS.flatten()[::stride, None]
    frames_KM = encoded_BSM.flatten(0, 1)[::stride].double().masked_fill(~valid_K1, 0.0)
    count = valid_K1.sum().clamp_min(1)
    centred_KM = (frames_KM - frames_KM.sum(0) / count).masked_fill(~valid_K1, 0.0)
    covariance_MM = centred_KM.T @ centred_KM / count
    finite = covariance_MM.isfinite().all()
    variances_M = torch.linalg.eigvalsh(covariance_MM.masked_fill(~finite, 0.0))
    floor = _FLOOR * frames_KM.square().sum() / count
    deviations_M = variances_M.masked_fill(~(variances_M > floor), 0.0).sqrt()
    shares_M = deviations_M / deviations_M.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares_M).sum().exp().masked_fill(~finite, torch.nan)
