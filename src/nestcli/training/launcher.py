"""The processes of a run: check how many were started and by what, start them on this machine, end them together.

A launcher that starts more processes than the trainer expects would run several trainings in one folder; with fewer,
the processes would wait for others that never start. On one machine, Lightning starts the other processes as copies of
this command. Its own observer would also kill the main process, which then prints nothing. Without any observer, a
process that has lost another one may wait for half an hour, or report the lost connection as the cause.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer

from nestcli.errors import ConfigError, NestError, RunFailedError
from nestcli.training.lightning_internals import OpenLauncher, replace_launcher

_TORCHRUN = "torchrun --nproc-per-node DEVICES -m nestcli pretrain ... trainer.devices=DEVICES"
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "GROUP_RANK", "NODE_RANK")
_LAUNCHER = "NEST_LAUNCHER_PID"  # set in the processes that this one starts
_POLL_SECONDS = 0.5
_DEATH_SECONDS = 10.0  # to find the process that died after a connection is lost


class PeerLostError(RunFailedError):
    """Another process of the run has died. The message names it if it is known; the exit code is its own."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_first_process() -> bool:
    """Return True if this process is the first of the run, which writes its files; see `check_launch`."""
    return not getattr(rank_zero_only, "rank", 0)


def is_launched() -> bool:
    """Return True if another process of this run started this one."""
    return _LAUNCHER in os.environ


@contextmanager
def ended_together(trainer: Trainer) -> Iterator[None]:
    """Run training in all processes of this machine; an error in one ends all of them and is printed first."""
    watched = replace_launcher(trainer, _WatchedLauncher) if trainer.world_size > 1 else None
    if watched is None:
        yield
        return
    try:
        yield
    except NestError:
        watched.end_others()
        raise
    except Exception as error:
        seconds = _DEATH_SECONDS if _may_be_connection(error) else 0.0
        dead = watched.first_dead(seconds)
        is_lost = isinstance(error, torch.distributed.DistError) or watched.loses_parent(seconds)
        watched.end_others()
        if dead is not None:
            raise dead from None
        if is_lost:
            raise PeerLostError(_who(trainer, "lost the connection to another process, which ended first")) from None
        _say(f"{_who(trainer, 'failed:')}\n{traceback.format_exc().rstrip()}")  # before the other processes notice
        raise
    finally:
        watched.stop_watching()


class _WatchedLauncher(OpenLauncher):
    """Starts the other processes of this machine; ends this one when one of them or its own parent dies."""

    _stopped = False

    def start(self) -> None:
        if not self.cluster_environment.creates_processes_externally:
            os.environ[_LAUNCHER] = str(os.getpid())
            super().start()
            del os.environ[_LAUNCHER]
            threading.Thread(target=self._watch, name="watch-processes", daemon=True).start()
        elif is_launched():
            threading.Thread(target=_end_with, args=(int(os.environ[_LAUNCHER]),), daemon=True).start()

    def first_dead(self, seconds: float) -> PeerLostError | None:
        """Return the error for the first process that failed, waiting up to `seconds` for it to end."""
        until = time.monotonic() + seconds
        while True:
            for number, process in enumerate(self.procs, start=1):
                if process.poll():
                    return _death(number, process)
            if time.monotonic() >= until or not self.procs:
                return None
            time.sleep(_POLL_SECONDS / 5)

    def loses_parent(self, seconds: float) -> bool:
        """Wait up to `seconds` for the end of the process that started this one, which usually ends this one too."""
        until = time.monotonic() + seconds
        while is_launched() and time.monotonic() < until:
            if os.getppid() != int(os.environ[_LAUNCHER]):
                return True
            time.sleep(_POLL_SECONDS / 5)
        return False

    def end_others(self) -> None:
        self.stop_watching()
        _kill(self.procs)

    def stop_watching(self) -> None:
        """Stop watching: the run is over."""
        self._stopped = True

    def _watch(self) -> None:
        while not self._stopped:
            time.sleep(_POLL_SECONDS)
            if self.first_dead(0.0) is None:
                continue
            time.sleep(_DEATH_SECONDS)  # the main thread usually notices and ends cleanly
            dead = self.first_dead(0.0)
            if not self._stopped and dead is not None:
                _say(f"error: {dead}")
                _kill([*self.procs, *multiprocessing.active_children()])
                os._exit(dead.exit_code)


