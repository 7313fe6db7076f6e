"""Runs of several processes: same losses and utterances as with one, no hang, and a common end."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import Listener, checkpoint, command, ended, fake_scontrol, processes_of, rows, train, wait_for_step
from traced_nest import traced_step

from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.checkpoint.load import load_checkpoint
from nestcli.model.module import NestModule
from nestcli.training.launcher import _may_be_connection

TWO = ("trainer.devices=2", "trainer.accumulate_grad_batches=1")
ONE = ("trainer.devices=1", "trainer.accumulate_grad_batches=2")  # the same batches a step
LAYER_NORM = ("model.encoder.conv_norm_type=layer_norm",)
# A thousandth of one Adam step of these runs, whose rate reaches 1e-2. Two processes add in another order than one, and
# how that rounds differs from processor to processor: 3e-7 on one, 1.1e-6 on another.
ROUNDING = 1e-5
DROPOUT = ("model.encoder.dropout=0.1", "model.encoder.dropout_att=0.1")


def done(run):
    output = ended(run)
    assert run.returncode == 0, output
    return output


def seen(trace):
    """Return the utterances of every optimiser step, over all processes."""
    steps = {}
    for file in trace.glob("*.jsonl"):
        for step, items, _ in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(step, []).extend(items)
    return {step: sorted(items) for step, items in steps.items()}


def largest_difference(ours, theirs, but=()):
    """Return the largest relative difference of two runs' metrics."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    pairs = [(row[key], other[key]) for row, other in zip(ours, theirs, strict=True) for key in row if key not in but]
    assert all((one is None) == (two is None) for one, two in pairs)
    pairs = [(one, two) for one, two in pairs if one is not None]
    return max(abs(one - two) / max(abs(one), abs(two), 1e-9) for one, two in pairs)


def weights_difference(one, two, but=()):
    ours, theirs = (load_lightning_checkpoint(checkpoint(each))["state_dict"] for each in (one, two))
    learned = [name for name in theirs if theirs[name].is_floating_point() and "running" not in name]
    learned = [name for name in learned if not name.endswith(but)]
    return max(float((ours[name] - theirs[name]).abs().max()) for name in learned)


def test_one_two_and_one_process_are_one_run(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*LAYER_NORM, *DROPOUT, "model.train_ds.batch_size=5", "model.train_ds.drop_last=false")
    intervals = {ONE: "trainer.val_check_interval=4", TWO: "trainer.val_check_interval=2"}
    folder, whole, listener = tmp_path / "parts", tmp_path / "whole", Listener()
    with monkeypatch.context() as traced:
        traced.setattr(NestModule, "training_step", traced_step)
        traced.setenv("TRACE", str(tmp_path / "one"))
        (tmp_path / "one").mkdir()
        train(corpus, whole, *words, *ONE, intervals[ONE], "trainer.max_steps=9")
    train(corpus, folder, *words, *ONE, intervals[ONE], "trainer.max_steps=3")
    output = done(command(corpus, folder, *words, *TWO, intervals[TWO], "trainer.max_steps=7", trace=tmp_path / "two"))
    assert "The run continues with 2 x 1 batches" in output
    assert "A step still takes 2 batches, the same that it would have taken." in output
    train(corpus, folder, *words, *ONE, intervals[ONE], "trainer.max_steps=9", listener=listener)
    assert len(listener.notes) == 1
    assert largest_difference(rows(folder), rows(whole), but=("effective_rank",)) < 1e-5  # (of one process's frames)
    assert weights_difference(folder, whole) < ROUNDING
    expected, found = seen(tmp_path / "one"), seen(tmp_path / "two")
    assert found == {step: expected[step] for step in range(3, 7)}
    items = [item for step in sorted(expected) for item in expected[step]]
    assert sorted(items[:24]) == sorted([*range(12)] * 2)  # an epoch is three batches, of five, five and two


