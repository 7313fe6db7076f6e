"""NEST, from waveforms to the loss.

Axes: B batch, N samples (in audio) or selected tokens (in logits), D mel bins, T feature frames, S sub-sampled
frames and tokens, M model width, C codes, G codebooks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestcli.errors import ConfigError
from nestcli.model.config import EncoderConfig, NestConfig
from nestcli.model.conformer import ConformerEncoder
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.loss import MaskedTokenLoss, MultiSoftmaxDecoder, fitted
from nestcli.model.masking import RandomBlockMasking
from nestcli.model.quantizer import RandomProjectionQuantizer

_BATCH_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)


class NestOutput(NamedTuple):
    """The result of a forward pass; everything but the loss is detached."""

    loss: Tensor  # scalar
    correct: Tensor  # scalar: selected tokens, in all codebooks, whose most probable code is the target
    selected: Tensor  # scalar: selected tokens, times codebooks
    mask_BT: Tensor  # True where a frame was masked
    tokens_NG: Tensor  # targets of the selected tokens
    predicted_NG: Tensor  # their most probable codes
    encoded_BSM: Tensor  # the encoder's output for the masked audio
    frames_B: Tensor  # its valid frames


class NestModel(nn.Module):
    """The denoising masked-token predictor, with NeMo's parameter names, shapes and order.

    The same seed gives NeMo's initial weights: NeMo builds encoder and decoder twice, so their weights are drawn a
    second time here. Source: arXiv:2408.13106; NeMo `EncDecDenoiseMaskedTokenPredModel`.
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
        """Keep encoder and decoder in a shorter type; features, tokens and batch norm stay in fp32.

        A running mean moves by a tenth of its distance to a batch's mean, which bf16 would round away.
        """
        self.encoder.to(dtype)
        self.decoder.to(dtype)
        for part in self.encoder.modules():
            if isinstance(part, _BATCH_NORMS):
                part.float()

    def parts_in_fp32(self) -> list[nn.Module]:
        """Return the encoder's parts that `use_half` left in fp32; [] if it was not called."""
        if self._dtype == torch.float32:
            return []
        return [part for part in self.encoder.modules() if isinstance(part, _BATCH_NORMS)]

    @property
    def _dtype(self) -> torch.dtype:
        return self.decoder.layer.weight.dtype

    def forward(self, clean_BN: Tensor, clean_len_B: Tensor, noisy_BN: Tensor, noisy_len_B: Tensor) -> NestOutput:
        """Predict the tokens of the clean audio where the noisy audio is masked.

        Waveforms (B, N) have the configured rate, lengths (B,) are in samples.
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
        places_N = selected_BS.flatten().nonzero().squeeze(1)  # a GPU is waited for once, to learn their number
        logits_NCG = self.decoder(encoded_BSM.flatten(0, 1).index_select(0, places_N))
        tokens_NG = fitted(tokens_BSG, selected_BS.size(1)).flatten(0, 1).index_select(0, places_N)
        predicted_NG = logits_NCG.detach().argmax(1)
        correct = (predicted_NG == tokens_NG).sum()
        selected = torch.full_like(correct, tokens_NG.numel())
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


def check_memory(nest: NestConfig) -> None:
    """Raise ConfigError if the model's weights alone are larger than this machine's memory."""
    encoder, quantizer = nest.encoder, nest.quantizer
    layers = encoder.n_layers * (4 * encoder.ff_expansion_factor + 8) * encoder.d_model**2
    stacked = quantizer.code_dim + encoder.d_model  # parameters per code: in the codebook and in the decoder
    needed = 4 * (layers + quantizer.num_books * quantizer.num_classes * stacked)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise ConfigError(
            f"the model's weights need {needed / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f}. "
            "Lower model.encoder.d_model, model.encoder.n_layers or model.quantizer.num_classes."
        )
