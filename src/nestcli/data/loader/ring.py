"""The memory that carries batches from loader processes to the trainer: slots, allocated once and used in turn.

Fresh memory for every batch would cost as much time as decoding the audio: the kernel hands out, clears and takes back
each page. A process makes a batch in its slot, and the trainer copies it out.
"""

from __future__ import annotations

import math
import mmap
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
    """A batch on its way: its tensors, in their slot or (if the slot is too small) as arrays; and its other fields."""

    tensors: dict[str, Lies | npt.NDArray[Any]]
    others: dict[str, Any]


class Ring:
    """`n_slots` slots of `n_bytes` each, which this process shares with those that it forks.

    Batch `number` of a loader takes slot `number % n_slots`, so at most `n_slots` batches may be under way. Memory is
    taken when it is first written to: a large slot costs what its largest batch took. A ring without slots sends whole
    batches, for processes that are not forked.
    """

    def __init__(self, n_slots: int, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._slots = [mmap.mmap(-1, n_bytes) for _ in range(n_slots)] if n_bytes else []
        self._slot: mmap.mmap | None = None  # of the batch that this process makes
        self._end = 0  # bytes of it that are taken

    # ---- in a loader process ----

    def begin(self, number: int) -> None:
        """Use the slot of batch `number` from its first byte on, for `array` and `put`."""
        self._slot = self._slots[number % len(self._slots)] if self._slots else None
        self._end = 0

    def array(self, shape: tuple[int, ...]) -> Samples:
        """Return an array of any content for the batch that is being made: in its slot, if there is room."""
        start = self._room_for(4 * math.prod(shape))
        if start is None or self._slot is None:
            return np.empty(shape, np.float32)
        array: Samples = np.frombuffer(self._slot, np.float32, math.prod(shape), start).reshape(shape)
        return array

    def put(self, batch: NoiseBatch) -> Sent:
        """Copy into the slot what was not made there, and return what the trainer needs to find the batch."""
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        made = self._end  # bytes of arrays that were made here
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
        """Take `n_bytes` of the slot and return the first; None if they do not fit."""
        start = self._end
        if self._slot is None or start + n_bytes > self.n_bytes:
            return None
        self._end += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return start

    # ---- in the process that trains ----

    def take(self, number: int, sent: Sent, *, pin: bool = False) -> NoiseBatch:
        """Copy batch `number` out of its slot, which is free then; into page-locked memory, if `pin` is set.

        PyTorch keeps page-locked blocks for the next batches, and gives none out before its transfer has ended.
        """
        copies: dict[str, Any] = {}
        for name, there in sent.tensors.items():
            if isinstance(there, Lies):
                source = _view(self._slots[number % len(self._slots)], there)
            else:
                source = torch.from_numpy(there)
            copies[name] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pin).copy_(source)
        return NoiseBatch(**copies, **sent.others)


def _view(slot: mmap.mmap, lies: Lies) -> Tensor:
    count = math.prod(lies.shape)
    if not count:
        return torch.empty(lies.shape, dtype=lies.dtype)
    return torch.frombuffer(slot, dtype=lies.dtype, count=count, offset=lies.start).view(lies.shape)
