"""NEST: the whole way from waveforms to the loss.

Axes: B batch, N samples (of audio) or selected tokens (of logits), D mel bins, T feature frames, S sub-sampled
frames and tokens, M model width, C codes, G codebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nestcli.model.config import (
    EncoderConfig,
    NestConfig,
)
from nestcli.model.conformer import ConformerEncoder
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.loss import MaskedTokenLoss, MultiSoftmaxDecoder, fitted
from nestcli.model.masking import RandomBlockMasking
from nestcli.model.quantizer import RandomProjectionQuantizer


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
