"""The decoder, and the loss of predicting masked tokens.

Axes: B batch, T feature frames, S tokens, N selected tokens, M model width, C codes, G codebooks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.config import DecoderConfig, LossConfig


class MultiSoftmaxDecoder(nn.Module):
    """One softmax head for each codebook: a linear layer whose output channel is code * G + book.

    Source: arXiv:2202.01855 section 3; NeMo `MultiSoftmaxDecoder`, whose parameters are those of a 1x1 convolution.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.num_classes * config.num_decoders
        self.decoder_layers = nn.Sequential(nn.Conv1d(config.feat_in, channels, 1, bias=config.use_bias))
        nn.init.xavier_uniform_(self.layer.weight)

    @property
    def layer(self) -> nn.Conv1d:
        """The decoder's only layer. It is in a list because NeMo's checkpoints have it in one."""
        layer = self.decoder_layers[0]
        assert isinstance(layer, nn.Conv1d)
        return layer

    def reset_parameters(self) -> None:
        """Draw the weights again as at construction: PyTorch's default, then Xavier's uniform for the matrix."""
        self.layer.reset_parameters()
        nn.init.xavier_uniform_(self.layer.weight)

    def forward(self, frames: Tensor) -> Tensor:
        """Return logits (..., C, G) of frames (..., M)."""
        logits = F.linear(frames, self.layer.weight.squeeze(-1), self.layer.bias)
        return logits.unflatten(-1, (self.config.num_classes, self.config.num_decoders))

    def log_probs(self, encoded_BSM: Tensor) -> Tensor:
        """Return log-probabilities (B, S, C, G), or (B, S, C) with one codebook and `squeeze_single`."""
        log_probs = self(encoded_BSM).log_softmax(-2)
        return log_probs.squeeze(-1) if self.config.squeeze_single and self.config.num_decoders == 1 else log_probs


class MaskedTokenLoss(nn.Module):
    """Mean negative log-likelihood of the selected tokens of a batch, averaged over codebooks.

    A batch without selected tokens gives a loss of 0 that depends on the parameters; with `nemo_exact` it gives NaN,
    as in NeMo. Source: arXiv:2408.13106 section 2.3; NeMo `MultiMLMLoss`.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config

    def select(self, mask_BT: Tensor) -> Tensor:
        """Return True (B, S) for tokens of which a share above `mask_threshold` is masked."""
        steps = self.config.combine_time_steps
        return mask_BT.unflatten(1, (-1, steps)).float().mean(-1) > self.config.mask_threshold

    def forward(self, logits_NCG: Tensor, tokens_NG: Tensor) -> Tensor:
        """Return the loss (a scalar) of N selected tokens."""
        if len(tokens_NG) == 0 and not self.config.nemo_exact:
            return logits_NCG.float().sum()  # 0, with a gradient of zeros for every parameter
        if torch.are_deterministic_algorithms_enabled():  # a GPU adds the terms of its own mean in any order
            return F.cross_entropy(logits_NCG.float(), tokens_NG, reduction="none").mean()
        return F.cross_entropy(logits_NCG.float(), tokens_NG)


def fitted(tokens_BSG: Tensor, n_tokens: int) -> Tensor:
    """Cut tokens, or extend them by code 0, to `n_tokens`: clean and noisy audio may differ in length."""
    return F.pad(tokens_BSG, (0, 0, 0, n_tokens - tokens_BSG.size(1)))
