"""A stand-in for a GPU's stream: copies that happen as late as they may, on the processor."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class LateMark:
    def __init__(self, stream: LateStream) -> None:
        self.stream, self.passed = stream, False

    def set(self) -> None:
        self.passed = True

    def synchronize(self) -> None:
        self.stream.waits.append(threading.current_thread().name)
        self.stream.run_to(self)


class LateStream:
    """Copies nothing before somebody waits for a mark: a slot that is written too early carries wrong content."""

    def __init__(self) -> None:
        self.allocated: list[int] = []  # bytes, of each allocation of page-locked memory
        self.waits: list[str] = []  # the threads that waited on the host
        self.handed: list[str] = []  # the threads that were handed batches
        self.kept = 0  # tensors whose memory is kept for the work of another thread
        self.pieces: list[int] = []  # bytes of each copy
        self._queued: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()

    def page_locked(self, n_bytes: int) -> Tensor:
        self.allocated.append(n_bytes)
        return torch.empty(n_bytes, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        self.pieces.append(len(source))
        self._queued.append(lambda: target.copy_(source))

    def mark(self) -> LateMark:
        mark = LateMark(self)
        self._queued.append(mark.set)
        return mark

    def hand_over(self, mark: LateMark, tensors: Iterable[Tensor]) -> None:
        self.handed.append(threading.current_thread().name)
        self.run_to(mark)
        self.kept += len(list(tensors))

    def run_to(self, mark: LateMark) -> None:
        with self._lock:
            while not mark.passed:
                self._queued.popleft()()
