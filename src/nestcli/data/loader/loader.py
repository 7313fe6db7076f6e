"""Batches made by other processes, delivered in the sampler's order.

Batch `n` of a loader is made by process `n % workers` in slot `n % slots` of the ring, so neither the content nor the
order depends on which process is fast. Each process has its own channel and there are no locks: a process can die or
hang at any point without blocking another.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from torch import Tensor

from nestcli.data.dataset import Empty
from nestcli.data.loader.device_copies import DeviceCopies
from nestcli.data.loader.ring import Ring, Sent
from nestcli.data.loader.watch import Watch
from nestcli.data.loader.worker import SIGNALS, Failure, WorkerTraceback, work
from nestcli.errors import RunFailedError
from nestcli.jobs.prefetch_thread import ahead

PREFETCHED = 2  # batches that each process may make in advance
_POLL = 1.0  # s between checks of the processes while the trainer waits for a batch
_ENDING = 5.0  # s to wait for killed processes to end


def slots(workers: int, prefetched: int = PREFETCHED) -> int:
    """Return the number of slots: one for each batch in progress, and one for the batch that is being copied out."""
    return workers * prefetched + 1 if workers else 0


class Batches(Protocol):
    """Data set that returns the batch of a place, or another small object; it allocates arrays with `make_array`."""

    make_array: Empty

    def __getitem__(self, place: Any, /) -> Any: ...


class Places(Sized, Iterable[Any], Protocol):
    """Sampler that yields the places of one pass."""


class Loader:
    """Iterates over the batches of `places`, a sampler, made by `workers` processes.

    The processes start with the first batch and stay for further passes, until `close`, the end of this object, or an
    error that ends the run. A slot holds a batch of `slot_bytes`; a larger one is sent through a pipe. With `copies`, a
    thread copies each batch to the device while the one before it is used.
    """

    def __init__(
        self,
        data: Batches,
        places: Places,
        *,
        workers: int = 1,
        watch: Watch | None = None,
        slot_bytes: int = 1 << 20,
        prefetched: int = PREFETCHED,
        copies: DeviceCopies | None = None,
    ) -> None:
        self.data, self.places, self.num_workers, self.copies = data, places, workers, copies
        self.watch = Watch(workers, "the loader", None) if watch is None else watch
        self._under_way = workers * prefetched
        self._ring = _mapped(self.watch, slots(workers, prefetched), slot_bytes)
        self._crew: _Crew | None = None
        self._end: Callable[[], object] = lambda: None

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Any]:
        if self._crew is None or self._crew.ended:
            self._crew = _Crew(self.data, self._ring, self.watch, self.num_workers)
            self._end = weakref.finalize(self, self._crew.end)
        copies = self.copies
        if copies is None:
            yield from self._crew.batches(self.places, self._under_way, Tensor.clone)
            return
        for batch, mark in ahead(map(copies.sent, self._crew.batches(self.places, self._under_way, copies.copy))):
            yield copies.received(batch, mark)
            del batch  # frees its memory while the next one is made

    def close(self) -> None:
        """Stop the worker processes. The next pass starts new ones."""
        self._end()


class _Crew:
    """The running loader processes, with counts of the batches requested from them and received."""

    def __init__(self, data: Batches, ring: Ring, watch: Watch, workers: int) -> None:
        self.ended = False
        self._ring, self._watch, self._parent = ring, watch, os.getpid()
        self._given = self._taken = 0  # batches requested and received, over all passes
        self._pass = 0
        self._channels: list[Connection] = []
        self._processes: list[BaseProcess] = []
        dies = threading.current_thread() is threading.main_thread()
        forks = watch.notes is not None
        context = multiprocessing.get_context("fork" if forks else "spawn")
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if forks else ())
        try:
            for number in range(workers):
                ours, theirs = context.Pipe()
                arguments = (number, data, theirs, ring, watch.notes, self._parent, dies)
                process = context.Process(  # type: ignore[attr-defined]  # every context has it
                    target=work, args=arguments, daemon=True, name=f"nest-loader-{number}"
                )
                self._channels.append(ours)
                process.start()
                self._processes.append(process)
                theirs.close()  # otherwise the next process inherits it, and the end of this process goes unnoticed
        except OSError as error:
            self.end()
            raise RunFailedError(
                f"loader process {len(self._processes)} of {watch.key} cannot be started ({error.strerror}). Lower "
                f"{watch.key}.num_workers, or raise the limits of this machine (`ulimit -a`)."
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        watch.processes = self._processes

    def batches(self, places: Iterable[Any], under_way: int, copy: Callable[[Tensor], Tensor]) -> Iterator[Any]:
        """Yield the batches of `places` in order; up to `under_way` of them are in progress at a time.

        `copy` takes each tensor out of the slot of its batch.
        """
        self._pass += 1
        this_pass = self._pass
        while self._taken < self._given:  # discard batches of a pass that ended early
            self._next_answer()
        coming = iter(places)
        for place in islice(coming, under_way):
            self._give(place)
        while self._taken < self._given:
            number, answer = self._taken, self._next_answer()
            if isinstance(answer, Failure):
                raise answer.error from WorkerTraceback(f"\n{answer.trace}")
            for place in islice(coming, 1):  # sent before the copy, so that the processes do not wait for it
                self._give(place)
            batch = self._ring.take(number, answer, copy) if isinstance(answer, Sent) else answer
            yield batch
            del batch  # frees its memory while the next one is made
            if self._pass != this_pass:
                raise RuntimeError("another pass over this loader has begun; only one can run at a time")

    def _give(self, place: Any) -> None:
        with suppress(ConnectionError):  # the process is dead; `_watch.look` will report it
            self._channels[self._given % len(self._channels)].send((self._given, place))
        self._given += 1

    def _next_answer(self) -> Any:
        """Wait for the next batch's answer. Raises RunFailedError if a process has died or hangs."""
        worker, asked = self._taken % len(self._channels), time.monotonic()
        channel = self._channels[worker]
        while True:
            try:
                self._watch.look(worker, time.monotonic() - asked)
            except RunFailedError:
                self.end()
                raise
            if channel not in wait([channel, *(process.sentinel for process in self._processes)], _POLL):
                continue
            try:
                answer = channel.recv()
            except (EOFError, ConnectionError):
                self._processes[worker].join(_POLL)  # its connection is closed, so it is about to end
                continue
            self._taken += 1
            return answer

    def end(self) -> None:
        """Kill all processes at any point of their work: they hold nothing that must be saved."""
        if self.ended or os.getpid() != self._parent:  # a process forked from this one must not kill its siblings
            return
        self.ended = True
        for process in self._processes:
            process.kill()
        deadline = time.monotonic() + _ENDING
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # blocked in the kernel, where no signal arrives; Python would wait at exit
                getattr(multiprocessing.process, "_children", set()).discard(process)


def _mapped(watch: Watch, n_slots: int, n_bytes: int) -> Ring:
    """Return the ring of a loader; one without slots if its processes are not forked."""
    n_slots = 0 if watch.notes is None else n_slots
    try:
        return Ring(n_slots, n_bytes)
    except (OSError, OverflowError):
        raise RunFailedError(
            f"{watch.key}: {n_slots} batches of up to {n_bytes / 2**30:.1f} GiB do not fit into the memory that this "
            f"machine grants a process. Lower {watch.key}.num_workers, batch_size, batch_duration or max_duration."
        ) from None
