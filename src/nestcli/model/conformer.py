"""The FastConformer encoder: sub-sampling, relative positions, Conformer layers.

Axes: B batch, D mel bins, T feature frames, S sub-sampled frames, M model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.attention import Dropout, RelativeAttention, RelativePositions
from nestcli.model.config import EncoderConfig
from nestcli.model.fast import compile_layer, convolved, depthwise, halved, running_layers


class DepthwiseStridingSubsampling(nn.Module):
    """Convolutions of stride 2 on time and frequency, then a linear layer over (channel, frequency).

    Source: Fast Conformer (arXiv:2305.05084 section 2); NeMo `ConvSubsampling` with `dw_striding`.
    """

    def __init__(self, feat_in: int, d_model: int, channels: int, factor: int) -> None:
        super().__init__()
        stages = factor.bit_length() - 1
        layers: list[nn.Module] = [_strided(1, channels), nn.ReLU()]
        for _ in range(stages - 1):
            layers += [
                _strided(channels, channels, groups=channels),
                nn.Conv2d(channels, channels, 1),
                nn.ReLU(),
            ]
        conv = nn.Sequential(*layers)
        bins = feat_in
        for _ in range(stages):
            bins = halved(bins)
        self.out = nn.Linear(channels * bins, d_model)  # registered before `conv`: the order of NeMo's state dict
        self.conv = conv

    def reset_parameters(self) -> None:
        """Draw the weights again, in the order of construction."""
        for layer in (*self.conv, self.out):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.reset_parameters()

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return frames (B, S, M) and their valid lengths (B,)."""
        x_BSW, lengths_B = convolved(list(self.conv), features_BTD, lengths_B)
        return self.out(x_BSW), lengths_B


def _strided(channels_in: int, channels_out: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1, groups=groups)


class FeedForward(nn.Module):
    """Two linear layers with SiLU and dropout between them."""

    def __init__(self, d_model: int, d_hidden: int, dropout: Dropout, use_bias: bool) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_hidden, bias=use_bias)
        self.dropout = dropout
        self.linear2 = nn.Linear(d_hidden, d_model, bias=use_bias)

    def forward(self, x_BSM: Tensor, key: Tensor | None = None) -> Tensor:
        return self.linear2(self.dropout(F.silu(self.linear1(x_BSM)), key))


