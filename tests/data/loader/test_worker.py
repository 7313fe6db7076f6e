"""Loader processes: how they are started, and whom they hear."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_config
from nestcli.data.datamodule import NestDataModule
from nestcli.data.loader import watch
from nestcli.data.loader.loader import Loader
from nestcli.data.loader.watch import START_METHOD, Watch


def loader_of(corpus: dict[str, Path]) -> Loader:
    return NestDataModule(
        tiny_config(corpus, "model.train_ds.num_workers=1", "model.train_ds.shuffle=false")
    ).train_dataloader()


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_loader_processes_are_forked_where_python_would_not(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn")
    )
    assert multiprocessing.get_start_method() == "spawn"  # as Python 3.14 has another default
    assert START_METHOD == "fork"
    loader = loader_of(corpus)
    next(iter(loader))
    assert type(loader.watch.processes[0]).__name__ == "ForkProcess"
    assert loader.watch.notes is not None
    assert loader.watch.notes.of(0).line >= 0  # what it reads is told
    loader.close()
    assert loader.watch.processes[0].exitcode == -signal.SIGKILL


def test_where_processes_are_not_forked_none_counts_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "START_METHOD", "spawn")
    assert Watch(1, "model.train_ds", 50.0).timeout is None


@pytest.mark.slow
def test_spawned_processes_make_the_same_batches(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    forked = list(loader_of(corpus))
    monkeypatch.setattr(watch, "START_METHOD", "spawn")
    loader = loader_of(corpus)
    spawned = list(loader)
    assert type(loader.watch.processes[0]).__name__ == "SpawnProcess"
    assert [batch.sample_ids for batch in spawned] == [batch.sample_ids for batch in forked]
    assert all(
        a.noisy_audio.equal(b.noisy_audio) and a.audio.equal(b.audio) for a, b in zip(spawned, forked, strict=True)
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_from_others_does_not_end_it(corpus: dict[str, Path], signum: int) -> None:
    loader = loader_of(corpus)
    batches = iter(loader)
    next(batches)
    sent = subprocess.run(["kill", f"-{int(signum)}", str(loader.watch.processes[0].pid)], check=False)
    time.sleep(0.3)
    assert sent.returncode == 0
    assert len(list(batches)) == 2
    assert loader.watch.processes[0].is_alive()
    loader.close()


def test_a_process_cannot_be_started(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from nestcli.errors import RunFailedError

    def start(process: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    with pytest.raises(RunFailedError, match=r"process 0 of model\.train_ds cannot be started \(Resource temporarily"):
        list(loader_of(corpus))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


LEFT = """
import os, sys
from nestcli.data.dataset import NoiseBatch, collate
from nestcli.data.loader.loader import Loader
import numpy as np

class Data:
    def __getitem__(self, place):
        return collate([np.ones(16, np.float32)], None, [place])

loader = Loader(Data(), range(100), workers=2)
batches = iter(loader)
next(batches)
print(*(process.pid for process in loader.watch.processes), flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end",
    ["", "raise ValueError", "sys.exit(3)", "os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "os._exit(0)"],
)
def test_none_is_left_however_the_trainer_ends(end: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LEFT.format(end=end)], capture_output=True, text=True, timeout=60, check=False
    )
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2
    until = time.monotonic() + 5
    while any(map(lives, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_forked_bystander_does_not_end_them(corpus: dict[str, Path]) -> None:
    loader = loader_of(corpus)
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if not child:
        loader.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert len(list(batches)) == 2
    loader.close()
