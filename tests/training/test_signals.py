"""Runs that Ctrl-C, SIGTERM or Slurm stops: what they save, and how the same command resumes them."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import Listener, checkpoint, command, ended, fake_scontrol, processes_of, rows, train, wait_for_step

from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.model.module import NestModule
from nestcli.training.signals import StoppedError, requeue


def signal_at(step: int, signum: int = signal.SIGTERM, times: int = 1) -> Listener:
    return Listener(step, lambda: [os.kill(os.getpid(), signum) for _ in range(times)])


def assert_same(folder: Path, whole: Path) -> None:
    assert rows(folder) == rows(whole)
    ours, theirs = (load_lightning_checkpoint(checkpoint(each)) for each in (folder, whole))
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    counted = [each["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] for each in (ours, theirs)]
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (1, ()),
        (4, ()),  # validation is due
        (3, ("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4")),
        (4, ("trainer.log_every_n_steps=3",)),  # whose line is written when it is validated
        (4, ("exp_manager.checkpoint_callback_params.every_n_train_steps=2",)),
        (4, ("model.validation_ds.manifest_filepath=null", "trainer.val_check_interval=4")),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    corpus: dict[str, Path], tmp_path: Path, step: int, words: tuple[str, ...]
) -> None:
    words = ("trainer.max_steps=7", "trainer.val_check_interval=2", *words)
    train(corpus, tmp_path / "whole", *words)
    with pytest.raises(StoppedError) as stopped:
        train(corpus, tmp_path / "parts", *words, listener=signal_at(step))
    assert stopped.value.exit_code == 143
    assert stopped.value.saved == checkpoint(tmp_path / "parts")
    assert load_lightning_checkpoint(checkpoint(tmp_path / "parts"))["global_step"] == step
    train(corpus, tmp_path / "parts", *words)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("batch", [0, 1])
def test_validation_that_was_stopped_is_done_again_as_a_whole(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    words = ("trainer.max_steps=7", "trainer.val_check_interval=2", "model.validation_ds.batch_size=1")
    train(corpus, tmp_path / "whole", *words)
    step = NestModule.validation_step

    def stopped_in(self: NestModule, given: object, batch_idx: int) -> object:
        if self.trainer.global_step == 4 and batch_idx == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, given, batch_idx)

    monkeypatch.setattr(NestModule, "validation_step", stopped_in)
    with pytest.raises(StoppedError):
        train(corpus, tmp_path / "parts", *words)
    monkeypatch.undo()
    assert "val_loss" not in rows(tmp_path / "parts")[-1]
    again = Listener()
    train(corpus, tmp_path / "parts", *words, listener=again)
    assert again.validated == [4, 6]
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_validation_that_was_owed_is_not_done_twice(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ("trainer.max_steps=9", "trainer.val_check_interval=2")
    for step in (4, 5, 6):
        with pytest.raises(StoppedError):
            train(corpus, tmp_path, *words, listener=signal_at(step))
    last = Listener()
    train(corpus, tmp_path, *words, listener=last)
    assert last.validated == [6, 8]


def test_ctrl_c_saves_and_a_second_one_does_not(
    corpus: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        StoppedError, match=r"stopped by Ctrl-C: saved .*-last\.ckpt; give the same command again"
    ) as stopped:
        train(corpus, tmp_path / "once", "trainer.max_steps=5", listener=signal_at(2, signal.SIGINT))
    assert stopped.value.exit_code == 130
    assert "Ctrl-C: stopping after this step and saving; Ctrl-C again stops at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "twice", "trainer.max_steps=5", listener=signal_at(2, signal.SIGINT, times=2))
    assert not list((tmp_path / "twice").rglob("*.ckpt"))
    assert signal.getsignal(signal.SIGINT) in (before, signal.SIG_IGN)  # Lightning's way out of Ctrl-C
    signal.signal(signal.SIGINT, before)


def test_a_run_that_ends_anyway_ends_as_it_would(corpus: dict[str, Path], tmp_path: Path) -> None:
    listener = signal_at(4)
    result = train(corpus, tmp_path, "trainer.max_steps=4", "trainer.val_check_interval=2", listener=listener)
    assert result.step == 4
    assert listener.validated == [2, 4]


# ---- real processes and signals


def stopped_run(corpus, folder, *words, signum, **options):
    """Start the command and signal all its processes after its first step; return its output and exit code."""
    run = command(corpus, folder, *words, **options)
    wait_for_step(folder, len(rows(folder)) + 1 if (folder / "run" / "metrics.jsonl").is_file() else 1, run)
    time.sleep(random.random() / 2)
    began = time.monotonic()
    os.killpg(run.pid, signum)
    output = ended(run)
    print(f"{signum!r}: {time.monotonic() - began:.2f} s to the end")
    assert time.monotonic() - began < 60
    assert "Traceback" not in output, output
    assert not processes_of(run.pid)
    return output, run.returncode


@pytest.mark.slow
def test_slurm_warns_and_the_job_is_queued_again(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ("trainer.max_steps=60", "trainer.val_check_interval=7", "model.train_ds.num_workers=1")
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "nest", **fake_scontrol(tmp_path / "bin", "exit 0")}
    output, code = stopped_run(corpus, tmp_path / "parts", *words, signum=signal.SIGUSR1, **slurm)
    assert code == 143, output
    assert f"stopped by SIGUSR1: saved {checkpoint(tmp_path / 'parts')}; give the same command again" in output
    assert "Slurm's job 4711 is queued again" in output
    assert (tmp_path / "bin" / "calls").read_text() == "requeue 4711\n"
    train(corpus, tmp_path / "parts", *words)
    train(corpus, tmp_path / "whole", *words)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_and_their_loaders_stop_together(corpus: dict[str, Path], tmp_path: Path, signum: int) -> None:
    words = (
        "trainer.max_steps=60", "trainer.val_check_interval=3", "trainer.devices=2", "model.train_ds.num_workers=1",
        "model.validation_ds.num_workers=1",
    )  # fmt: skip
    for _ in range(3):
        output, code = stopped_run(corpus, tmp_path / "parts", *words, signum=signum)
        assert code == (130 if signum == signal.SIGINT else 143), output
        assert output.count("stopping after this step") == output.count("give the same command again") == 1
    for folder in ("parts", "whole"):
        run = command(corpus, tmp_path / folder, *words)
        output = ended(run)
        assert run.returncode == 0, output
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("variables", "script", "said", "asked"),
    [
        ({"SLURM_JOB_ID": "12"}, "exit 0", "Slurm's job 12 is queued again", "requeue 12\n"),
        ({"SLURM_JOB_ID": "12"}, "echo disabled >&2; exit 1", "job 12 is not queued again: disabled", "requeue 12\n"),
        ({"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}, "exit 0", "job 9_3 is", "requeue 9_3\n"),
        ({"SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "interactive"}, "exit 0", None, None),
        ({"SLURM_JOB_ID": "12; reboot"}, "exit 0", None, None),
        ({}, "exit 0", None, None),
    ],
)  # fmt: skip
def test_queueing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables, script, said, asked) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, **fake_scontrol(tmp_path / "bin", script)}.items():
        monkeypatch.setenv(name, value)
    told: list[str] = []
    requeue(told.append)
    assert ([said in line for line in told] == [True]) if said else not told
    calls = tmp_path / "bin" / "calls"
    assert (calls.read_text() if calls.exists() else None) == asked


def test_without_scontrol_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", "/nowhere")
    told: list[str] = []
    requeue(told.append)
    assert told == ["Slurm's job 12 is not queued again: this machine has no scontrol"]
