"""Loader processes and signals: who ends a run signals all of its processes, but the main one says when they end."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from torch.utils.data import DataLoader


def led_by_main_process(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader whose processes go on through Ctrl-C and Slurm's signals, until the main process ends them."""
    if loader.num_workers and loader.worker_init_fn is None:
        loader.worker_init_fn = _leave_signals
    return loader


def _leave_signals(worker: int) -> None:
    """In a loader process: heed SIGTERM from its parent only."""
    for signum in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
