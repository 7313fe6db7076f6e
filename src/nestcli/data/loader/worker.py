"""One loader process: it receives places, makes their batches in the ring, and replies with their positions there.

A signal to stop a run reaches all its processes, but the trainer decides when loader processes end. So they block
Ctrl-C, SIGTERM and SIGUSR1 (Slurm), except a SIGTERM from the trainer itself. They never outlive the trainer.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from nestcli.data.dataset import NoiseBatch
from nestcli.data.loader.ring import Ring
from nestcli.jobs.activity import Notes

SIGNALS = {signal.SIGINT, signal.SIGUSR1, signal.SIGTERM}  # blocked before the fork, so that the child never sees one

_LOOK = 5.0  # s between checks of the parent, on systems whose kernel does not kill this process with it
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """An error in a loader process, with its traceback as text."""

    error: Exception
    trace: str


class WorkerTraceback(Exception):  # noqa: N818  # no error of its own: the cause of one, shown above it
    """The traceback of an error that came from a loader process."""


def work(number: int, data: Any, channel: Connection, ring: Ring, notes: Notes | None, parent: int, dies: bool) -> None:
    """Answer each (batch number, place) of `channel` with a Sent, a Failure, or the data set's other object.

    `dies`: the process was forked by the main thread, so the kernel can end it with its parent. (The kernel would take
    the end of any other thread for the parent's.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if notes is not None:  # forked
        notes.enter(number)
        threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()
        if dies:
            _die_with(parent)
    torch.set_num_threads(1)
    data.make_array = ring.array
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            while not channel.poll(_LOOK):
                if os.getppid() != parent:
                    return
            batch, place = channel.recv()
            ring.begin(batch)
            channel.send(_answer(data, ring, place))


def _answer(data: Any, ring: Ring, place: Any) -> Any:
    try:
        made = data[place]
        return ring.put(made) if isinstance(made, NoiseBatch) else made
    except Exception as error:
        return Failure(_portable(error), traceback.format_exc())


def _portable(error: Exception) -> Exception:
    """Return the error, or its text in a RuntimeError if its class cannot be sent."""
    try:
        return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]  # noqa: S301  # our own
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    """End this process on a SIGTERM from the parent: Python sends one at exit to child processes that still run."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even during an endless read."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