class Convolution(nn.Module):
    """Pointwise with GLU, depthwise, normalisation, SiLU, pointwise.

    Source: Conformer (arXiv:2005.08100 section 2.2); NeMo `ConformerConvolution`. Batch statistics include padding
    frames, as in NeMo, unless `conv_norm_ignore_padding` is set. Channels stay the last axis: the pointwise
    convolutions are then matrix products.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, self.padding = config.d_model, config.conv_padding
        self.ignore_padding = config.conv_norm_ignore_padding
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, 1, bias=config.use_bias)
        self.depthwise_conv = nn.Conv1d(width, width, config.conv_kernel_size, groups=width, bias=config.use_bias)
        self.batch_norm = _convolution_norm(config)  # NeMo's name for every kind of norm
        self.pointwise_conv2 = nn.Conv1d(width, width, 1, bias=config.use_bias)

    def forward(self, x_BSM: Tensor, padding_BS: Tensor) -> Tensor:
        x_BSM = F.glu(_pointwise(self.pointwise_conv1, x_BSM)).masked_fill(padding_BS[:, :, None], 0.0)
        x_BSM = F.silu(self._norm(depthwise(x_BSM, self.depthwise_conv, self.padding), padding_BS))
        return _pointwise(self.pointwise_conv2, x_BSM)

    def _norm(self, x_BSM: Tensor, padding_BS: Tensor) -> Tensor:
        if isinstance(self.batch_norm, nn.LayerNorm):
            return self.batch_norm(x_BSM)
        if isinstance(self.batch_norm, nn.GroupNorm):
            return self.batch_norm(x_BSM.transpose(1, 2)).transpose(1, 2)
        if self.ignore_padding and self.training:
            valid_NM = self.batch_norm(x_BSM[~padding_BS])
            normed_BSM = torch.zeros_like(x_BSM, dtype=valid_NM.dtype)
            return normed_BSM.masked_scatter(~padding_BS[:, :, None], valid_NM)
        return self.batch_norm(x_BSM.flatten(0, 1)).view(x_BSM.shape)


def _pointwise(conv: nn.Conv1d, x_BSM: Tensor) -> Tensor:
    return F.linear(x_BSM, conv.weight.squeeze(-1), conv.bias)


def _convolution_norm(config: EncoderConfig) -> nn.Module:
    if config.conv_norm_type == "batch_norm":
        return nn.BatchNorm1d(config.d_model)
    if config.conv_norm_type == "layer_norm":
        return nn.LayerNorm(config.d_model)
    return nn.GroupNorm(config.conv_norm_groups, config.d_model)


class ConformerLayer(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each residual; then a norm.

    Source: Conformer (arXiv:2005.08100 section 2.4); NeMo `ConformerLayer`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, hidden = config.d_model, config.d_model * config.ff_expansion_factor
        self.norm_feed_forward1 = nn.LayerNorm(width)
        self.feed_forward1 = FeedForward(width, hidden, Dropout(config.dropout, site=1), config.use_bias)
        self.norm_conv = nn.LayerNorm(width)
        self.conv = Convolution(config)
        self.norm_self_att = nn.LayerNorm(width)
        self.self_attn = RelativeAttention(
            width,
            config.n_heads,
            dropout=Dropout(config.dropout_att, site=2),
            use_bias=config.use_bias,
            use_sdpa=config.use_pytorch_sdpa,
        )
        self.norm_feed_forward2 = nn.LayerNorm(width)
        self.feed_forward2 = FeedForward(width, hidden, Dropout(config.dropout, site=3), config.use_bias)
        self.residual_dropouts = nn.ModuleList(
            Dropout(config.dropout, site, channels_first=site == 6) for site in (4, 5, 6, 7)
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(
        self,
        x_BSM: Tensor,
        positions_RM: Tensor,
        hidden_BSS: Tensor,
        padding_BS: Tensor,
        key: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output (B, S, M); `key` is for the layer's dropout, see `Dropout`."""
        drop1, drop2, drop3, drop4 = self.residual_dropouts
        x_BSM = x_BSM + 0.5 * drop1(self.feed_forward1(self.norm_feed_forward1(x_BSM), key), key)
        x_BSM = x_BSM + drop2(self.self_attn(self.norm_self_att(x_BSM), positions_RM, hidden_BSS, key), key)
        x_BSM = x_BSM + drop3(self.conv(self.norm_conv(x_BSM), padding_BS), key)
        x_BSM = x_BSM + 0.5 * drop4(self.feed_forward2(self.norm_feed_forward2(x_BSM), key), key)
        return self.norm_out(x_BSM)


