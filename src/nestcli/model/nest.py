"""NEST: the whole way from waveforms to the loss.

Axes: B batch, N samples (of audio) or selected tokens (of logits), D mel bins, T feature frames, S sub-sampled
frames and tokens, M model width, C codes, G codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nestcli.config import section
from nestcli.errors import ConfigError
from nestcli.model.conformer import ConformerEncoder, EncoderConfig
from nestcli.model.decoder import DecoderConfig, MultiSoftmaxDecoder
from nestcli.model.features import LogMelPreprocessor, PreprocessorConfig
from nestcli.model.loss import LossConfig, MaskedTokenLoss, fitted
from nestcli.model.masking import MaskingConfig, RandomBlockMasking
from nestcli.model.quantizer import QuantizerConfig, RandomProjectionQuantizer
from nestcli.untrusted import short


class NestOutput(NamedTuple):
    """What a forward pass gives; everything but the loss is detached."""

    loss: Tensor  # scalar
    correct: Tensor  # scalar: selected tokens (of all codebooks) whose most probable code is the target
    selected: Tensor  # scalar: selected tokens, times codebooks
    mask_BT: Tensor  # True where a frame was masked
    tokens_NG: Tensor  # targets of the selected tokens
    predicted_NG: Tensor  # their most probable codes
    encoded_BSM: Tensor  # what the encoder made of the masked audio
    frames_B: Tensor  # valid frames of it


@dataclass(frozen=True)
class NestConfig:
    """The blocks of `model` that shape the network, checked and made to fit each other."""

    preprocessor: PreprocessorConfig
    masking: MaskingConfig
    quantizer: QuantizerConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    loss: LossConfig
    mask_after_subsampling: bool

    @classmethod
    def from_config(cls, config: DictConfig) -> NestConfig:
        """Read the configuration. Raises ConfigError naming the key that does not fit."""
        position = config.model.mask_position
        if position not in ("pre_conv", "post_conv"):
            raise ConfigError(f"model.mask_position: {position!r}: use pre_conv or post_conv.")
        blocks = cls(
            preprocessor=section(PreprocessorConfig, config, "model.preprocessor"),
            encoder=section(EncoderConfig, config, "model.encoder"),
            masking=section(MaskingConfig, config, "model.masking"),
            quantizer=section(QuantizerConfig, config, "model.quantizer"),
            decoder=section(DecoderConfig, config, "model.decoder"),
            loss=section(LossConfig, config, "model.loss"),
            mask_after_subsampling=position == "post_conv",
        )
        if blocks.mask_after_subsampling:
            blocks._check_before_moving()
            blocks = blocks._moved_after_subsampling()
        blocks._check()
        blocks._check_against(config)
        return blocks

    def _check_against(self, config: DictConfig) -> None:
        """Compare the blocks with the keys of `model` that they repeat, and that a checkpoint need not have."""
        for key, name in (
            ("sample_rate", "preprocessor.sample_rate"),
            ("num_classes", "quantizer.num_classes"),
            ("num_books", "quantizer.num_books"),
            ("code_dim", "quantizer.code_dim"),
            ("squeeze_single", "quantizer.squeeze_single"),
        ):
            stated, used = config.model.get(key), attrgetter(name)(self)
            if stated is not None and (isinstance(stated, bool) != isinstance(used, bool) or stated != used):
                raise ConfigError(f"model.{key} is {short(stated)}, but model.{name} is {used}. Let them be the same.")

    def _check_before_moving(self) -> None:
        """With post_conv, values that are right for pre_conv are taken too, and no others."""
        factor, widths = self.encoder.subsampling_factor, (self.preprocessor.features, self.encoder.d_model)
        for name, either in (
            ("quantizer.feat_in", widths),
            ("masking.feat_in", widths),
            ("quantizer.combine_time_steps", (factor, 1)),
            ("loss.combine_time_steps", (factor, 1)),
        ):
            if (value := attrgetter(name)(self)) not in either:
                raise ConfigError(f"model.{name} is {value}, but the other blocks make it {either[1]}.")

    def _moved_after_subsampling(self) -> NestConfig:
        """With post_conv, everything about masks and tokens counts sub-sampled frames instead of feature frames."""
        factor, width = self.encoder.subsampling_factor, self.encoder.d_model
        return replace(
            self,
            masking=replace(self.masking, feat_in=width, block_size=max(1, self.masking.block_size // factor)),
            quantizer=replace(self.quantizer, feat_in=width, combine_time_steps=1),
            loss=replace(self.loss, combine_time_steps=1),
        )

    def _check(self) -> None:
        encoder_out = self.encoder.feat_out if self.encoder.feat_out > 0 else self.encoder.d_model
        step = 1 if self.mask_after_subsampling else self.encoder.subsampling_factor
        masked_width = self.encoder.d_model if self.mask_after_subsampling else self.preprocessor.features
        for key, value, wanted in (
            ("encoder.feat_in", self.encoder.feat_in, self.preprocessor.features),
            ("quantizer.feat_in", self.quantizer.feat_in, masked_width),
            ("masking.feat_in", self.masking.feat_in, masked_width),
            ("decoder.feat_in", self.decoder.feat_in, encoder_out),
            ("decoder.num_classes", self.decoder.num_classes, self.quantizer.num_classes),
            ("decoder.num_decoders", self.decoder.num_decoders, self.quantizer.num_books),
            ("decoder.squeeze_single", self.decoder.squeeze_single, self.quantizer.squeeze_single),
            ("loss.num_decoders", self.loss.num_decoders, self.quantizer.num_books),
            ("loss.squeeze_single", self.loss.squeeze_single, self.quantizer.squeeze_single),
            ("quantizer.combine_time_steps", self.quantizer.combine_time_steps, step),
            ("loss.combine_time_steps", self.loss.combine_time_steps, step),
        ):
            if value != wanted:
                raise ConfigError(f"model.{key} is {value}, but the other blocks make it {wanted}.")
        if self.preprocessor.pad_to < 1 or self.preprocessor.pad_to % self.encoder.subsampling_factor:
            raise ConfigError(
                f"model.preprocessor.pad_to: {self.preprocessor.pad_to} must be a multiple of "
                f"model.encoder.subsampling_factor={self.encoder.subsampling_factor}, so that tokens come out whole."
            )


class NestModel(nn.Module):
    """The denoising masked-token predictor; parameter names, shapes and order are NeMo's own.

    Source: arXiv:2408.13106; NeMo `EncDecDenoiseMaskedTokenPredModel`. From the same seed the initial weights are
    NeMo's too: NeMo builds encoder and decoder twice, so their weights are drawn a second time here.
    """

    def __init__(
        self, config: NestConfig, encoder_class: Callable[[EncoderConfig], ConformerEncoder] = ConformerEncoder
    ) -> None:
        super().__init__()
        self.mask_after_subsampling = config.mask_after_subsampling
        encoder, decoder = encoder_class(config.encoder), MultiSoftmaxDecoder(config.decoder)
        quantizer = RandomProjectionQuantizer(config.quantizer)
        mask_processor = RandomBlockMasking(config.masking)
        encoder.reset_parameters()
        decoder.reset_parameters()
        self.preprocessor = LogMelPreprocessor(config.preprocessor)
        self.encoder = encoder
        self.quantizer = quantizer
        self.mask_processor = mask_processor
        self.decoder = decoder
        self.loss = MaskedTokenLoss(config.loss)

    def use_half(self, dtype: torch.dtype) -> None:
        """Keep the trained weights in a shorter type; features, tokens and batch norm stay in fp32.

        A running mean takes over a tenth of what a batch differs by, which bf16 rounds away.
        """
        self.encoder.to(dtype)
        self.decoder.to(dtype)
        for part in self.encoder.modules():
            if isinstance(part, _BatchNorm):
                part.float()

    def parts_in_fp32(self) -> list[nn.Module]:
        """The encoder's parts that `use_half` has left in fp32; none without it."""
        if self._dtype == torch.float32:
            return []
        return [part for part in self.encoder.modules() if isinstance(part, _BatchNorm)]

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.layer.weight.dtype

    def forward(self, clean_BN: Tensor, clean_len_B: Tensor, noisy_BN: Tensor, noisy_len_B: Tensor) -> NestOutput:
        """Loss of predicting the tokens of the clean audio under the masked frames of the noisy audio.

        Waveforms (B, N) at the configured rate, lengths (B,) in samples.
        """
        clean_BDT, clean_frames_B = self.preprocessor(clean_BN, clean_len_B)
        noisy_BDT, noisy_frames_B = self.preprocessor(noisy_BN, noisy_len_B)
        if self.mask_after_subsampling:
            tokens_BSG = self._tokens_of_subsampled(clean_BDT, clean_frames_B)
            encoded_BSM, mask_BT, frames_B = self._encode_masking_subsampled(noisy_BDT, noisy_frames_B)
        else:
            tokens_BSG = self._with_book_axis(self.quantizer(clean_BDT))
            masked_BDT, mask_BT = self.mask_processor(noisy_BDT, noisy_frames_B)
            encoded_BSM, frames_B = self.encoder(masked_BDT.to(self._dtype), noisy_frames_B)
        return self._predict(encoded_BSM, tokens_BSG, mask_BT, frames_B)

    def _predict(self, encoded_BSM: Tensor, tokens_BSG: Tensor, mask_BT: Tensor, frames_B: Tensor) -> NestOutput:
        selected_BS = self.loss.select(mask_BT)
        logits_NCG = self.decoder(encoded_BSM[selected_BS])
        tokens_NG = fitted(tokens_BSG, selected_BS.size(1))[selected_BS]
        predicted_NG = logits_NCG.detach().argmax(1)
        correct = (predicted_NG == tokens_NG).sum()
        selected = torch.tensor(tokens_NG.numel(), device=correct.device)
        loss, encoded_BSM = self.loss(logits_NCG, tokens_NG), encoded_BSM.detach()
        return NestOutput(loss, correct, selected, mask_BT, tokens_NG, predicted_NG, encoded_BSM, frames_B)

    @torch.no_grad()
    def _tokens_of_subsampled(self, clean_BDT: Tensor, frames_B: Tensor) -> Tensor:
        subsampled_BSM, _ = self.encoder.pre_encode(clean_BDT.transpose(1, 2).to(self._dtype), frames_B)
        return self._with_book_axis(self.quantizer(subsampled_BSM.transpose(1, 2)))

    def _encode_masking_subsampled(self, noisy_BDT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        subsampled_BSM, lengths_B = self.encoder.pre_encode(noisy_BDT.transpose(1, 2).to(self._dtype), frames_B)
        masked_BMS, mask_BS = self.mask_processor(subsampled_BSM.transpose(1, 2), lengths_B)
        encoded_BSM, _ = self.encoder.encode(masked_BMS.transpose(1, 2), lengths_B)
        return encoded_BSM, mask_BS, lengths_B

    def _with_book_axis(self, tokens: Tensor) -> Tensor:
        return tokens if tokens.dim() == 3 else tokens[:, :, None]
