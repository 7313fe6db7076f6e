"""Ring buffer that carries batches from loader processes to the trainer: slots that are allocated once and reused.

Fresh memory for every batch would cost as much time as decoding the audio, because the kernel allocates, clears and
frees each page. A loader process makes a batch in its slot, and the trainer copies it out.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nestcli.audio.load import Samples
from nestcli.data.dataset import NoiseBatch

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Lies:
    """Place of a tensor in a slot: its first byte, shape and type."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch in transit: its tensors (places in the slot, or arrays if the slot is too small) and its other fields."""

    tensors: dict[str, Lies | npt.NDArray[Any]]
    others: dict[str, Any]


class Ring:
    """Shared memory of `n_slots` slots of `n_bytes` each, used by this process and the processes forked from it.

    Batch `number` of a loader takes slot `number % n_slots`, so at most `n_slots` batches may be in progress. The
    kernel allocates a page when it is first written: a large slot costs only what its largest batch used. A ring
    without slots sends whole batches, for processes that are not forked.
    """

    def __init__(self, n_slots: int, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._slots = [mmap.mmap(-1, n_bytes) for _ in range(n_slots)] if n_bytes else []
        self._slot: mmap.mmap | None = None  # slot of the batch that this process is making
        self._end = 0  # bytes of the slot that are in use

    # ---- in a loader process ----

    def begin(self, number: int) -> None:
        """Start batch `number`: `array` and `put` fill its slot from the first byte."""
        self._slot = self._slots[number % len(self._slots)] if self._slots else None
        self._end = 0

    def array(self, shape: tuple[int, ...]) -> Samples:
        """Return an uninitialised float32 array for the current batch: in its slot, if there is room."""
        start = self._room_for(4 * math.prod(shape))
        if start is None or self._slot is None:
            return np.empty(shape, np.float32)
        array: Samples = np.frombuffer(self._slot, np.float32, math.prod(shape), start).reshape(shape)
        return array

    def put(self, batch: NoiseBatch) -> Sent:
        """Copy tensors that are not in the slot yet into it; return the places that the trainer needs."""
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        made = self._end  # bytes of arrays that `array` allocated in the slot
        placed = {name: self._placed(tensor, made) for name, tensor in tensors.items()}
        return Sent(placed, {name: value for name, value in values.items() if name not in tensors})

    def _placed(self, tensor: Tensor, made: int) -> Lies | npt.NDArray[Any]:
        slot, shape = self._slot, tuple(tensor.shape)
        if slot is None:
            return tensor.numpy()
        start = tensor.data_ptr() - np.frombuffer(slot, np.uint8).ctypes.data
        if tensor.numel() and tensor.is_contiguous() and 0 <= start < made:
            return Lies(start, shape, tensor.dtype)
        room = self._room_for(tensor.numel() * tensor.element_size())
        if room is None:
            return tensor.numpy()
        lies = Lies(room, shape, tensor.dtype)
        _view(slot, lies).copy_(tensor)
        return lies

    def _room_for(self, n_bytes: int) -> int | None:
        """Reserve `n_bytes` of the slot; return the position of the first, or None if they do not fit."""
        start = self._end
        if self._slot is None or start + n_bytes > self.n_bytes:
            return None
        self._end += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return start

    # ---- in the process that trains ----

    def take(self, number: int, sent: Sent, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> NoiseBatch:
        """Take batch `number` out of its slot by a `copy` of each tensor, which frees the slot."""
        copies: dict[str, Any] = {}
        for name, there in sent.tensors.items():
            if isinstance(there, Lies):
                copies[name] = copy(_view(self._slots[number % len(self._slots)], there))
            else:
                copies[name] = copy(torch.from_numpy(there))
        return NoiseBatch(**copies, **sent.others)


def _view(slot: mmap.mmap, lies: Lies) -> Tensor:
    count = math.prod(lies.shape)
    if not count:
        return torch.empty(lies.shape, dtype=lies.dtype)
    return torch.frombuffer(slot, dtype=lies.dtype, count=count, offset=lies.start).view(lies.shape)
