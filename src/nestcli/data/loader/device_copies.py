"""The way of batches to a GPU: through page-locked memory, on a stream of their own, while the GPU computes.

Only page-locked memory is copied while the host and the GPU do other work. It is expensive to allocate, so there is one
small ring of it for all batches: a tensor of any size goes through it in pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nestcli.data.dataset import NoiseBatch
from nestcli.errors import RunFailedError

_SLOTS, _SLOT_BYTES = 4, 1 << 24


class Mark(Protocol):
    """A point in the order of a stream."""

    def synchronize(self) -> object:
        """Wait until the device has passed it."""


class Stream(Protocol):
    """The copies to a device, in their order, beside the work that another thread gives the device."""

    def page_locked(self, n_bytes: int) -> Tensor:
        """Allocate bytes of main memory that the device can read by itself."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate a tensor on the device for a later `copy`."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start a copy from page-locked memory and return at once."""

    def mark(self) -> Mark:
        """Return the point behind all copies that were started so far."""

    def hand_over(self, mark: Mark, tensors: Iterable[Tensor]) -> None:
        """Let the calling thread's work on the device begin behind `mark`, and keep the tensors' memory for it."""


class CudaStream:
    """A stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def page_locked(self, n_bytes: int) -> Tensor:
        with torch.cuda.device(self._device):
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self._stream):  # a freed block is reused in the order of the stream that allocated it
            return torch.empty(shape, dtype=dtype, device=self._device)

    def copy(self, source: Tensor, target: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a thread that waits for it sleeps
        event.record(self._stream)
        return event

    def hand_over(self, mark: Any, tensors: Iterable[Tensor]) -> None:
        using = torch.cuda.current_stream(self._device)
        using.wait_event(mark)  # the GPU waits, the host does not
        for tensor in tensors:
            tensor.record_stream(using)  # freed memory returns to the copies only behind the work that uses it


class DeviceCopies:
    """Copies batches to a device: `copy` and `sent` in one thread, `received` in the thread that uses the batches.

    The first `copy` allocates the ring of `n_slots` x `slot_bytes` page-locked bytes. Only the thread that copies ever
    waits: for the slot whose copy has not ended yet.
    """

    def __init__(self, stream: Stream, n_slots: int = _SLOTS, slot_bytes: int = _SLOT_BYTES) -> None:
        self._stream, self._slot_bytes = stream, slot_bytes
        self._ring: Tensor | None = None
        self._ends: list[Mark | None] = [None] * n_slots  # the end of each slot's newest copy
        self._next = 0  # slot

    def copy(self, source: Tensor) -> Tensor:
        """Start copying a tensor, and return the one on the device. The source may change afterwards."""
        target = self._stream.empty(tuple(source.shape), source.dtype)
        if source.numel():
            pieces = (torch.split(_bytes_of(tensor), self._slot_bytes) for tensor in (source, target))
            for here, there in zip(*pieces, strict=True):
                self._copy_piece(here, there)
        return target

    def sent(self, batch: Any) -> tuple[Any, Mark | None]:
        """Return a batch of copied tensors with the point at which they are complete; no point for other objects."""
        return batch, self._stream.mark() if isinstance(batch, NoiseBatch) else None

    def received(self, batch: Any, mark: Mark | None) -> Any:
        """Return a batch that work of the calling thread may use from now on."""
        if mark is not None:
            self._stream.hand_over(mark, (value for value in vars(batch).values() if isinstance(value, Tensor)))
        return batch

    def _copy_piece(self, source: Tensor, target: Tensor) -> None:
        if self._ring is None:
            self._ring = self._allocated()
        number, self._next = self._next, (self._next + 1) % len(self._ends)
        slot = self._ring[number][: len(source)]
        before = self._ends[number]
        if before is not None:
            before.synchronize()
        # NumPy copies in this thread alone. PyTorch would use a team of threads beside that of the trainer, and its
        # set_num_threads also changes the number of every thread that has not computed yet.
        np.copyto(slot.numpy(), source.numpy())
        self._stream.copy(slot, target)
        self._ends[number] = self._stream.mark()

    def _allocated(self) -> Tensor:
        n_bytes = len(self._ends) * self._slot_bytes
        try:
            return self._stream.page_locked(n_bytes).view(len(self._ends), self._slot_bytes)
        except RuntimeError as error:  # the GPU's driver has many reasons
            raise RunFailedError(
                f"{n_bytes >> 20} MiB of page-locked memory cannot be allocated ({str(error).splitlines()[0]}). Lower "
                "num_workers or the size of the batches, so that more main memory stays free; raise the limit of "
                "locked memory (`ulimit -l`); or set model.train_ds.pin_memory=false and "
                "model.validation_ds.pin_memory=false."
            ) from None


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