@pytest.mark.slow
def test_with_batch_norm_the_losses_are_the_same_and_the_running_statistics_are_not(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    words = (*DROPOUT, "trainer.max_steps=8")
    train(corpus, tmp_path / "one", *words, *ONE, "trainer.val_check_interval=4")
    done(command(corpus, tmp_path / "two", *words, *TWO, "trainer.val_check_interval=2"))
    ours, theirs = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert largest_difference(ours, theirs, but=("effective_rank", "val_loss", "val_masked_accuracy")) < 1e-5
    assert weights_difference(tmp_path / "two", tmp_path / "one") < ROUNDING
    differing = [
        abs(one["val_loss"] - two["val_loss"]) for one, two in zip(ours, theirs, strict=True) if "val_loss" in one
    ]
    assert 1e-6 < max(differing) < 0.1  # one process updates them with every batch, two with those of the first


def test_another_number_of_batches_a_step_is_told_and_loses_none(corpus: dict[str, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path, "trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4")
    listener = Listener()
    train(corpus, tmp_path, "trainer.max_steps=10", "trainer.val_check_interval=4", listener=listener)
    assert len(listener.notes) == 1
    assert "A step takes 1 batches in place of 2; steps and learning rate are counted on." in listener.notes[0]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 11))
    assert [row["step"] for row in rows(tmp_path) if "val_loss" in row] == [2, 4, 8]
    state = load_lightning_checkpoint(checkpoint(tmp_path))["NestDataModule"]
    assert (state["consumed"], state["counted"]) == (15, 10)


