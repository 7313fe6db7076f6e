"""Runs of a tiny model for the tests of signals and processes: in this process, or as separate commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from conftest import TINY_RUN, tiny_config
from nestcli.training.monitor.metrics import TIMED
from nestcli.training.run import Pretraining

TRACED = Path(__file__).parent / "traced_nest.py"


class Listener:
    """Reporter that records its messages and can act at a given step."""

    def __init__(self, at_step=None, do=lambda: None):
        self.at_step, self.do = at_step, do
        self.validated, self.notes = [], []

    def step(self, report):
        if report.step == self.at_step:
            self.do()

    def validation(self, step, loss, accuracy):
        self.validated.append(step)

    def note(self, message):
        self.notes.append(message)

    def finished(self):
        pass


def train(corpus, folder, *words, listener=None):
    config = tiny_config(corpus, f"exp_manager.exp_dir={folder}", "exp_manager.name=run", *words)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the commands below: sums over threads are rounded differently
    try:
        return Pretraining(config, listener or Listener()).fit()
    finally:
        torch.set_num_threads(threads)


def command(corpus, folder, *words, faults="", launcher=(), trace=None, **environment):
    """Start the run of `train` as a command, and return once it has started; its output comes in one piece."""
    told = {"FAULT": faults, "OMP_NUM_THREADS": "1", **environment}
    if trace is not None:
        trace.mkdir()
        told["TRACE"] = str(trace)
    call = [
        *(launcher or [sys.executable]), str(TRACED), "pretrain", "small", *TINY_RUN,
        f"model.train_ds.manifest_filepath={corpus['train']}", f"model.validation_ds.manifest_filepath={corpus['val']}",
        f"model.train_ds.noise_manifest={corpus['noise']}", f"exp_manager.exp_dir={folder}", "exp_manager.name=run",
        *words,
    ]  # fmt: skip
    return subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **told},
        start_new_session=True,
    )  # fmt: skip


def ended(run, seconds=300):
    """Wait for a command and return its output; kill it with all its processes if it takes too long."""
    try:
        return run.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise AssertionError(f"no end in {seconds} s:\n{run.communicate()[0]}") from None


def rows(folder):
    """Return the lines of metrics.jsonl, without the times."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def checkpoint(folder):
    return max((folder / "run" / "checkpoints").glob("*-last.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def processes_of(group):
    """Return the processes of a process group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def fake_scontrol(folder, script):
    """Write a `scontrol` that records its calls and then runs a script; return the environment with it in PATH."""
    folder.mkdir()
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n{script}\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def print_stacks(group):
    """Ask every process of a group that handles SIGUSR2 for its threads' stacks, which appear in its output."""
    for process in processes_of(group):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{process}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGUSR2 - 1) & 1:
                os.kill(int(process), signal.SIGUSR2)
                time.sleep(0.5)  # one after the other: their lines would mix


def wait_for_step(folder, step, run, seconds=120.0):
    """Wait until the run has written `step` lines of metrics. Fails with the run's output if it ends before or hangs.

    After half of `seconds` all its processes print their stacks.
    """
    until, asked = time.monotonic() + seconds, False
    metrics = folder / "run" / "metrics.jsonl"
    while time.monotonic() < until:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        if run.poll() is not None:
            raise AssertionError(f"it ended with {run.returncode} before step {step}:\n{run.communicate()[0]}")
        if not asked and time.monotonic() > until - seconds / 2:
            asked = True
            print_stacks(run.pid)
        time.sleep(0.02)
    left = processes_of(run.pid)
    os.killpg(run.pid, signal.SIGKILL)
    raise AssertionError(f"no step {step} in {seconds} s, processes {left}:\n{run.communicate()[0]}")
