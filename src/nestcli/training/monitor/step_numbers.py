"""Numbers of a step on their way from the device to the host, and the signal to stop that travels with them."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import torch
from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)  # of different signals in one run, the last one here counts


class Arriving:
    """A vector of the device whose copy to the host has begun; `numbers` waits for it only if it has not ended."""

    def __init__(self, vector: Tensor) -> None:
        self._vector, self._arrived = vector.detach(), None
        if vector.device.type == "cuda":
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._vector, self._arrived = host.copy_(vector, non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def numbers(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._vector.tolist()
        return numbers


class StopRequest:
    """The signal to stop that this process has got, and the one that all processes have agreed on; 0: none."""

    MARKS = len(SIGNALS)  # numbers that a process sends

    def __init__(self) -> None:
        self.own = self.agreed = 0

    def mark(self, like: Tensor) -> Tensor:
        """Return a number for each signal, not 0 for the one that this process has got; of the type of `like`."""
        marks = like.new_zeros(self.MARKS)
        if self.own:
            marks[SIGNALS.index(signal.Signals(self.own))].fill_(1.0)
        return marks

    def agree(self, marks: Sequence[float]) -> None:
        """Take the marks of all processes, summed or averaged."""
        self.agreed = next((int(signum) for signum, mark in zip(SIGNALS[::-1], marks[::-1], strict=True) if mark), 0)
