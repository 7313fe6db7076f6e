"""Stop a run on Ctrl-C, SIGTERM or Slurm's signal: save at the end of a step and end, so that the run can be resumed.

A handler only sets a flag. With several processes it travels with the numbers of the next step (`step_guard`), so all
of them stop after the same step, the one in which these numbers are read. Lightning's own handlers communicate with
other processes inside the handler, so they are not installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nestcli.errors import RunFailedError
from nestcli.training.checkpoints import NestCheckpoint
from nestcli.training.launcher import is_first_process
from nestcli.training.lightning_internals import is_step_complete
from nestcli.training.monitor.step_numbers import SIGNALS, StopRequest

STOPPED = 143  # exit code of a run that was stopped and can be resumed: the shell's for SIGTERM
INTERRUPTED = 130  # exit code after Ctrl-C
_SCONTROL_SECONDS = 30


class StoppedError(RunFailedError):
    """A signal stopped the run; `saved` is the checkpoint to resume from."""

    def __init__(self, signum: int, saved: Path | None) -> None:
        where = f"saved {saved}; give the same command again to resume" if saved else "nothing new to save"
        super().__init__(f"stopped by {_name(signum)}: {where}")
        self.signum, self.saved = signum, saved
        self.exit_code = INTERRUPTED if signum == signal.SIGINT else STOPPED


def _name(signum: int) -> str:
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


class StopSignals(Callback):
    """Handles signals as a context manager; as a callback, ends training with `StoppedError` after one arrived.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
            if not is_first_process():  # a terminal sends Ctrl-C to all processes; the first one passes it on
                signal.signal(signal.SIGINT, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.request.own == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.request.own and is_first_process():
            again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            # print is not reentrant, and the signal may have interrupted a print
            os.write(2, f"\n{_name(signum)}: stopping after this step and saving{again}\n".encode())
        self.request.own = signum

    # ---- Lightning's hooks: the points that a run can resume from ----

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_step_complete(trainer) or _is_last_step(trainer):
            return
        signum = self.request.own if trainer.world_size == 1 else self.request.agreed
        if signum:
            for each in _checkpoints(trainer):  # Lightning would call it after this callback
                each.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            raise StoppedError(signum, _save(trainer))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking or _is_last_step(trainer) or not is_step_complete(trainer):
            return  # a part of a step's gradients cannot be saved; the last step ends by itself
        signum = combined_signal(trainer, self.request.own)
        if signum:
            raise StoppedError(signum, _save(trainer))


def combined_signal(trainer: Trainer, signum: int) -> int:
    """Return the signal that any process has got, 0 for none: all must call this together, and wait for the answer."""
    if trainer.world_size == 1:
        return signum
    place = SIGNALS.index(signal.Signals(signum)) + 1 if signum else 0
    highest = torch.tensor(place, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    return int(SIGNALS[int(highest) - 1]) if highest else 0


def _is_last_step(trainer: Trainer) -> bool:
    return trainer.global_step == trainer.max_steps


def _checkpoints(trainer: Trainer) -> list[NestCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, NestCheckpoint)]


def _save(trainer: Trainer) -> Path | None:
    written = [each.save_now(trainer) for each in _checkpoints(trainer)]
    return written[-1] if written else None


def requeue(note: Callable[[str], None]) -> None:
    """Ask Slurm to queue this batch job again, if it is one. Failures are only reported."""
    job = _slurm_job()
    scontrol = shutil.which("scontrol")
    if job is None:
        return
    if scontrol is None:
        note(f"Slurm's job {job} is not queued again: this machine has no scontrol")
        return
    try:
        done = subprocess.run(  # noqa: S603  # the job's number comes from Slurm and is checked
            [scontrol, "requeue", job], capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False
        )
        wrong = " ".join((done.stderr or done.stdout).split()) if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = str(error)
    note(f"Slurm's job {job} is queued again" if wrong is None else f"Slurm's job {job} is not queued again: {wrong}")


def _slurm_job() -> str | None:
    """Return the number of this batch job; None in an interactive one."""
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID", "") for part in ("JOB", "TASK"))
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    return job if job and job.replace("_", "").isdecimal() else None
