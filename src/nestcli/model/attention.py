"""Self-attention with relative positions, after Transformer-XL.

Axes: B batch, S frames, R relative offsets (2S - 1, from S - 1 down to -(S - 1)), H heads, K head width, M = H K.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.fast import apply_dropout, relative_shift

MASKED_SCORE = -10000.0  # not -inf, so that a row stays finite where everything is masked


class Dropout(nn.Module):
    """Dropout with draws from torch's generator or from a hash; zeroes a share `p` of the elements in training.

    Without a key, torch's generator draws, as in NeMo. With a key, one int32 number, each element's draw is a hash of
    the key, the element's place and `site`: the same whether compiled or not, and recomputed in the backward pass.
    Modules that share a key need different sites. With `channels_first`, torch's generator draws for an input
    (B, S, M) in the order (B, M, S), the order of NeMo's tensor at this place.
    """

    def __init__(self, p: float, site: int = 0, *, channels_first: bool = False) -> None:
        super().__init__()
        self.p, self.site, self.channels_first = p, site, channels_first

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        if not self.training or self.p <= 0.0:
            return x
        return apply_dropout(x, self.p, key, self.site, channels_first=self.channels_first)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class RelativePositions(nn.Module):
    """The sinusoidal table of relative offsets, which grows with the longest batch.

    Scales the frames by sqrt(M) if asked to, then applies dropout to them. The table is not part of the state dict.
    Source: Transformer-XL (arXiv:1901.02860 appendix B); NeMo `RelPositionalEncoding`.
    """

    def __init__(self, d_model: int, *, scale_input: bool, dropout: float, dropout_table: float) -> None:
        super().__init__()
        self.d_model = d_model
        self.scale = math.sqrt(d_model) if scale_input else 1.0
        self.dropout = nn.Dropout(dropout)
        self.dropout_table = nn.Dropout(dropout_table)
        # Not a buffer: distributed training would copy rank 0's table over tables of other lengths.
        self.table_RM = torch.empty(0, d_model)

    def forward(self, frames_BSM: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames, scaled and with dropout, and the table's rows for their length (R, M)."""
        rows_RM = self.dropout_table(self._rows(frames_BSM.size(1), frames_BSM.device).to(frames_BSM.dtype))
        scaled_BSM = frames_BSM if self.scale == 1.0 else frames_BSM * self.scale
        return self.dropout(
            scaled_BSM
        ), rows_RM  # as in NeMo, dropout is drawn for the table first, then for the frames

    def _rows(self, n_frames: int, device: torch.device) -> Tensor:
        if torch.compiler.is_exporting():  # a kept table would limit the length of an exported graph's input
            return sinusoidal_table(n_frames, self.d_model, device)
        if self.table_RM.size(0) < 2 * n_frames - 1 or self.table_RM.device != device:
            with torch.inference_mode(False):  # autograd refuses a tensor that was made in inference mode
                self.table_RM = sinusoidal_table(n_frames, self.d_model, device)
        centre = self.table_RM.size(0) // 2
        return self.table_RM[centre - n_frames + 1 : centre + n_frames]


def sinusoidal_table(n_frames: int, d_model: int, device: torch.device) -> Tensor:
    """Return a row for each offset, n_frames - 1 to -(n_frames - 1), sines and cosines interleaved: (R, M), fp32."""
    offsets_R1 = torch.arange(n_frames - 1, -n_frames, -1, dtype=torch.float32, device=device)[:, None]
    even_channels = torch.arange(0, d_model, 2, dtype=torch.float32, device=device)
    angles = offsets_R1 * torch.exp(even_channels * -(math.log(10000.0) / d_model))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)


class RelativeAttention(nn.Module):
    """Multi-head attention with score(i, j) = ((q_i + u) k_j + (q_i + v) r_{i-j}) / sqrt(K).

    Source: Transformer-XL (arXiv:1901.02860 section 3.3); NeMo `RelPositionMultiHeadAttention`.
    """

    def __init__(self, d_model: int, n_heads: int, *, dropout: Dropout, use_bias: bool, use_sdpa: bool) -> None:
        super().__init__()
        self.n_heads, self.use_sdpa = n_heads, use_sdpa
        self.linear_q = nn.Linear(d_model, d_model, bias=use_bias)
        self.linear_k = nn.Linear(d_model, d_model, bias=use_bias)
        self.linear_v = nn.Linear(d_model, d_model, bias=use_bias)
        self.linear_out = nn.Linear(d_model, d_model, bias=use_bias)
        self.dropout = dropout
        self.linear_pos = nn.Linear(d_model, d_model, bias=False)
        self.pos_bias_u = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(n_heads, d_model // n_heads))

    def forward(self, x_BSM: Tensor, positions_RM: Tensor, hidden_BSS: Tensor, key: Tensor | None = None) -> Tensor:
        """Return attended frames (B, S, M); `hidden_BSS` is True where a frame (second axis) must not see another."""
        q_BSHK, k_BHSK, v_BHSK = self._heads(x_BSM)
        r_HRK = self.linear_pos(positions_RM).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)
        content_BHSK = (q_BSHK + self.pos_bias_u).transpose(1, 2)
        position_BHSK = (q_BSHK + self.pos_bias_v).transpose(1, 2)
        bias_BHSS = relative_shift(position_BHSK @ r_HRK.transpose(1, 2))
        if self.use_sdpa:
            attended_BHSK = self._fused(content_BHSK, k_BHSK, v_BHSK, bias_BHSS, hidden_BSS[:, None])
        else:
            attended_BHSK = self._plain(content_BHSK, k_BHSK, v_BHSK, bias_BHSS, hidden_BSS[:, None], key)
        return self.linear_out(attended_BHSK.transpose(1, 2).flatten(2))

    def share_position_biases(self, other: RelativeAttention) -> None:
        """Use another layer's u and v (tied biases)."""
        self.pos_bias_u, self.pos_bias_v = other.pos_bias_u, other.pos_bias_v

    def _heads(self, x_BSM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            linear(x_BSM).unflatten(-1, (self.n_heads, -1)) for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        return q, k.transpose(1, 2), v.transpose(1, 2)

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, key: Tensor | None) -> Tensor:
        scores_BHSS = (q @ k.transpose(-2, -1) + bias) / math.sqrt(q.size(-1))
        weights_BHSS = scores_BHSS.masked_fill(hidden, MASKED_SCORE).softmax(-1).masked_fill(hidden, 0.0)
        return self.dropout(weights_BHSS, key) @ v

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        bias = (bias / math.sqrt(q.size(-1))).masked_fill(hidden, MASKED_SCORE)
        dropout = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return attended.masked_fill(hidden.all(-1, keepdim=True), 0.0)
