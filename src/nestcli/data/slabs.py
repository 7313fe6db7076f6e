"""The way of batches from the loader's processes: shared memory that is used again and again.

PyTorch sends every tensor in shared memory made for it alone. The kernel hands out, clears and takes back each of its
pages, which can take as long as decoding the audio; copying into pages that are there already does not.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from nestcli.data.batch import NoiseBatch

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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slots": None}  # a process that is not forked cannot see them

    def put(self, batch: NoiseBatch) -> NoiseBatch | Placed:
        """In a loader process: copy a batch into the next slot. One that cannot go there is returned as it is."""
        worker = get_worker_info()
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        places, end = _places(tensors)
        if worker is None or self._slots is None or end > self.n_bytes:
            return batch
        slot = self._next
        self._next = (slot + 1) % len(self._slots[worker.id])
        for name, start, shape, dtype in places:
            _view(self._slots[worker.id][slot], start, shape, dtype).copy_(tensors[name])
        emptied = NoiseBatch(**{**values, **dict.fromkeys(tensors, torch.empty(0))})
        return Placed(worker.id, slot, places, emptied)

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


class SlabLoader(DataLoader[Any]):
    """A DataLoader whose data set puts its batches into `slabs`, and which takes them out."""

    def __init__(self, *arguments: Any, slabs: Slabs, pin_slabs: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.slabs, self.pin_slabs = slabs, pin_slabs

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of batches, as they come
        return (self.slabs.take(sent, pin=self.pin_slabs) for sent in super().__iter__())


def _places(tensors: dict[str, Tensor]) -> tuple[tuple[tuple[str, int, tuple[int, ...], torch.dtype], ...], int]:
    places, end = [], 0
    for name, value in tensors.items():
        places.append((name, end, tuple(value.shape), value.dtype))
        end += -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
    return tuple(places), end


def _view(slab: mmap.mmap, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.frombuffer(slab, dtype=dtype, count=count, offset=start).view(shape) if count else torch.empty(shape)
