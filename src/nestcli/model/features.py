"""Waveform to normalised log-mel features.

Axes: B batch, N samples, T feature frames, F frequency bins of the STFT, D mel bins.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestcli.model.config import PER_FEATURE, PreprocessorConfig
from nestcli.model.torch_private import FullPrecisionBuffers

PREEMPHASIS = 0.97
LOG_GUARD = 2.0**-24  # added to mel energies before the logarithm
STD_GUARD = 1e-5  # added to standard deviations before the division


class LogMelPreprocessor(nn.Module):
    """Normalised log-mel features, computed in fp32 and without gradients.

    Departures from NeMo, both undone by `nemo_exact`: dither leaves the caller's waveform unchanged, and a mel bin that
    never changes (digital silence) gives zeros instead of rounding noise.
    Source: NeMo `AudioToMelSpectrogramPreprocessor`.
    """

    def __init__(self, config: PreprocessorConfig) -> None:
        super().__init__()
        self.config = config
        self.featurizer = LogMelFilterbank(config)

    @torch.no_grad()
    def forward(self, audio_BN: Tensor, audio_len_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, D, T), T a multiple of `pad_to`, and the number of valid frames (B,)."""
        with _without_autocast(audio_BN.device.type):
            audio_BN = self._dithered(audio_BN.float())
            log_mel_BDT = self.featurizer(preemphasised(audio_BN, audio_len_B))
            frames_B = audio_len_B // self.featurizer.hop_length
            features_BDT = self._normalised(log_mel_BDT, frames_B)
        return self._padded(features_BDT), frames_B

    def _dithered(self, audio_BN: Tensor) -> Tensor:
        if not self.training or self.config.dither <= 0:
            return audio_BN
        dithered_BN = audio_BN + self.config.dither * torch.randn_like(audio_BN)
        return audio_BN.copy_(dithered_BN) if self.config.nemo_exact else dithered_BN

    def _normalised(self, x_BDT: Tensor, frames_B: Tensor) -> Tensor:
        """Normalise valid frames to zero mean and unit (unbiased) deviation; others become `pad_value`.

        Each mel bin is normalised alone, or all of them together, which keeps the shape of the mean spectrum.
        """
        if self.config.normalize == PER_FEATURE:
            return self._normalised_by_row(x_BDT, frames_B)
        B, D, T = x_BDT.shape
        flat_B1N = x_BDT.transpose(1, 2).reshape(B, 1, T * D)
        return self._normalised_by_row(flat_B1N, frames_B * D).view(B, T, D).transpose(1, 2)

    def _normalised_by_row(self, x_BDT: Tensor, frames_B: Tensor) -> Tensor:
        """Normalise each row over its first `frames_B` numbers."""
        valid_B1T = torch.arange(x_BDT.size(2), device=x_BDT.device) < frames_B[:, None, None]
        count_B11 = frames_B[:, None, None]
        x_BDT = x_BDT.masked_fill(~valid_B1T, 0.0)
        mean_BD1 = x_BDT.sum(2, keepdim=True) / count_B11
        centred_BDT = (x_BDT - mean_BD1).masked_fill(~valid_B1T, 0.0)
        std_BD1 = (centred_BDT.square().sum(2, keepdim=True) / (count_B11 - 1.0)).sqrt()
        std_BD1 = std_BD1.masked_fill(std_BD1.isnan(), 0.0) + STD_GUARD  # a single frame has no deviation
        if not self.config.nemo_exact:
            changes_BD1 = ((x_BDT != x_BDT[:, :, :1]) & valid_B1T).any(2, keepdim=True)
            centred_BDT = centred_BDT.masked_fill(~changes_BD1, 0.0)
        return (centred_BDT / std_BD1).masked_fill(~valid_B1T, self.config.pad_value)

    def _padded(self, features_BDT: Tensor) -> Tensor:
        if self.config.pad_to <= 1:
            return features_BDT
        return F.pad(features_BDT, (0, -features_BDT.size(2) % self.config.pad_to), value=self.config.pad_value)


class LogMelFilterbank(FullPrecisionBuffers):
    """Natural logarithm of Slaney mel energies. The buffers have the names of NeMo's state dict."""

    window: Tensor
    fb: Tensor

    def __init__(self, config: PreprocessorConfig) -> None:
        super().__init__()
        self.n_fft, self.hop_length = config.n_fft, config.hop_length
        self.register_buffer("window", torch.hann_window(config.window_length, periodic=False))
        filters_DF = slaney_mel_filters(config.sample_rate, config.n_fft, config.features)
        self.register_buffer("fb", torch.from_numpy(filters_DF)[None].to(self.window.device))

    def forward(self, audio_BN: Tensor) -> Tensor:
        """Return log-mel energies (B, D, 1 + N // hop_length)."""
        spectrum_BFT = torch.stft(
            audio_BN,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            win_length=self.window.numel(),
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        # |z| and then its square, as in NeMo: re² + im² would differ in the last digits.
        magnitude_BFT = torch.view_as_real(spectrum_BFT).square().sum(-1).sqrt()
        return (self.fb @ magnitude_BFT.square() + LOG_GUARD).log()


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off; some devices, such as `meta`, have none."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def preemphasised(audio_BN: Tensor, audio_len_B: Tensor) -> Tensor:
    """Return y[0] = x[0], y[t] = x[t] - 0.97 x[t-1]; zero beyond each item's length."""
    emphasised_BN = torch.cat((audio_BN[:, :1], audio_BN[:, 1:] - PREEMPHASIS * audio_BN[:, :-1]), dim=1)
    valid_BN = torch.arange(audio_BN.size(1), device=audio_BN.device) < audio_len_B[:, None]
    return emphasised_BN.masked_fill(~valid_BN, 0.0)


def slaney_mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Return triangular mel filters (n_mels, 1 + n_fft // 2) from 0 to sample_rate / 2, each of the same area.

    Computed in float64, returned in float32; equal to librosa's `filters.mel` to the last bit.
    Source: Slaney's Auditory Toolbox (1998), whose scale is linear below 1 kHz and logarithmic above.
    """
    bins_hz = np.fft.rfftfreq(n=n_fft, d=1.0 / sample_rate)
    corners_hz = _mel_to_hz(np.linspace(0.0, _hz_to_mel(sample_rate / 2), n_mels + 2))
    widths_hz = np.diff(corners_hz)
    distances = corners_hz[:, None] - bins_hz[None, :]
    rising = -distances[:-2] / widths_hz[:-1, None]
    falling = distances[2:] / widths_hz[1:, None]
    # Rounded to float32 before the area normalisation, as in the recorded values.
    triangles = np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32)
    triangles *= (2.0 / (corners_hz[2:] - corners_hz[:-2]))[:, None]
    return triangles


_LINEAR_HZ_PER_MEL = 200.0 / 3
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    if hz < _LOG_START_HZ:
        return hz / _LINEAR_HZ_PER_MEL
    return float(_LOG_START_MEL + np.log(hz / _LOG_START_HZ) / _LOG_STEP)


def _mel_to_hz(mels: np.ndarray) -> np.ndarray:
    above = mels >= _LOG_START_MEL
    hz = _LINEAR_HZ_PER_MEL * mels
    hz[above] = _LOG_START_HZ * np.exp(_LOG_STEP * (mels[above] - _LOG_START_MEL))
    return hz
