"""Process a manifest in batches of similar length; threads read the audio while the previous batch is computed.

Axes: B batch, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nestcli.audio.load import Samples, reason_of
from nestcli.data.manifest import Manifest
from nestcli.data.utterance_audio import read_audio
from nestcli.errors import ConfigError, DataError
from nestcli.jobs.cores import available_cores
from nestcli.jobs.prefetch_thread import ahead

BATCH_DURATION = 120.0  # s of padded audio
MAX_DURATION = 240.0  # s; memory grows with the square of the length
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_THREADS = 4

Embed = Callable[[Tensor, Tensor], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class Walked:
    """One line of the manifest: the features of its audio, or the reason why it has none."""

    index: int
    features: Tensor | None = None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Walk:
    """Settings for processing a manifest; times in seconds."""

    sample_rate: int
    device: torch.device
    precision: str = "fp32"
    batch_duration: float = BATCH_DURATION
    max_duration: float = MAX_DURATION
    shortest: int = 160  # samples of one feature frame
    change: Callable[[Samples], Samples] | None = None  # applied to each utterance, for example to add noise

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision {self.precision}: use one of {', '.join(PRECISIONS)}.")
        if self.batch_duration <= 0 or self.max_duration <= 0:
            raise ConfigError("--batch-duration and --max-duration must be more than 0 seconds.")

    def autocast(self) -> AbstractContextManager[object]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def batches(self, durations: npt.NDArray[np.float64]) -> list[npt.NDArray[np.int64]]:
        """Return batches of lines, longest first, with at most `batch_duration` of padded audio, or a single line."""
        order = np.argsort(-durations, kind="stable")
        found, start = [], 0
        while start < len(order):
            longest = max(float(durations[order[start]]), 1e-3)
            size = max(1, int(self.batch_duration // longest))
            found.append(order[start : start + size])
            start += size
        return found

    def through(
        self, manifest: Manifest, batches: Sequence[npt.NDArray[np.int64]], embed: Embed
    ) -> Iterator[list[Walked]]:
        """Yield the embedded lines of each batch in turn; at most two batches are in memory.

        `embed` takes waveforms (B, N) and lengths (B,) on the device, and returns a tensor for each item.
        """
        with ThreadPoolExecutor(min(_THREADS, available_cores())) as pool:

            def read() -> Iterator[list[Samples | Walked]]:
                for batch in batches:
                    yield list(pool.map(lambda index: self._read(manifest, int(index)), batch))

            for batch, audio in zip(batches, ahead(read()), strict=True):
                yield self._embedded(batch, audio, embed)

    def _read(self, manifest: Manifest, index: int) -> Samples | Walked:
        duration = float(manifest.durations[index])
        if duration > self.max_duration:
            detail = f"{duration:.1f} s is more than {self.max_duration:g} s; cut it with nest prepare-data --segment"
            return Walked(index, reason="too_long", detail=detail)
        try:
            samples = read_audio(manifest.entry(index), sample_rate=self.sample_rate)
        except DataError as error:
            return Walked(index, reason=reason_of(error), detail=str(error))
        if len(samples) < self.shortest:
            return Walked(index, reason="too_short", detail=f"{len(samples)} samples are fewer than one frame needs")
        if not np.isfinite(samples).all():
            return Walked(index, reason="not_finite", detail="some samples are NaN or infinite")
        return samples if self.change is None else self.change(samples)

    def _embedded(self, batch: npt.NDArray[np.int64], audio: Sequence[Samples | Walked], embed: Embed) -> list[Walked]:
        good = [each for each in audio if not isinstance(each, Walked)]
        made: Iterator[Tensor] = iter(())
        if good:
            lengths_B = torch.tensor([len(each) for each in good])
            audio_BN = torch.zeros(len(good), int(lengths_B.max()))
            for row, samples in zip(audio_BN, good, strict=True):
                row[: len(samples)] = torch.from_numpy(samples)
            with torch.inference_mode(), self.autocast():
                made = iter(embed(audio_BN.to(self.device), lengths_B.to(self.device)))
        return [
            each if isinstance(each, Walked) else Walked(int(index), next(made))
            for index, each in zip(batch, audio, strict=True)
        ]


def chosen_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`. Raises ConfigError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use.")
    return device
