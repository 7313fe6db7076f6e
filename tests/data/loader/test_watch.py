"""Loader processes that die or hang: noticed, named with their file, and gone afterwards."""

import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_RUN, tiny_config
from nestcli.data import datamodule, dataset, utterance_audio
from nestcli.data.datamodule import NestDataModule
from nestcli.data.loader import loader, watch
from nestcli.data.loader.watch import Watch
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.utterance_audio import read_audio
from nestcli.errors import ConfigError, RunFailedError
from nestcli.jobs import activity
from nestcli.jobs.activity import Notes

Happening = Callable[[], object]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_POLL", 0.1)
    monkeypatch.setattr(watch, "_GRACE", 0.3)
    monkeypatch.setattr(datamodule, "available_cores", lambda: 4)


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    before = children(os.getpid())
    yield
    deadline = time.monotonic() + 10
    while children(os.getpid()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children(os.getpid()) <= before


def children(pid: int) -> set[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return {int(child) for child in found.stdout.split() if Path(f"/proc/{child}/comm").is_file()}


def at_file(name: str, happening: Happening, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something happen in each loader process that begins to read a file of this name."""
    parent = os.getpid()

    def read(entry: Any, **options: Any) -> Any:
        if entry.name.endswith(name) and os.getpid() != parent:
            happening()
        return read_audio(entry, **options)

    monkeypatch.setattr(dataset, "read_audio", read)
    monkeypatch.setattr(utterance_audio, "read_audio", read)


def endless(corpus: dict[str, Path], *overrides: str) -> Iterator[Any]:
    words = ["model.train_ds.read_timeout=1", "model.train_ds.batch_augmentor.prob=1", *overrides]
    data = NestDataModule(tiny_config(corpus, *words))
    data.batches = 1_000_000
    return iter(data.train_dataloader())


def failure_of(batches: Iterator[Any]) -> tuple[str, float]:
    """The message that ends the loading, and after how many seconds."""
    start = time.monotonic()
    with pytest.raises(RunFailedError) as failure:
        deque(itertools.islice(batches, 100_000), maxlen=0)
    return str(failure.value), time.monotonic() - start


def die(number: int) -> Happening:
    return lambda: os.kill(os.getpid(), number)


def hang() -> None:
    time.sleep(1000)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_process_that_is_killed(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    at_file("train/3.wav", die(signal.SIGKILL), monkeypatch)
    message, seconds = failure_of(endless(corpus, f"model.train_ds.num_workers={workers}"))
    assert "the loader process " in message
    assert "of model.train_ds (pid " in message
    assert f"was killed by SIGKILL while reading {corpus['train'].parent}/train/3.wav" in message
    assert f"({corpus['train']}, line 4)" in message
    assert "lower model.train_ds.num_workers" in message
    assert "take its line out of the manifest" in message
    assert seconds < 5


@pytest.mark.parametrize(
    ("happening", "how"),
    [
        (lambda: ctypes.string_at(0), "was killed by SIGSEGV while reading"),
        (die(signal.SIGBUS), "was killed by SIGBUS while reading"),
        (lambda: os._exit(3), "ended (exit code 3) while reading"),
    ],
)
def test_a_process_that_crashes(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, happening: Happening, how: str
) -> None:
    at_file("train/5.wav", happening, monkeypatch)
    message, seconds = failure_of(endless(corpus, "model.train_ds.num_workers=2"))
    assert f"{how} {corpus['train'].parent}/train/5.wav" in message
    assert "take its line out of the manifest" in message
    assert seconds < 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_hangs(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    at_file("train/3.wav", hang, monkeypatch)
    message, seconds = failure_of(endless(corpus, f"model.train_ds.num_workers={workers}"))
    assert f"has been reading {corpus['train'].parent}/train/3.wav ({corpus['train']}, line 4) for 1 s" in message
    assert "raise model.train_ds.read_timeout (1 s)" in message
    assert 1 <= seconds < 5


def test_a_process_that_is_stopped_while_it_waits(corpus: dict[str, Path]) -> None:
    before = children(os.getpid())
    batches = endless(corpus, "model.train_ds.num_workers=2")
    next(batches)
    time.sleep(0.5)  # the queues are full
    stopped = min(children(os.getpid()) - before)
    os.kill(stopped, signal.SIGSTOP)
    message, seconds = failure_of(batches)
    assert f"(pid {stopped}) has not answered for 1 s; the last one that it read is {corpus['train'].parent}" in message
    assert "It is stopped (SIGSTOP)." in message
    assert seconds < 5


def test_a_noise_file_is_the_culprit(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    at_file("noise/1.wav", die(signal.SIGSEGV), monkeypatch)
    message, _ = failure_of(endless(corpus, "model.train_ds.num_workers=2"))
    assert f"SIGSEGV while reading {corpus['noise'].parent}/noise/1.wav ({corpus['noise']}, line 2)" in message


def test_a_member_of_a_tar_is_the_culprit(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    with tarfile.open(tmp_path / "audio_0.tar", "w") as tar:
        for row in rows:
            path = Path(row["audio_filepath"])
            tar.add(path, arcname=path.name)
            row.update(audio_filepath=path.name, shard_id=0)
    (tmp_path / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    at_file("7.wav", hang, monkeypatch)
    words = ["model.train_ds.is_tarred=true", f"model.train_ds.tarred_audio_filepaths={tmp_path}/audio_0.tar"]
    words += [f"model.train_ds.manifest_filepath={tmp_path}/m.json", "model.train_ds.num_workers=1"]
    message, _ = failure_of(endless(corpus, *words))
    assert f"has been reading {tmp_path}/audio_0.tar: 7.wav ({tmp_path}/m.json, line 8)" in message


def test_validation_hangs(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    at_file("val/1.wav", hang, monkeypatch)
    words = ["model.validation_ds.num_workers=1", "model.validation_ds.read_timeout=1"]
    message, _ = failure_of(iter(NestDataModule(tiny_config(corpus, *words)).val_dataloader()))
    assert "of model.validation_ds" in message
    assert "val/1.wav" in message


def test_a_slow_loader_is_left_alone(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    at_file(".wav", lambda: time.sleep(0.25), monkeypatch)  # a batch of four takes the timeout and more
    data = NestDataModule(tiny_config(corpus, "model.train_ds.num_workers=2", "model.train_ds.read_timeout=0.9"))
    assert len(list(data.train_dataloader())) == 3


def test_nothing_is_watched_without_a_timeout(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    at_file("train/3.wav", lambda: time.sleep(2), monkeypatch)
    data = NestDataModule(tiny_config(corpus, "model.train_ds.num_workers=1", "model.train_ds.read_timeout=null"))
    assert len(list(data.train_dataloader())) == 3


def test_a_timeout_must_be_some_time(corpus: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model\.train_ds\.read_timeout: 0\.0 must be above 0"):
        NestDataModule(tiny_config(corpus, "model.train_ds.read_timeout=0"))


# ---- the whole run


SCRIPT = """
import os, sys, time
from nestcli.data import dataset
from nestcli.data.utterance_audio import read_audio
from nestcli.cli import app

def read(entry, **options):
    if entry.name.endswith("train/7.wav") and os.getpid() != parent:
        {happening}
    return read_audio(entry, **options)

parent = os.getpid()
dataset.read_audio = read
sys.argv = ["nest", "pretrain", "small", *sys.argv[1:]]
app.main()
"""


def started(corpus: dict[str, Path], folder: Path, happening: str, *overrides: str) -> subprocess.Popen[str]:
    words = ["model.train_ds.num_workers=2", "trainer.max_steps=2000", "trainer.val_check_interval=1000", *overrides]
    words += [f"model.train_ds.manifest_filepath={corpus['train']}", f"model.train_ds.noise_manifest={corpus['noise']}"]
    words += [f"model.validation_ds.manifest_filepath={corpus['val']}", f"exp_manager.exp_dir={folder}"]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(happening=happening), *TINY_RUN, *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happening", "said"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL while reading"),
        ("time.sleep(1000)", "has been reading"),
        ("os.kill(os.getpid(), 19)", "It is stopped (SIGSTOP)."),
    ],
)
def test_a_run_ends_with_one_message(corpus: dict[str, Path], tmp_path: Path, happening: str, said: str) -> None:
    run = started(corpus, tmp_path, happening, "model.train_ds.read_timeout=2")
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 1
    assert said in errors
    assert f"{corpus['train'].parent}/train/7.wav" in errors
    assert "Traceback" not in errors
    assert "internal error" not in errors


@pytest.mark.slow
def test_no_process_outlives_a_run_that_is_killed(corpus: dict[str, Path], tmp_path: Path) -> None:
    run = started(corpus, tmp_path, "time.sleep(1000)", "model.train_ds.read_timeout=null")
    deadline = time.monotonic() + 60
    while len(children(run.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # one of them reads, and would do so for ever
    loaders = children(run.pid)
    run.kill()
    run.communicate()
    deadline = time.monotonic() + 5
    while any(alive(pid) for pid in loaders) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(loaders) == 2
    assert not any(alive(pid) for pid in loaders)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_step_is_finished_before_a_lost_process_ends_the_run(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nestcli.model.module import NestModule
    from nestcli.training.run import Pretraining
    from training.test_run import Recorder

    finished = []
    original = NestModule.training_step
    of_others = set(multiprocessing.active_children())

    def step(*arguments: Any) -> Any:
        children = [child for child in multiprocessing.active_children() if child not in of_others]
        (lost,) = (child for child in children if child.name == "nest-loader-0")  # it has read the batch of this step
        lost.kill()
        lost.join(10)
        finished.append(True)
        return original(*arguments)

    monkeypatch.setattr(NestModule, "training_step", step)
    words = [f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=9", "model.train_ds.num_workers=2"]
    run = Pretraining(tiny_config(corpus, *words), Recorder())
    start = time.monotonic()
    with pytest.raises(RunFailedError, match=r"of model\.train_ds \(pid \d+\) was killed by SIGKILL .*/(train|noise)/"):
        run.fit()
    assert finished == [True]
    assert time.monotonic() - start < 20


# ---- notes


def test_a_note_says_what_is_read_and_what_was(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "own", None)
    speech, other = read_manifests(str(corpus["train"])), read_manifests(str(corpus["noise"]))
    pages = Notes(2, [other, speech])
    assert pages.of(0) == pages.of(1) == activity.NOTHING
    pages.enter(1)
    assert (pages.of(1).reading, pages.of(1).line, pages.of(1).manifest, pages.of(0).number) == (False, -1, -1, 0)
    before = time.monotonic()
    with speech.reading(2) as entry:
        note = pages.of(1)
    assert entry == speech.entry(2)
    assert (note.reading, note.line, note.manifest) == (True, 2, 1)
    assert before <= note.since <= time.monotonic()
    after = pages.of(1)
    assert (after.reading, after.line, after.manifest) == (False, 2, 1)
    assert after.number > note.number
    activity.moved()
    assert pages.of(1).since > after.since
    with pytest.raises(IndexError), other.reading(1000):
        pass
    assert not pages.of(1).reading


class Asleep:
    """Stands for a process that nothing reaches."""

    exitcode, pid = None, None


def old(number: int, line: int, age: float) -> activity.Note:
    return activity.Note(number, time.monotonic() - age, line, 0, True)


def watch_of(manifest: Path, timeout: float = 1.0) -> Watch:
    watched = Watch(1, "model.train_ds", timeout, [read_manifests(str(manifest))])
    watched.processes = [Asleep()]  # type: ignore[list-item]
    return watched


def test_processes_that_were_stopped_together_may_move_again(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch_of(corpus["train"])
    monkeypatch.setattr(watched.notes, "of", lambda number: old(5, 0, 1000))
    watched.look()  # Ctrl-Z a thousand seconds ago, and fg just now
    monkeypatch.setattr(watched.notes, "of", lambda number: old(6, 1, 0))
    time.sleep(0.4)
    watched.look()
    monkeypatch.setattr(watched.notes, "of", lambda number: old(7, 2, 1000))
    watched.look()
    time.sleep(0.4)
    with pytest.raises(RunFailedError, match=r"reading .*/2\.wav .* for 1000 s"):
        watched.look()


def test_remote_files_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"audio_filepath": "https://host/a.wav?key=secret", "duration": 1.2}
    (tmp_path / "m.json").write_text(json.dumps(row) + "\n")
    for age, ended in ((250, False), (350, True)):
        watched = watch_of(tmp_path / "m.json")
        monkeypatch.setattr(watched.notes, "of", lambda number, age=age: old(5, 0, age))
        watched.look()
        time.sleep(0.4)
        if ended:
            with pytest.raises(RunFailedError, match=r"https://host/a\.wav\?\*\*\*"):
                watched.look()
        else:
            watched.look()


def test_a_manifest_that_went_as_well_is_named(corpus: dict[str, Path], tmp_path: Path) -> None:
    manifest = tmp_path / "m.json"
    manifest.write_bytes(corpus["train"].read_bytes())
    watched = watch_of(manifest)
    manifest.write_bytes(b"")
    assert watched._doing(old(1, 3, 0)) == f"reading the file of {manifest}, line 4"


def test_a_process_that_cannot_be_ended_is_not_waited_for(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing.process as processes

    monkeypatch.setattr(loader, "_ENDING", 0.5)
    at_file("train/3.wav", hang, monkeypatch)
    batches = endless(corpus, "model.train_ds.num_workers=1")
    kills: list[Any] = []
    for name in ("kill", "terminate"):
        monkeypatch.setattr(processes.BaseProcess, name, lambda self: kills.append(self))
    start = time.monotonic()
    with pytest.raises(RunFailedError, match=r"train/3\.wav"):
        list(batches)
    del batches
    assert time.monotonic() - start < 20
    assert kills
    assert kills[0] not in processes._children  # type: ignore[attr-defined]
    os.kill(kills[0].pid, signal.SIGKILL)
    kills[0].join()