class ConformerEncoder(nn.Module):
    """The FastConformer encoder (arXiv:2305.05084); NeMo `ConformerEncoder`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config, self.hashes_dropout = config, config.hashes_dropout
        self.pre_encode = DepthwiseStridingSubsampling(
            config.feat_in,
            config.d_model,
            config.subsampling_channels,
            config.subsampling_factor,
        )
        self.pos_enc = RelativePositions(
            config.d_model,
            scale_input=config.xscaling,
            dropout=config.dropout_pre_encoder,
            dropout_table=config.dropout_emb,
        )
        layers = [ConformerLayer(config) for _ in range(config.n_layers)]
        for layer in layers if not config.untie_biases else []:
            layer.self_attn.share_position_biases(layers[0].self_attn)
        self.layers = nn.ModuleList(layers)
        for layer in layers if config.compile else []:  # all layers share one compilation
            compile_layer(layer, hashes_dropout=self.hashes_dropout)
        if config.width_out != config.d_model:
            self.out_proj: nn.Linear | None = nn.Linear(config.d_model, config.width_out)
        else:
            self.out_proj = None

    def reset_parameters(self) -> None:
        """Draw the weights again, in the order of construction."""
        self.pre_encode.reset_parameters()
        for module in self.layers.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                module.reset_parameters()
        if self.out_proj is not None:
            self.out_proj.reset_parameters()

    def forward(self, features_BDT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return encoded frames (B, S, M) and their valid lengths (B,)."""
        return self.encode(*self.pre_encode(features_BDT.transpose(1, 2), lengths_B))

    def encode(
        self, frames_BSM: Tensor, lengths_B: Tensor, by_layer: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode sub-sampled frames (B, S, M); return encoded frames (B, S, M) and their valid lengths (B,).

        Appends the input of the first layer and the output of every layer to `by_layer`.
        """
        x_BSM, positions_RM = self.pos_enc(frames_BSM)
        if by_layer is not None:
            by_layer.append(x_BSM)
        padding_BS = torch.arange(x_BSM.size(1), device=x_BSM.device) >= lengths_B[:, None]
        hidden_BSS = self._hidden(padding_BS)
        inputs = (x_BSM, 2), (hidden_BSS, 3), (padding_BS, 2)
        with running_layers(self.config.compile, positions_RM, *inputs) as positions_RM:
            for number, (layer, key) in enumerate(zip(self.layers, self._dropout_keys(x_BSM.device), strict=True)):
                before_BSM = x_BSM
                x_BSM = layer(x_BSM, positions_RM, hidden_BSS, padding_BS, key)
                x_BSM = self._maybe_dropped(number, before_BSM, x_BSM)
                if by_layer is not None:
                    by_layer.append(x_BSM)
        return (x_BSM if self.out_proj is None else self.out_proj(x_BSM)), lengths_B

    def _dropout_keys(self, device: torch.device) -> Sequence[Tensor | None]:
        """Draw a key for each layer's dropout; None for layers whose dropout torch's generator draws."""
        if not (self.hashes_dropout and self.training):
            return [None] * len(self.layers)
        return torch.randint(-(2**31), 2**31, (len(self.layers), 1), device=device).to(torch.int32).unbind()

    def _hidden(self, padding_BS: Tensor) -> Tensor:
        """Return True where frame i must not see frame j (B, S, S): padding, and frames outside the context."""
        hidden_BSS = padding_BS[:, None, :] | padding_BS[:, :, None]
        outside_SS = outside_context(padding_BS.size(1), self.config, padding_BS.device)
        return hidden_BSS if outside_SS is None else hidden_BSS | outside_SS

    def _maybe_dropped(self, number: int, before_BSM: Tensor, after_BSM: Tensor) -> Tensor:
        probability = drop_probability(self.config, number)
        if not self.training or probability <= 0:
            return after_BSM
        if torch.rand(1).item() < probability:  # on the CPU whatever the device, as in NeMo
            return after_BSM * 0.0 + before_BSM
        return (after_BSM - before_BSM) / (1.0 - probability) + before_BSM


def drop_probability(config: EncoderConfig, layer: int) -> float:
    """Return the probability of skipping a layer (arXiv:1603.09382): 0 before the start, then uniform or rising."""
    start = config.stochastic_depth_start_layer
    if layer < start:
        return 0.0
    if config.stochastic_depth_mode == "uniform":
        return config.stochastic_depth_drop_prob
    return (layer - start + 1) / (config.n_layers - start) * config.stochastic_depth_drop_prob


def outside_context(n_frames: int, config: EncoderConfig, device: torch.device) -> Tensor | None:
    """Return True where frame j lies outside the context of frame i (S, S); None if the context is unlimited."""
    left, right = config.att_context_size
    frame_S = torch.arange(n_frames, device=device)
    if config.att_context_style == "chunked_limited" and right >= 0:
        chunk_S = frame_S // (right + 1)
        behind_SS = chunk_S[:, None] - chunk_S[None, :]
        outside_SS = behind_SS < 0
        return outside_SS if left < 0 else outside_SS | (behind_SS > left // (right + 1))
    if left < 0 and right < 0:
        return None
    ahead_SS = frame_S[None, :] - frame_S[:, None]
    outside_SS = torch.zeros(n_frames, n_frames, dtype=torch.bool, device=device)
    if left >= 0:
        outside_SS |= ahead_SS < -left
    if right >= 0:
        outside_SS |= ahead_SS > right
    return outside_SS
