"""Runs killed with SIGKILL, even while writing checkpoints, resume to the result of an uninterrupted run."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from conftest import TINY_RUN
from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.checkpoint.load import load_checkpoint
from nestcli.config import load_config
from nestcli.training.find_checkpoint import newest_first
from nestcli.training.monitor.metrics import TIMED
from nestcli.training.run import Pretraining

OTHER_DISK = Path("/dev/shm")


class Process(Protocol):
    pid: int


class Silent:
    def step(self, report: object) -> None: ...

    def validation(self, step: int, loss: float, accuracy: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finished(self) -> None: ...


def words(corpus: dict[str, Path], folder: Path, steps: int) -> list[str]:
    """Noise and speech mixed in, dither, dropout, accumulation, validation, and several checkpoints."""
    return [
        *TINY_RUN, f"model.train_ds.manifest_filepath={corpus['train']}",
        f"model.validation_ds.manifest_filepath={corpus['val']}", f"model.train_ds.noise_manifest={corpus['noise']}",
        f"exp_manager.exp_dir={folder}", "exp_manager.name=run", f"trainer.max_steps={steps}",
        "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4", "model.encoder.dropout=0.1",
        "model.encoder.dropout_att=0.1", "model.preprocessor.dither=0.001",
        "exp_manager.checkpoint_callback_params.save_top_k=2",
    ]  # fmt: skip


@dataclass
class Killer:
    """Starts and kills a run until it has been killed often enough; then lets it finish."""

    start: Callable[[str], Any]  # by $TMPDIR; a process that the test may kill
    wait: Callable[[Any], int | None]  # its exit code, None while it runs
    draw: random.Random
    warm_up: float  # seconds until the first step
    kills: int = 0
    in_writing: int = 0
    by_disk: dict[str, int] = field(default_factory=dict)

    def kill_once(self, folder: Path, *, writing: bool) -> bool:
        """One start and, at a random moment or while a checkpoint is written, one kill; False if the run ended."""
        tmpdir = str(OTHER_DISK if self.draw.random() < 0.5 and OTHER_DISK.is_dir() else Path(tempfile.gettempdir()))
        process = self.start(tmpdir)
        moment = self._writing(folder, process) if writing else self._anywhere()
        while not moment():
            code = self.wait(process)
            if code is not None:
                assert code == 0, f"the resumed run ended with {code}"
                return False
            time.sleep(0.0003)
        time.sleep(self.draw.uniform(0, 0.006) if writing else 0)
        os.kill(process.pid, signal.SIGKILL)
        while (code := self.wait(process)) is None:
            time.sleep(0.001)
        if code == 0:  # it was quicker
            return False
        assert code == -signal.SIGKILL
        self.kills += 1
        self.by_disk[tmpdir] = self.by_disk.get(tmpdir, 0) + 1
        self.in_writing += bool(unfinished(folder, process))
        return True

    def _anywhere(self) -> Callable[[], bool]:
        early = self.draw.random() < 0.2
        seconds = self.draw.uniform(0, self.warm_up) if early else self.warm_up * self.draw.uniform(0.7, 1.5)
        end = time.monotonic() + seconds
        return lambda: time.monotonic() >= end

    def _writing(self, folder: Path, process: Process) -> Callable[[], bool]:
        wanted, seen = self.draw.randint(1, 8), set()

        def moment() -> bool:
            seen.update(unfinished(folder, process))
            return len(seen) >= wanted

        return moment

    def tally(self) -> str:
        disks = ", ".join(f"{count} with TMPDIR={disk}" for disk, count in self.by_disk.items())
        return f"{self.kills} kills, {self.in_writing} of them left a half-written checkpoint; {disks}"


def unfinished(folder: Path, process: Process) -> set[str]:
    """Return the temporary files of a process beside the checkpoints."""
    try:
        return {path.name for path in (folder / "checkpoints").iterdir() if path.name.endswith(f".{process.pid}.tmp")}
    except FileNotFoundError:
        return set()


def assert_same_outcome(killed: Path, whole: Path) -> None:
    """Compare losses of every step and validation, weights, optimiser, schedule and counters, bit by bit."""
    ours, theirs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (killed, whole)
    )
    for row in (*ours, *theirs):
        for clock in TIMED:
            row.pop(clock, None)
    assert ours == theirs
    ours, theirs = (last(run) for run in (killed, whole))
    assert ours["global_step"] == theirs["global_step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_identical(ours[key], theirs[key], key)
    ours, theirs = (load_checkpoint(run / "checkpoints" / "run.nemo").state_dict for run in (killed, whole))
    assert_identical(ours, theirs, "nemo")
    ours, theirs = (sorted(path.name for path in (run / "checkpoints").glob("*.ckpt*")) for run in (killed, whole))
    assert [name for name in ours if "-last" not in name] == [name for name in theirs if "-last" not in name]
    assert not list((killed / "checkpoints").glob(".*")), "a killed write's file is still there"
    assert not list((killed / "checkpoints").glob("*.damaged*")), "a kill damaged a checkpoint"


def last(run: Path) -> dict[str, Any]:
    """Load the checkpoint to resume from; after a kill between the last step's two writes it is the best model's."""
    return load_lightning_checkpoint(next(newest_first(run / "checkpoints")))


def assert_identical(ours: Any, theirs: Any, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key, value in ours.items():
            assert_identical(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_identical(our, their, f"{where}.{number}")
    else:
        assert ours == theirs, where


# ---- a handful, in processes that are forked with everything imported ----


def _train(overrides: list[str], tmpdir: str) -> None:
    os.environ["TMPDIR"] = tmpdir
    torch.set_num_threads(1)
    Pretraining(load_config("small", overrides), Silent()).fit()


@pytest.mark.slow
def test_three_kills_change_nothing(corpus: dict[str, Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nestcli.training.run", "test_kills"])

    def starter(folder: Path) -> Callable[[str], Any]:
        def start(tmpdir: str) -> Any:
            process = context.Process(target=_train, args=(words(corpus, folder, 10), tmpdir))
            process.start()
            return process

        return start

    whole = starter(tmp_path / "whole")(tempfile.gettempdir())
    whole.join()
    assert whole.exitcode == 0
    killer = Killer(starter(tmp_path / "killed"), lambda process: process.exitcode, random.Random(7), 0.8)
    for writing in (True, False, True):
        assert killer.kill_once(tmp_path / "killed" / "run", writing=writing), "the run ended before it was killed"
    assert killer.in_writing >= 1
    end = killer.start(tempfile.gettempdir())
    end.join()
    assert end.exitcode == 0
    assert_same_outcome(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


# ---- fifty, of the command as it is typed ----


@pytest.mark.slow
def test_fifty_kills_change_nothing(corpus: dict[str, Path], tmp_path: Path) -> None:
    wanted, steps, draw, number = 50, 120, random.Random(50), 0

    def starter(folder: Path) -> Callable[[str], Any]:
        def start(tmpdir: str) -> subprocess.Popen[bytes]:
            environment = {**os.environ, "TMPDIR": tmpdir, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "nestcli", "pretrain", "small", *words(corpus, folder, steps)]
            with (tmp_path / "stderr").open("ab") as log:
                return subprocess.Popen([*command, "model.train_ds.num_workers=1"], stderr=log, env=environment)

        return start

    process, began, metrics = (
        starter(tmp_path / "whole")("/tmp"),
        time.monotonic(),
        tmp_path / "whole/run/metrics.jsonl",
    )
    while not metrics.is_file():
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    killer = Killer(starter(tmp_path), lambda process: process.poll(), draw, time.monotonic() - began)
    assert process.wait() == 0
    while killer.kills < wanted:
        number += 1
        folder = tmp_path / str(number)
        killer.start = starter(folder)
        while killer.kills < wanted and killer.kill_once(folder / "run", writing=draw.random() < 0.6):
            pass
        assert killer.start("/tmp").wait() == 0, (tmp_path / "stderr").read_text()[-2000:]
        assert_same_outcome(folder / "run", tmp_path / "whole" / "run")
    print(f"\n{killer.tally()}; {number} runs of {steps} steps, identical to the unbroken one")
    log = (tmp_path / "stderr").read_text()
    assert "Traceback" not in log, log
    assert killer.in_writing >= wanted // 5
