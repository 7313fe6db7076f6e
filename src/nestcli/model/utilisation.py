"""Model FLOPs utilisation: the arithmetic of the batches, as a share of what the device could do in the same time."""

from __future__ import annotations

from nestcli.model.config import NestConfig
from nestcli.model.cost import batch_work, selected_share, tokens_of

# Operations per second of dense matrix products, from NVIDIA's data sheets; the key is part of the device's name.
_DATA_SHEETS = {
    "H200": {"32": 67e12, "tf32": 494e12, "bf16": 989e12},
    "H100": {"32": 67e12, "tf32": 494e12, "bf16": 989e12},
    "A100": {"32": 19.5e12, "tf32": 156e12, "bf16": 312e12},
}
_CLIP_SECONDS = 10.0  # of the clips that estimate the share of predicted tokens


def peak_of(device: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return the operations per second of a device's data sheet in a precision of training; None if it is unknown.

    `precision` is a value of `trainer.precision`; `tf32` tells whether products in fp32 are rounded to TF32.
    """
    kind = "bf16" if precision.startswith(("bf16", "16")) else "tf32" if tf32 else "32"
    return next((peaks[kind] for name, peaks in _DATA_SHEETS.items() if name in device), None)


class Utilisation:
    """Adds up the work of training batches, padding included; with `peak` None nothing is counted."""

    def __init__(self, nest: NestConfig, peak: float | None) -> None:
        self.nest, self.peak = nest, peak
        self._share = selected_share(nest, round(_CLIP_SECONDS * nest.preprocessor.sample_rate)) if peak else 0.0
        self._known: dict[tuple[int, int], float] = {}  # work by clips and samples: epochs repeat the sizes
        self._done = 0.0

    def add(self, clips: int, samples: int) -> None:
        """Count forward and backward pass of a batch of `clips` clips, each padded to `samples` samples."""
        if self.peak is None:
            return
        if (clips, samples) not in self._known:
            selected = clips * tokens_of(self.nest, samples) * self._share
            work = batch_work(self.nest, samples, clips, selected)
            self._known[clips, samples] = sum(each.step for each in work.values())
        self._done += self._known[clips, samples]

    def take(self, seconds: float) -> float | None:
        """Return the utilisation over the seconds since the last call, and begin again; None without a peak."""
        done, self._done = self._done, 0.0
        return None if self.peak is None else done / max(seconds, 1e-9) / self.peak
