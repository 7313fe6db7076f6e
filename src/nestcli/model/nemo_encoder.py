"""NeMo's own ConformerEncoder in place of ours, if NeMo is installed in the same environment.

Axes: B batch, D mel bins, T feature frames, S sub-sampled frames, M model width.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nestcli.errors import MissingDependencyError
from nestcli.model.config import EncoderConfig

_OURS_ALONE = ("backend", "conv_norm_ignore_padding", "compile", "dropout_draws")


class NemoEncoder(nn.Module):
    """NeMo's encoder with the interface of `conformer.ConformerEncoder`: same names, order and initial weights.

    Registers the parts of NeMo's encoder instead of the encoder, so that names have no further prefix and checkpoints
    fit both encoders. Raises MissingDependencyError.
    """

    pre_encode: nn.Module

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        encoder = _imported()(**_arguments(config))
        self._nemo = (encoder,)  # nn.Module does not register what is in a tuple
        for name, part in encoder.named_children():
            self.add_module(name, part)

    def train(self, mode: bool = True) -> NemoEncoder:
        """Set the mode here and in NeMo's encoder, whose own flag decides about stochastic depth."""
        self._nemo[0].train(mode)
        return super().train(mode)

    def reset_parameters(self) -> None:
        """Draw the weights again, as PyTorch's layers do, in NeMo's order of construction."""
        nemo = self._nemo[0]
        last = [] if nemo.out_proj is None else [nemo.out_proj]
        for module in (*nemo.pre_encode.conv, nemo.pre_encode.out, *nemo.layers.modules(), *last):
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
                module.reset_parameters()

    def forward(self, features_BDT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return encoded frames (B, S, M) and their valid lengths (B,)."""
        encoded_BMS, lengths_B = self._nemo[0](audio_signal=features_BDT, length=lengths_B)
        return encoded_BMS.transpose(1, 2), lengths_B

    def encode(self, frames_BSM: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sub-sampled frames (B, S, M); return encoded frames (B, S, M) and their valid lengths (B,)."""
        lengths_B = lengths_B.to(torch.int64)  # NeMo's sub-sampling gives int32
        encoded_BMS, lengths_B = self._nemo[0](audio_signal=frames_BSM, length=lengths_B, bypass_pre_encode=True)
        return encoded_BMS.transpose(1, 2), lengths_B


def _imported() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NeMo warns about optional packages
            from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
    except ImportError as error:
        raise MissingDependencyError(
            f"model.encoder.backend=nemo (or USE_NEMO_CONFORMER=true): NeMo cannot be imported here: {error}. Run nest "
            "in an environment that has it (docs/configuration.md shows how to make one), or set "
            "model.encoder.backend=nest: it is the same model."
        ) from None
    return ConformerEncoder


def _arguments(config: EncoderConfig) -> dict[str, Any]:
    """Return our settings as arguments of NeMo's constructor: the same names, lists in place of tuples."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in _OURS_ALONE}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