def _say(message: str) -> None:
    """Print to stderr; a closed pipe (`| head`) must not keep the processes from being ended."""
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def _kill(processes: Sequence[subprocess.Popen[bytes] | multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone; a collective operation would wait half an hour for it."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    _kill(multiprocessing.active_children())
    os._exit(1)


def _death(number: int, process: subprocess.Popen[bytes]) -> PeerLostError:
    code = process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return PeerLostError(
        f"process {number} of the run {how}; its own message, if any, is above. All processes of the run have been "
        "ended; give the same command again to resume from the newest checkpoint.",
        exit_code=max(1, code),
    )


def _who(trainer: Trainer, what: str) -> str:
    return f"process {trainer.global_rank} of {trainer.world_size} {what}"


def _may_be_connection(error: Exception) -> bool:
    """Return True if an error may come from the connection to a process that has died.

    Errors of NCCL and of the store have types of their own. Those of gloo are plain RuntimeErrors, as many others are:
    then only the death of a process tells.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    return type(error) is RuntimeError and torch.distributed.is_initialized() and _uses_gloo()


def _uses_gloo() -> bool:
    return "gloo" in str(torch.distributed.get_backend_config())


@dataclass(frozen=True)
class _Launch:
    """The processes that a launcher started, in all and on each machine, and how to match the trainer to them."""

    by: str
    processes: int
    on_each: int | None
    remedy: str


def check_launch(processes: int, nodes: int) -> None:
    """Raise ConfigError unless as many processes were started as the `trainer` block asks for.

    `processes` is their number on all `nodes` together. Also sets this process's rank for Lightning and messages.
    """
    _check_number(processes, nodes)
    if _launch() is None:
        _remove_left_over(processes, nodes)
    rank_zero_only.rank = _rank(processes // nodes)  # type: ignore[attr-defined]


def _check_number(processes: int, nodes: int) -> None:
    found = _launch()
    devices = processes // nodes
    if found is None:
        if nodes > 1 and not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
            raise ConfigError(
                f"trainer.num_nodes={nodes}: the run was not started on the other machines. Start it with srun or "
                "torchrun on all of them (docs/clusters.md), or set NODE_RANK, MASTER_ADDR and MASTER_PORT on each; "
                "for this machine alone, set trainer.num_nodes=1."
            )
        return
    if found.processes == processes and found.on_each in (None, devices):
        return
    each = f", {found.on_each} on each machine" if found.on_each and found.on_each != found.processes else ""
    raise ConfigError(
        f"{found.by} has started {found.processes} process{'es' if found.processes > 1 else ''}{each}; "
        f"trainer.devices x trainer.num_nodes is {devices} x {nodes} = {processes}. {found.remedy}"
    )


def cluster_plugins() -> list[Any]:
    """Return the environment that gives Lightning its rank: Slurm's without its own requeueing, or none.

    A Slurm job of one task starts the run's processes itself.
    """
    if TorchElasticEnvironment.detect() or not _in_slurm():
        return []
    return [LightningEnvironment()] if _is_single_task() else [SLURMEnvironment(auto_requeue=False)]


def _launch() -> _Launch | None:
    """Return what started this process, in the order in which Lightning looks; None for a plain command."""
    if TorchElasticEnvironment.detect():
        return _of_variables("torchrun")
    if _in_slurm():
        return None if _is_single_task() else _slurm()
    _refuse_unseen_tasks()
    if LSFEnvironment.detect():
        tasks = _number("JSM_NAMESPACE_SIZE")
        return _Launch("jsrun", tasks, None, _remedy(tasks, None))
    for name in _MPI:
        if name in os.environ and "LOCAL_RANK" not in os.environ and _number(name) > 1:
            raise ConfigError(
                f"mpirun has started {_number(name)} processes ({name}), but nest cannot tell their ranks. Start the "
                f"run without mpirun, or with torchrun: {_TORCHRUN}"
            )
    if "LOCAL_RANK" in os.environ:
        return _of_variables("the launcher (LOCAL_RANK, WORLD_SIZE)") if "WORLD_SIZE" in os.environ else None
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and _number("WORLD_SIZE") > 1:  # Kubeflow's PyTorchJob
        raise ConfigError(
            f"RANK and WORLD_SIZE say that this is one of {_number('WORLD_SIZE')} processes, but LOCAL_RANK, which "
            "selects its GPU, is not set. Start torchrun on every machine (every pod of a PyTorchJob): torchrun "
            "--nnodes $WORLD_SIZE --node-rank $RANK --master-addr $MASTER_ADDR --master-port $MASTER_PORT "
            "--nproc-per-node DEVICES -m nestcli pretrain ...; for a run of one process, unset both."
        )
    return None


def _remove_left_over(processes: int, nodes: int) -> None:
    """Remove ranks that other programs left in the environment; one would keep the only process silent."""
    needed = {"NODE_RANK", "GROUP_RANK"} if nodes > 1 else set()
    if processes > 1:
        needed.add("LOCAL_RANK")  # set by the user who starts the processes by hand
    for name in set(_RANKS) - needed:
        os.environ.pop(name, None)


def _rank(devices: int) -> int:
    """Return the rank of this process among all, as Lightning will find it."""
    if TorchElasticEnvironment.detect():
        return _rank_in("RANK")
    if _in_slurm() and not _is_single_task():
        return _rank_in("SLURM_PROCID")
    if not _in_slurm() and LSFEnvironment.detect():
        return _rank_in("JSM_NAMESPACE_RANK")
    rank = _rank_in("NODE_RANK" if "NODE_RANK" in os.environ else "GROUP_RANK") * devices + _rank_in("LOCAL_RANK")
    if "RANK" in os.environ and _rank_in("RANK") != rank:
        raise ConfigError(
            f"RANK={os.environ['RANK']} is not the rank {rank} that NODE_RANK and LOCAL_RANK give this process "
            f"(NODE_RANK x {devices} + LOCAL_RANK, each 0 if it is not set). Set NODE_RANK on every machine, or use "
            f"torchrun: {_TORCHRUN}"
        )
    return rank


def _of_variables(by: str) -> _Launch:
    tasks = _number("WORLD_SIZE")
    each = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else None
    return _Launch(by, tasks, each, _remedy(tasks, each))


def _slurm() -> _Launch:
    tasks = _number("SLURM_NTASKS")
    each = _number("SLURM_NTASKS_PER_NODE") if "SLURM_NTASKS_PER_NODE" in os.environ else None
    if tasks > 1 and each is None:
        raise ConfigError(
            f"Slurm has {tasks} tasks, but does not say how many on each machine. Use --ntasks-per-node instead of "
            "--ntasks (docs/clusters.md); for a run of one process, start it with srun --ntasks=1 nest pretrain ..."
        )
    where = (
        "" if os.environ.get("SLURM_STEP_ID") else " (or, for a run of one process, srun --ntasks=1 nest pretrain ...)"
    )
    seen = " Every task must see all GPUs of its machine: use --gpus-per-node, not --gpus-per-task."
    return _Launch("Slurm", tasks, each, _remedy(tasks, each) + where + seen)


def _in_slurm() -> bool:
    """Return True if Lightning counts this process as a Slurm task; it does not in an interactive job."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _is_single_task() -> bool:
    """Return True if a Slurm job has one task, so that the run starts the other processes itself."""
    return _number("SLURM_NTASKS") == 1 and os.environ.get("SLURM_NNODES", "1") == "1"


def _refuse_unseen_tasks() -> None:
    """Raise ConfigError for srun tasks in an interactive job, which Lightning would train as separate runs."""
    if "SLURM_STEP_NUM_TASKS" not in os.environ or "SLURM_PTY_PORT" in os.environ:
        return
    tasks = _number("SLURM_STEP_NUM_TASKS")
    if tasks > 1:
        raise ConfigError(
            f"srun has started {tasks} processes in a job named {os.environ.get('SLURM_JOB_NAME')!r}, and each would "
            "train alone. Name the job: srun --job-name=nest ..., or start one process: srun --ntasks=1 ..."
        )


def _remedy(tasks: int, each: int | None) -> str:
    if each is None or each == tasks or tasks % each:
        wanted = f"trainer.devices={tasks}"
    else:
        wanted = f"trainer.devices={each} trainer.num_nodes={tasks // each}"
    return f"Set {wanted}, or start as many processes as the trainer block asks for."


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, but must be a number of processes. Unset it, or start the "
            "run with torchrun or srun."
        )
    return int(text)


def _rank_in(name: str) -> int:
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}, but must be the rank of a process. Unset it.")
    return int(text)
