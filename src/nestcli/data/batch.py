"""The batch that the loader hands to the model, and the function that pads items into one.

Axes: B batch, N samples, zero-padded to the longest item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestcli.audio.load import Samples
from nestcli.data.utterance_audio import Skipped


@dataclass(frozen=True)
class NoiseBatch:
    """Clean speech, the noise or speech mixed into it, and the mixture. Source: NeMo `AudioNoiseBatch`.

    `sample_ids` are line numbers of the manifest. `counts` is False for a batch that only keeps the ranks in step.
    `skipped` lists the lines that belong to the batch but could not be read.
    """

    audio: Tensor  # (B, N) float32
    audio_len: Tensor  # (B,) int64, samples
    noise: Tensor  # (B, N)
    noise_len: Tensor  # (B,)
    noisy_audio: Tensor  # (B, N)
    noisy_audio_len: Tensor  # (B,)
    sample_ids: tuple[int, ...] = ()
    counts: bool = True
    skipped: tuple[Skipped, ...] = ()

    def to(self, device: torch.device, non_blocking: bool = False) -> NoiseBatch:
        """Copy the batch to a device. Copies from page-locked memory overlap with other work."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking or value.is_pinned())
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


Empty = Callable[[tuple[int, ...]], Samples]  # allocates an array; its content is undefined


def empty(shape: tuple[int, ...]) -> Samples:
    return np.empty(shape, np.float32)


def collate(
    audios: Sequence[Samples], noises: Sequence[Samples] | None, sample_ids: Sequence[int], empty: Empty = empty
) -> NoiseBatch:
    """Zero-pad items to the longest one, and cut or pad the noise to the same width. Does not mix anything."""
    longest = max(len(audio) for audio in audios)
    audio = torch.from_numpy(_stacked(audios, longest, empty))
    audio_len = torch.tensor([len(item) for item in audios])
    noise = torch.empty(len(audios), 0) if noises is None else torch.from_numpy(_stacked(noises, longest, empty))
    return NoiseBatch(
        audio=audio,
        audio_len=audio_len,
        noise=noise,
        noise_len=torch.tensor([0] * len(audios) if noises is None else [min(len(item), longest) for item in noises]),
        noisy_audio=audio,
        noisy_audio_len=audio_len,
        sample_ids=tuple(sample_ids),
    )


def _stacked(items: Sequence[Samples], width: int, empty: Empty) -> Samples:
    stacked = empty((len(items), width))
    for row, item in zip(stacked, items, strict=True):
        kept = item[:width]
        row[: len(kept)] = kept
        row[len(kept) :] = 0
    return stacked
