"""Random block masking: one vector replaces blocks of frames.

Axes: B batch, D features, T frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.config import MaskingConfig


class RandomBlockMasking(nn.Module):
    """Masks blocks of valid frames, drawn from the generator of the features' device.

    Departure from NeMo, which accepts `max_mask_ratio` and ignores it: here it limits the masked share of each item.
    Source: arXiv:2408.13106 section 2.2; NeMo `RandomBlockMasking`.
    """

    def __init__(self, config: MaskingConfig) -> None:
        super().__init__()
        self.config = config
        self.mask_embedding = nn.Parameter(torch.empty(config.feat_in))
        if config.mask_value is None:
            nn.init.normal_(self.mask_embedding, mean=0.0, std=0.1)
        else:
            nn.init.constant_(self.mask_embedding, config.mask_value)
        self.mask_embedding.requires_grad_(not config.freeze and config.mask_value is None)

    def forward(self, features_BDT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return masked features (B, D, T) and the mask (B, T), True where a frame was replaced."""
        mask_BT = draw_mask(lengths_B, features_BDT.size(2), self.config)
        embedding_1D1 = self.mask_embedding.to(features_BDT.dtype)[None, :, None]
        return torch.where(mask_BT[:, None, :], embedding_1D1, features_BDT), mask_BT


def draw_mask(lengths_B: Tensor, n_frames: int, config: MaskingConfig) -> Tensor:
    """Choose the frames to mask, from the generator of the lengths' device; return the mask (B, T), padding False."""
    draw = overlapping_blocks if config.allow_overlap else disjoint_blocks
    return draw(lengths_B, n_frames, config)


def overlapping_blocks(lengths_B: Tensor, n_frames: int, config: MaskingConfig) -> Tensor:
    """Start a block at every frame with probability `mask_prob` if it ends inside the item; return the mask (B, T)."""
    draws_BT = torch.rand(len(lengths_B), n_frames, device=lengths_B.device)
    fits_BT = torch.arange(n_frames, device=lengths_B.device) + config.block_size <= lengths_B[:, None]
    starts_BT = (draws_BT < config.mask_prob) & fits_BT
    if config.max_mask_ratio is not None:
        starts_BT = _limited_starts(starts_BT, draws_BT, lengths_B, config)
    return _covered(starts_BT, config.block_size)


def disjoint_blocks(lengths_B: Tensor, n_frames: int, config: MaskingConfig) -> Tensor:
    """Mask about `mask_prob` of each item in blocks that do not overlap; return the mask (B, T).

    Each item is cut into slots of one block, all shifted by one random offset; random slots are masked.
    """
    device, block = lengths_B.device, config.block_size
    share = config.mask_prob if config.max_mask_ratio is None else min(config.mask_prob, config.max_mask_ratio)
    wanted_B = torch.ceil(lengths_B * share / block).long()  # in fp32, as in NeMo: rounding decides for some lengths
    crowded_B = (wanted_B + 1) * block > lengths_B
    block_B = torch.where(crowded_B, lengths_B // (wanted_B + 1), block).clamp_min(1)
    slots_B = (lengths_B // block_B - 1).clamp_min(0)
    blocks_B = torch.minimum(wanted_B, slots_B)

    is_slot_BT = torch.arange(n_frames, device=device) < slots_B[:, None]
    draws_BT = torch.rand(len(lengths_B), n_frames, device=device).masked_fill(~is_slot_BT, -math.inf)
    most = math.ceil(n_frames * share / block)
    slot_BK = draws_BT.topk(most, dim=1).indices
    chosen_BK = torch.arange(most, device=device) < blocks_B[:, None]
    offset_B = (torch.rand(len(lengths_B), device=device) * block_B).long()

    # Frame t lies in slot (t - offset) // block; it is masked if that slot was chosen.
    is_chosen_BT = torch.zeros(len(lengths_B), n_frames, dtype=torch.bool, device=device)
    is_chosen_BT.scatter_(1, slot_BK, chosen_BK)
    shifted_BT = torch.arange(n_frames, device=device) - offset_B[:, None]
    frame_slot_BT = shifted_BT.div(block_B[:, None], rounding_mode="floor")
    return is_chosen_BT.gather(1, frame_slot_BT.clamp_min(0)) & (frame_slot_BT >= 0)


def _covered(starts_BT: Tensor, block_size: int) -> Tensor:
    """Return the frames in a block: a block starts at the frame itself or at one of the `block_size` - 1 before it."""
    started_BT = F.pad(starts_BT.long().cumsum(1), (block_size, 0))
    return started_BT[:, block_size:] > started_BT[:, :-block_size]


def _limited_starts(starts_BT: Tensor, draws_BT: Tensor, lengths_B: Tensor, config: MaskingConfig) -> Tensor:
    """Drop the blocks with the largest draws until at most `max_mask_ratio` of each item is masked.

    The number of blocks to keep is found by halving, for all items at once and without a decision of the host.
    """
    assert config.max_mask_ratio is not None
    allowed_B = (lengths_B * config.max_mask_ratio).long()
    order_BT = draws_BT.masked_fill(~starts_BT, math.inf).argsort(dim=1, stable=True)
    place_BT = torch.arange(starts_BT.size(1), device=starts_BT.device).expand_as(order_BT)
    rank_BT = torch.empty_like(order_BT).scatter_(1, order_BT, place_BT)  # among an item's draws, the smallest first
    fits_B, most_B = torch.zeros_like(lengths_B), starts_BT.sum(1)  # blocks that surely fit, and that may fit
    for _ in range(starts_BT.size(1).bit_length()):
        tried_B = (fits_B + most_B + 1) // 2
        covered_BT = _covered(starts_BT & (rank_BT < tried_B[:, None]), config.block_size)
        fit_B = covered_BT.sum(1) <= allowed_B
        fits_B, most_B = torch.where(fit_B, tried_B, fits_B), torch.where(fit_B, most_B, tried_B - 1)
    return starts_BT & (rank_BT < fits_B[:, None])
