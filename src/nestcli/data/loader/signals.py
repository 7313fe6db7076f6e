"""Loader processes and signals: who ends a run signals all of its processes, but the main one says when they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from typing import Any

from torch.utils.data import DataLoader

# How loader processes are started. What they note for the main one (`notes`) lies in memory that only forked ones
# share; Python 3.14 would start them by a server.
START_METHOD = "fork" if sys.platform == "linux" else multiprocessing.get_start_method()

_SIGNALS = {signal.SIGINT, signal.SIGUSR1, signal.SIGTERM}


def led_by_main_process(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader whose processes go on through Ctrl-C and Slurm's signals, until the main process ends them."""
    if loader.num_workers == 0:
        return loader
    # A cycle would leave the end of the processes to the garbage collector, which takes five seconds for each.
    itself, initialise = weakref.ref(loader), loader.worker_init_fn

    def start_deaf() -> Any:  # blocked signals are inherited: there is no moment at which a new process hears them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        started = itself()
        assert started is not None
        try:
            return type(started)._get_iterator(started)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def initialise_deaf(worker: int) -> None:
        threading.Thread(target=_end_with, args=(os.getppid(),), name="end-with-parent", daemon=True).start()
        if initialise is not None:
            initialise(worker)

    loader._get_iterator = start_deaf  # type: ignore[method-assign]
    loader.worker_init_fn = initialise_deaf
    return loader


def _end_with(parent: int) -> None:
    """Heed SIGTERM from the parent, which the other threads of a loader process do not hear from anybody."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
