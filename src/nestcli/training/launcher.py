"""Several processes of one run on this machine: started together, and ended together when one of them dies.

Lightning starts the others as copies of this command. Its own watch kills the main process too, which then says
nothing; and a process whose peer is gone may wait for half an hour, or blame the connection.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from nestcli.errors import NestError, RunFailedError

_LAUNCHER = "NEST_LAUNCHER_PID"  # in the processes that this one starts
_POLL_SECONDS = 0.5
_DEATH_SECONDS = 10.0  # from losing a connection to knowing whose


class PeerLostError(RunFailedError):
    """Another process of the run is gone; the message says which, where that is known, and the exit code is its."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_launched() -> bool:
    """Whether another process of this run started this one."""
    return _LAUNCHER in os.environ


@contextmanager
def ended_together(trainer: Trainer) -> Iterator[None]:
    """Run training in all processes of this machine: an error in one ends all, and is the first that is printed."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher) or trainer.world_size == 1:
        yield
        return
    watched = _WatchedLauncher(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
    trainer.strategy._launcher = watched
    try:
        yield
    except NestError:
        watched.end_others()
        raise
    except Exception as error:
        dead = watched.first_dead(_DEATH_SECONDS if _is_connection(error) else 0.0)
        watched.end_others()
        if dead is not None:
            raise dead from None
        if _is_connection(error):
            raise PeerLostError(_who(trainer, "lost the connection to another, which ended first")) from None
        _say(f"{_who(trainer, 'failed:')}\n{traceback.format_exc().rstrip()}")  # before the others notice
        raise
    finally:
        watched.rest()


class _WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine, and ends this one when one of them, or its own parent, dies."""

    _resting = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[_LAUNCHER] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[_LAUNCHER]
            threading.Thread(target=self._watch, name="watch-processes", daemon=True).start()
        elif is_launched():
            threading.Thread(target=_end_with, args=(int(os.environ[_LAUNCHER]),), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def first_dead(self, seconds: float) -> PeerLostError | None:
        """What is to be said of a process that has failed, waiting for its end for so long."""
        until = time.monotonic() + seconds
        while True:
            for number, process in enumerate(self.procs, start=1):
                if process.poll():
                    return _epitaph(number, process)
            if time.monotonic() >= until or not self.procs:
                return None
            time.sleep(_POLL_SECONDS / 5)

    def end_others(self) -> None:
        self.rest()
        _kill(self.procs)

    def rest(self) -> None:
        """Leave off watching: the run is over."""
        self._resting = True

    def _watch(self) -> None:
        while not self._resting:
            time.sleep(_POLL_SECONDS)
            if self.first_dead(0.0) is None:
                continue
            time.sleep(_DEATH_SECONDS)  # the main thread usually notices, and ends in an orderly way
            dead = self.first_dead(0.0)
            if not self._resting and dead is not None:
                _say(f"error: {dead}")
                _kill([*self.procs, *multiprocessing.active_children()])
                os._exit(dead.exit_code)


def _say(message: str) -> None:
    """Print to stderr. A reader that has gone (`| head`) must not keep the processes from being ended."""
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def _kill(processes: Sequence[subprocess.Popen[bytes] | multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _end_with(parent: int) -> None:
    """End when the process that started this one is gone: a collective would wait for it for half an hour."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    _kill(multiprocessing.active_children())
    os._exit(1)


def _epitaph(number: int, process: subprocess.Popen[bytes]) -> PeerLostError:
    code = process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return PeerLostError(
        f"process {number} of the run {how}; its own message, if it had one, is above. All its processes are ended; "
        "the same command goes on from the newest checkpoint.",
        exit_code=max(1, code),
    )


def _who(trainer: Trainer, what: str) -> str:
    return f"process {trainer.global_rank} of {trainer.world_size} {what}"


def _is_connection(error: Exception) -> bool:
    """Whether an error is that of a process whose peer is gone."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(name in str(error).lower() for name in ("gloo", "nccl"))
    )
