"""Checkpoint names state the known values; all processes decide together what is written."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import Listener, checkpoint, train
from torch.multiprocessing import get_context

from nestcli.checkpoint.load import load_checkpoint
from nestcli.training.checkpoints import NestCheckpoint, _is_finite, step_in_name, without_unknown


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("run--{val_loss:.3f}-{step}", "run--{step}"),
        ("run--{val_loss:.3f}-{step}-last", "run--{step}-last"),
        ("run-{step}-{val_loss:.3f}", "run-{step}"),
        ("loss={val_loss:.3f}_{step}", "{step}"),
        ("{val_loss}", "{step}"),
        ("run-{epoch:03d}", "run-{epoch:03d}"),
    ],
)
def test_a_value_that_is_not_known_has_no_part_in_a_name(template: str, name: str) -> None:
    assert without_unknown(template, ["step", "epoch"]) == name


def test_a_checkpoint_before_the_first_validation_claims_no_loss(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ("exp_manager.checkpoint_callback_params.every_n_train_steps=1", "trainer.val_check_interval=3")
    train(corpus, tmp_path, "trainer.max_steps=2", *words)
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")]
    assert {step_in_name(Path(name)) for name in names} == {1, 2}
    assert not any("val_loss" in name or "inf" in name for name in names)
    newest = checkpoint(tmp_path)
    old = newest.with_name(newest.name.replace("step=", "val_loss=inf-step="))  # as they were named
    newest.rename(old)
    listener = Listener()
    result = train(corpus, tmp_path, "trainer.max_steps=5", *words, listener=listener)
    assert result.step == 5
    assert not listener.notes
    assert result.best is not None
    assert re.search(r"--val_loss=\d\.\d+-step=[345]\.ckpt$", result.best.name)


@pytest.mark.parametrize(("mode", "worst"), [("min", torch.inf), ("max", -torch.inf)])
def test_an_unknown_value_is_the_worst_one(tmp_path: Path, mode: str, worst: float) -> None:
    callback = NestCheckpoint(tmp_path, "a--{val_loss:.3f}-{step}", monitor="val_loss", mode=mode)
    assert float(callback._unknown) == worst
    known = {"val_loss": torch.tensor(torch.inf), "step": torch.tensor(3)}
    assert callback.format_checkpoint_name(known).endswith("a--val_loss=inf-step=3.ckpt")  # where it is the truth
    unknown = {"val_loss": callback._unknown, "step": torch.tensor(3)}
    assert callback.format_checkpoint_name(unknown).endswith("a--step=3.ckpt")


def test_several_best_models_have_several_names(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ("filename=model", "save_top_k=-1", "save_last=false")
    options = [f"exp_manager.checkpoint_callback_params.{word}" for word in words]
    train(corpus, tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=1", *options)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")}
    assert names == {"model-step=1.ckpt", "model-step=2.ckpt"}
    assert NestCheckpoint(tmp_path, "model", monitor="val_loss", save_top_k=1).filename == "model"


def test_the_best_model_may_be_that_of_the_last_batch(corpus: dict[str, Path], tmp_path: Path) -> None:
    """Lightning defers a checkpoint that is due on the last batch until validation, which may never follow."""
    words = ("monitor=train_loss", "every_n_train_steps=3", "save_top_k=-1", "filename=model")
    options = [f"exp_manager.checkpoint_callback_params.{word}" for word in words]
    result = train(corpus, tmp_path, "trainer.max_steps=3", "trainer.val_check_interval=2", *options)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")}
    assert names == {"model-step=3.ckpt", "model-step=3-last.ckpt"}
    assert result.best is not None


def test_a_run_without_a_block_for_validation_keeps_its_model(corpus: dict[str, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path, "trainer.max_steps=1", "trainer.val_check_interval=1")
    listener = Listener()
    words = ("trainer.max_steps=2", "trainer.val_check_interval=1", "model.validation_ds=null")
    result = train(corpus, tmp_path, *words, listener=listener)
    assert (result.step, result.val_loss) == (2, None)
    assert result.nemo is not None
    assert load_checkpoint(result.nemo).config.model.encoder.d_model == 16
    assert "changes from step 2 on: model.validation_ds is null, was a block of keys. The previous" in listener.notes[0]


def test_processes_compare_by_the_mean_of_what_each_has_logged(tmp_path: Path) -> None:
    logged = {name: torch.tensor(1.0) for name in ("train_loss", "masked_accuracy", "val_loss")}
    means = SimpleNamespace(reduce=lambda value, reduce_op: {"mean": value + 0.5}[reduce_op])
    trainer = SimpleNamespace(callback_metrics=logged, current_epoch=0, global_step=3, strategy=means)
    callback = NestCheckpoint(tmp_path, "a-{train_loss:.2f}", monitor="train_loss")
    found = callback._monitor_candidates(trainer)  # type: ignore[arg-type]
    assert (float(found["train_loss"]), float(found["masked_accuracy"]), float(found["val_loss"])) == (1.5, 1.5, 1.0)


def _decide(rank: int, store: str, answers: object) -> None:
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.BatchNorm1d(2)
    if rank == 1:
        assert model.running_var is not None
        model.running_var[0] = torch.nan  # a statistic that the processes do not share
    strategy = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2)
    strategy.model = model
    strategy.cluster_environment = LightningEnvironment()
    strategy.cluster_environment.set_world_size(2)
    strategy._lightning_module = model  # type: ignore[assignment]
    trainer = SimpleNamespace(lightning_module=model, strategy=strategy)
    answers.put((rank, _is_finite(trainer)))  # type: ignore[attr-defined, arg-type]
    torch.distributed.destroy_process_group()


def test_weights_are_finite_where_they_are_in_all_processes(tmp_path: Path) -> None:
    context = get_context("fork")
    answers = context.SimpleQueue()
    processes = [context.Process(target=_decide, args=(rank, tmp_path / "store", answers)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(answers.get() for _ in range(2)) == [(0, False), (1, False)]
