"""The way of batches from the loader's processes: shared memory that is used again and again.

PyTorch sends every tensor in shared memory made for it alone. The kernel hands out, clears and takes back each of its
pages, which can take as long as decoding the audio; copying into pages that are there already does not.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from nestcli.audio.load import Samples
from nestcli.data.batch import NoiseBatch
from nestcli.data.loader.watched_workers import WatchedLoader
from nestcli.jobs.prefetch_thread import ahead

Other = TypeVar("Other")
_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a batch lies: the slot of a loader process, and of each tensor (name, first byte, shape, type)."""

    worker: int
    slot: int
    tensors: tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...]
    batch: NoiseBatch  # everything but its tensors


class Slabs:
    """Slots of `n_bytes` for each of `workers` processes, which must be forked from this one.

    A process that may have `queued` batches under way needs a slot for each and one for the batch that is being
    copied out. Memory is taken as it is first written to, so that large slots cost what their batches take.
    """

    def __init__(self, workers: int, queued: int, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._slots: list[list[mmap.mmap]] | None = [
            [mmap.mmap(-1, n_bytes) for _ in range(queued + 1)] for _ in range(workers)
        ]
        self._next = 0
        self._end = 0  # of what the batch that is being made has taken of its slot

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None}  # a process that is not forked cannot see them

    def begin(self) -> None:
        """In a loader process: start with a batch anew, whatever became of the last one."""
        self._end = 0

    def array(self, shape: tuple[int, ...]) -> Samples:
        """An array for the batch that is being made, in the slot that it will be sent in; its content is anything."""
        slot = self._slot()
        n_bytes = 4 * math.prod(shape)
        if slot is None or self._end + n_bytes > self.n_bytes:
            return np.empty(shape, np.float32)
        array: Samples = np.frombuffer(slot, np.float32, math.prod(shape), self._end).reshape(shape)
        self._end += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return array

    def put(self, batch: NoiseBatch) -> NoiseBatch | Placed:
        """In a loader process: send a batch by the next slot. One that cannot go there is returned as it is."""
        worker, slot = get_worker_info(), self._slot()
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        if worker is None or slot is None:
            return batch
        first = np.frombuffer(slot, np.uint8).ctypes.data
        places, end = [], self._end
        for name, value in tensors.items():
            start = value.data_ptr() - first
            if not (value.numel() and 0 <= start < self._end):  # not made there
                start, end = end, end + -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
            places.append((name, start, tuple(value.shape), value.dtype))
        if end > self.n_bytes:
            return self._sent_as_it_is(batch)
        for name, start, shape, dtype in places:
            if start >= self._end:
                _view(slot, start, shape, dtype).copy_(tensors[name])
        number = self._next
        assert self._slots is not None
        self._next = (number + 1) % len(self._slots[worker.id])
        emptied = NoiseBatch(**{**values, **dict.fromkeys(tensors, torch.empty(0))})
        return Placed(worker.id, number, tuple(places), emptied)

    def _slot(self) -> mmap.mmap | None:
        worker = get_worker_info()
        return None if worker is None or self._slots is None else self._slots[worker.id][self._next]

    def _sent_as_it_is(self, batch: NoiseBatch) -> NoiseBatch:
        """A batch that owns its memory: the slot will be used for the next one."""
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        copies = {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
        return NoiseBatch(**{**values, **copies})

    def take(self, sent: Placed | Other, *, pin: bool = False) -> NoiseBatch | Other:
        """In the process that made the slots: copy a batch out, into page-locked memory if it goes on to a GPU.

        Must be done with each batch before the next one is asked for. What is not in a slot is returned as it is.
        """
        if not isinstance(sent, Placed):
            return sent
        assert self._slots is not None
        slab = self._slots[sent.worker][sent.slot]
        copies: dict[str, Any] = {}
        for name, start, shape, dtype in sent.tensors:
            copy = torch.empty(shape, dtype=dtype, pin_memory=pin)
            copies[name] = copy.copy_(_view(slab, start, shape, dtype))
        return replace(sent.batch, **copies)


class SlabLoader(WatchedLoader):
    """A DataLoader whose data set puts its batches into `slabs`, and which takes them out.

    With a `device`, a thread takes each batch out while the one before it is computed on, into page-locked memory if
    the device is a GPU and `pin_slabs` is set.
    """

    def __init__(
        self,
        *arguments: Any,
        slabs: Slabs,
        pin_slabs: bool = False,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.slabs, self.pin_slabs, self.device = slabs, pin_slabs, device

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of batches, as they come
        sent = super().__iter__()
        batches = (self.slabs.take(each, pin=self.pin_slabs) for each in sent)
        return self.explaining(batches if self.device is None else ahead(batches, partial(_settle, self.device)))


def _settle(device: torch.device) -> None:
    """Prepare a thread for copying: on its own process's GPU, and without taking all cores for it."""
    torch.set_num_threads(1)  # of this thread alone
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _view(slab: mmap.mmap, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(slab, dtype=dtype, count=count, offset=start).view(shape) if count else torch.empty(shape)