@pytest.mark.slow
def test_processes_without_readable_audio_keep_in_step(corpus: dict[str, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    for line in lines[1::2]:
        line["audio_filepath"] = str(tmp_path / "gone.wav")
    manifest = tmp_path / "train.json"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines[:7]))
    run = command(
        corpus, tmp_path, *TWO, "trainer.max_steps=12", "trainer.val_check_interval=4", "model.train_ds.shuffle=false",
        "model.train_ds.batch_size=1", f"model.train_ds.manifest_filepath={manifest}", "model.train_ds.num_workers=1",
        "model.train_ds.max_failed_share=1.0",
    )  # fmt: skip
    assert "gone.wav" in done(run)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("1 2 raise", "process 1 of 2 failed:\nTraceback"),
        pytest.param("0 2 raise", "process 0 of 2 failed:\nTraceback", marks=pytest.mark.slow),
        pytest.param("1 2 words", "process 1 of 2 failed:\nTraceback", marks=pytest.mark.slow),
        pytest.param("1 2 exit", "process 1 of the run ended with exit code 1", marks=pytest.mark.slow),
        pytest.param("1 2 kill", "process 1 of the run was ended by SIGKILL", marks=pytest.mark.slow),
        pytest.param("0 2 kill", "", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_ends_the_run(corpus: dict[str, Path], tmp_path: Path, fault: str, said: str) -> None:
    words = (*TWO, "trainer.max_steps=9", "model.train_ds.num_workers=1")
    run = command(corpus, tmp_path, *words, faults=fault, trace=tmp_path / "trace")
    output = ended(run)
    last = max(json.loads(file.read_text().splitlines()[-1])[2] for file in (tmp_path / "trace").iterdir())
    assert time.time() - last < 60
    assert run.returncode not in (0, 2)
    assert said in output
    assert output.count("Traceback (most recent call last)") == ("raise" in fault or "words" in fault)
    if "raise" in fault:
        assert output.index("ArithmeticError: a fault of this process") < output.index("error: ")
    until = time.monotonic() + 20  # loader processes look for their parent every five seconds
    while processes_of(run.pid) and time.monotonic() < until:
        time.sleep(0.2)
    assert not processes_of(run.pid)


@pytest.mark.parametrize(
    ("error", "backend", "verdict"),
    [
        (torch.distributed.DistBackendError("ncclUnhandledCudaError"), "cuda:nccl", True),
        (torch.distributed.DistNetworkError("The client socket has timed out"), "cuda:nccl", True),
        (torch.distributed.DistStoreError("wait timeout"), None, True),
        (RuntimeError("Connection closed by peer"), "cpu:gloo,cuda:gloo", True),
        (RuntimeError("NCCL, gloo"), "cuda:nccl", False),
        (RuntimeError("NCCL, gloo"), None, False),
        (torch.OutOfMemoryError("CUDA out of memory"), "cpu:gloo,cuda:gloo", False),
        (ValueError("NCCL, gloo"), "cpu:gloo,cuda:gloo", False),
    ],
)
def test_errors_of_connections_are_told_by_their_types(
    monkeypatch: pytest.MonkeyPatch, error: Exception, backend: str | None, verdict: bool
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: backend)
    assert _may_be_connection(error) is verdict


@pytest.mark.slow
@pytest.mark.parametrize("is_read", [True, False])
def test_processes_that_wait_for_a_dead_one_are_ended(corpus: dict[str, Path], tmp_path: Path, is_read: bool) -> None:
    run = command(corpus, tmp_path, *TWO, "trainer.max_steps=9", faults="0 2 wait", trace=tmp_path / "trace")
    while not (tmp_path / "trace").joinpath("0.jsonl").is_file() or len(seen(tmp_path / "trace")) < 3:
        time.sleep(0.1)
    [child] = [each for each in processes_of(run.pid) if each != str(run.pid)]
    began = time.monotonic()
    if not is_read:  # as behind `| head`
        run.stdout.close()
        run.stdout = None
    os.kill(int(child), signal.SIGKILL)
    output = ended(run)
    assert time.monotonic() - began < 60
    assert run.returncode == 1
    assert not is_read or "process 1 of the run was ended by SIGKILL" in output


@pytest.mark.slow
def test_torchrun_starts_the_processes_too(corpus: dict[str, Path], tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    words = ("trainer.max_steps=4", "trainer.val_check_interval=2", *TWO)
    done(command(corpus, tmp_path / "torchrun", *words, launcher=launcher))
    done(command(corpus, tmp_path / "own", *words))
    assert rows(tmp_path / "torchrun") == rows(tmp_path / "own")
    ours, theirs = (load_lightning_checkpoint(checkpoint(tmp_path / name)) for name in ("torchrun", "own"))
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("norm", [LAYER_NORM, ()], ids=["layer norm", "batch norm"])
def test_sharded_weights_learn_the_same_and_checkpoints_are_the_same(
    corpus: dict[str, Path], tmp_path: Path, norm: tuple[str, ...]
) -> None:
    # Some weights have gradients of rounding alone, of which Adam makes whole steps (docs/decisions/0006). Those of
    # biases before batch norm move the running means, and so validation, in the last digits.
    decided_by_rounding = ("self_attn.linear_k.bias", "self_attn.linear_pos.weight")
    moved_by_them: tuple[str, ...] = ()
    if not norm:
        decided_by_rounding += ("conv.depthwise_conv.bias",)
        moved_by_them = ("parameter_norm", "val_loss")
    words = (*TWO, *DROPOUT, *norm, "trainer.val_check_interval=2", "model.encoder.n_layers=2")
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    done(command(corpus, whole, *words, "trainer.max_steps=8"))
    done(command(corpus, sharded, *words, "trainer.max_steps=3", "trainer.strategy=fsdp2"))
    done(command(corpus, sharded, *words, "trainer.max_steps=5", "trainer.strategy=fsdp2"))
    done(command(corpus, sharded, *words, "trainer.max_steps=6"))  # DDP resumes from it, and the other way round
    done(command(corpus, sharded, *words, "trainer.max_steps=8", "trainer.strategy=fsdp2"))
    assert largest_difference(rows(sharded), rows(whole), but=moved_by_them) < 1e-5
    assert largest_difference(rows(sharded), rows(whole)) < 2e-4
    assert weights_difference(sharded, whole, but=decided_by_rounding) < ROUNDING
    ours, theirs = (load_lightning_checkpoint(checkpoint(each)) for each in (sharded, whole))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for state in (ours, theirs):
        [group] = state["optimizer_states"][0]["param_groups"]
        assert group["params"] == list(range(len(group["params"])))
    assert load_checkpoint(sharded / "run" / "checkpoints" / "run.nemo").state_dict.keys() == ours["state_dict"].keys()


@pytest.mark.slow
def test_srun_starts_the_processes_too_and_one_signal_stops_all(corpus: dict[str, Path], tmp_path: Path) -> None:
    scontrol = fake_scontrol(tmp_path / "bin", "exit 0")
    job = {
        "SLURM_JOB_ID": "815", "SLURM_JOB_NAME": "nest", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1",
        **scontrol,
    }  # fmt: skip
    tasks = [
        command(corpus, tmp_path, *TWO, "trainer.max_steps=900", **job, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in ("0", "1")
    ]
    wait_for_step(tmp_path, 2, tasks[0])
    tasks[1].send_signal(signal.SIGUSR1)
    outputs = [ended(task) for task in tasks]
    assert [task.returncode for task in tasks] == [143, 143], outputs
    assert "stopped by SIGUSR1: saved" in outputs[0]
    assert "queued again" in outputs[0]
    assert not outputs[1]
    assert (tmp_path / "bin" / "calls").read_text() == "requeue 815\n"
    assert checkpoint(tmp_path)
