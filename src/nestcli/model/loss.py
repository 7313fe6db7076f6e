"""Masked token prediction: which tokens count, and their cross-entropy.

Axes: B batch, T feature frames, S tokens, N selected tokens, C codes, G codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.bounds import within


@dataclass(frozen=True)
class LossConfig:
    """The `model.loss` block. `combine_time_steps` is the number of mask positions in a token."""

    combine_time_steps: int
    mask_threshold: float
    num_decoders: int
    squeeze_single: bool
    nemo_exact: bool = False

    def __post_init__(self) -> None:
        within(self, 1, 64, "combine_time_steps")
        within(self, 0, 1, "mask_threshold", below=True)
        within(self, 1, 1 << 12, "num_decoders")


class MaskedTokenLoss(nn.Module):
    """Mean negative log-likelihood of the selected tokens of a batch, averaged over codebooks.

    Source: arXiv:2408.13106 section 2.3; NeMo `MultiMLMLoss`. The logits are wanted for selected tokens alone. A
    batch without any gives a loss of zero that depends on the parameters; with `nemo_exact` it gives NaN, as NeMo's.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def select(self, mask_BT: Tensor) -> Tensor:
        """Tokens (B, S) of which more than `mask_threshold` is masked, True where selected."""
        steps = self.config.combine_time_steps
        return mask_BT.unflatten(1, (-1, steps)).float().mean(-1) > self.config.mask_threshold

    def forward(self, logits_NCG: Tensor, tokens_NG: Tensor) -> Tensor:
        """The loss, a scalar, of N selected tokens."""
        if len(tokens_NG) == 0 and not self.config.nemo_exact:
            return logits_NCG.float().sum()  # 0, with a gradient of zeros for every parameter
        return F.cross_entropy(logits_NCG.float(), tokens_NG)


def fitted(tokens_BSG: Tensor, n_tokens: int) -> Tensor:
    """Tokens cut or extended by code 0 to the mask's length, where clean and noisy audio differ in length."""
    return F.pad(tokens_BSG, (0, 0, 0, n_tokens - tokens_BSG.size(1)))
