"""A run that resumes with another configuration: which changes take effect, are reported or are refused."""

from pathlib import Path

import pytest
import torch
from runs import Listener, checkpoint, rows, train

from conftest import tiny_config
from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.config import load_config, resolved
from nestcli.errors import ConfigError
from nestcli.training.config_changes import Changes
from nestcli.training.find_checkpoint import _first_change
from nestcli.training.resume_callbacks import place_steps
from nestcli.training.run import Pretraining

FIRST = ("trainer.max_steps=2", "trainer.val_check_interval=2")
THEN = ("trainer.max_steps=4", "trainer.val_check_interval=2")


def noam(step: int, lr: float, warmup: int, floor: float = 1e-6, d_model: int = 16) -> float:
    share = lr * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
    return max(share, floor) if step > warmup else share


def test_changed_rate_decay_betas_and_schedule_take_effect_and_are_told(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    train(corpus, tmp_path, *FIRST)
    moments = load_lightning_checkpoint(checkpoint(tmp_path))["optimizer_states"][0]["state"]
    listener = Listener()
    words = (
        "model.optim.lr=0.7", "model.optim.weight_decay=0.5", "model.optim.betas=[0.8,0.9]",
        "model.optim.sched.warmup_steps=3", "model.optim.sched.min_lr=0.095",
    )  # fmt: skip
    train(corpus, tmp_path, *THEN, *words, listener=listener)
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(
        [noam(1, 0.1, 5), noam(1, 0.1, 5), noam(2, 0.7, 3), noam(3, 0.7, 3)]
    )
    state = load_lightning_checkpoint(checkpoint(tmp_path))
    [group] = state["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], group["betas"], group["initial_lr"]) == (0.5, (0.8, 0.9), 0.7)
    assert group["lr"] == pytest.approx(0.095)  # the floor: step 4 is beyond the warm-up
    assert state["lr_schedulers"][0]["min_lr"] == 0.095
    [steps] = {float(value["step"]) for value in state["optimizer_states"][0]["state"].values()}
    assert steps == 4  # the moments continued
    assert {float(value["step"]) for value in moments.values()} == {2}
    assert "model.optim.lr is 0.7, was 0.1" in listener.notes[0]
    assert "is kept as config-to-step-2.yaml" in listener.notes[0]
    assert listener.notes[1].startswith("The learning rate of step 3 is ")
    kept, now = (load_config(str(tmp_path / "run" / name)) for name in ("config-to-step-2.yaml", "config.yaml"))
    assert (kept.model.optim.lr, now.model.optim.lr, kept.trainer.max_steps) == (0.1, 0.7, 2)


def test_the_same_values_change_nothing_and_say_nothing(corpus: dict[str, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path / "whole", "trainer.max_steps=4", "trainer.val_check_interval=2")
    train(corpus, tmp_path, *FIRST)
    listener = Listener()
    train(corpus, tmp_path, *THEN, listener=listener)
    assert not listener.notes
    ours, theirs = (load_lightning_checkpoint(checkpoint(each)) for each in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert ours["optimizer_states"][0]["param_groups"] == theirs["optimizer_states"][0]["param_groups"]
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]


def test_a_share_of_the_steps_as_warm_up_follows_their_number(corpus: dict[str, Path], tmp_path: Path) -> None:
    ratio = ("model.optim.sched.warmup_steps=null", "model.optim.sched.warmup_ratio=0.5")
    train(corpus, tmp_path, "trainer.max_steps=4", "trainer.val_check_interval=2", *ratio)
    listener = Listener()
    train(corpus, tmp_path, "trainer.max_steps=12", "trainer.val_check_interval=2", *ratio, listener=listener)
    assert rows(tmp_path)[4]["lr"] == pytest.approx(noam(4, 0.1, 6))
    [note] = listener.notes
    assert note.startswith("The learning rate of step 5 is 0.0068; ")


@pytest.mark.parametrize(
    "word",
    [
        "model.encoder.xscaling=false",  # no shape tells
        "model.encoder.att_context_size=[8,8]",
        "model.preprocessor.window_stride=0.02",
        "model.preprocessor.normalize=all_features",
        "model.masking.mask_value=0.0",
    ],
)
def test_what_makes_another_model_is_refused_with_the_way_out(
    corpus: dict[str, Path], tmp_path: Path, word: str
) -> None:
    if not (shared := tmp_path.parent / "begun" / "run").is_dir():
        train(corpus, shared.parent, *FIRST)
    before = (shared / "config.yaml").read_text()
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}=.*a different model.*exp_manager\.name.*init_from_ptl_ckpt=.*-last"):
        train(corpus, shared.parent, *THEN, word)
    assert (shared / "config.yaml").read_text() == before


def test_every_key_that_may_change_is_told_or_goes_without_saying(corpus: dict[str, Path]) -> None:
    then = tiny_config(corpus)
    told: list[str] = []
    for word in (
        "model.masking.mask_prob=0.2", "model.encoder.dropout=0.3", "model.train_ds.batch_size=2", "seed=5",
        "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "model.loss.mask_threshold=0.5",
        "exp_manager.checkpoint_callback_params.monitor=train_loss", "nest.max_bad_steps=3",
    ):  # fmt: skip
        changes = Changes.of(resolved(then), tiny_config(corpus, word), 7)
        changes.check(Path("a/checkpoints/b.ckpt"))
        before = len(told)
        changes.announce(told.append)
        assert len(told) > before, word
    assert "seed is 5, was 0" in " ".join(told)
    quiet: list[str] = []
    for word in ("trainer.max_steps=9", "model.train_ds.num_workers=2", "trainer.devices=2", "seed=0",
                 "model.encoder.compile=false", "nest.max_bad_steps=10"):  # fmt: skip
        Changes.of(resolved(then), tiny_config(corpus, word), 7).announce(quiet.append)
    assert not quiet


def test_a_smaller_save_top_k_removes_the_surplus(corpus: dict[str, Path], tmp_path: Path) -> None:
    key = "exp_manager.checkpoint_callback_params.save_top_k"
    each = "trainer.val_check_interval=1"
    train(corpus, tmp_path, "trainer.max_steps=3", each, f"{key}=3")
    train(corpus, tmp_path, "trainer.max_steps=4", each, f"{key}=1")
    best = [path for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt") if "-last" not in path.name]
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path)}
    [kept] = best
    assert kept.name.endswith(f"-step={min(losses, key=lambda step: losses[step])}.ckpt")


def test_weights_that_a_run_began_with_stay_in_its_configuration(corpus: dict[str, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path / "first", *FIRST)
    start = str(tmp_path / "first" / "run" / "checkpoints" / "run.nemo")
    train(corpus, tmp_path, *FIRST, f"init_from_nemo={start}")
    listener = Listener()
    train(corpus, tmp_path, *THEN, f"init_from_ptl_ckpt={checkpoint(tmp_path / 'first')}", listener=listener)
    config = load_config(str(tmp_path / "run" / "config.yaml"))
    assert (config.init_from_nemo, config.get("init_from_ptl_ckpt")) == (start, None)


def test_a_dry_run_says_what_would_change_and_writes_nothing(corpus: dict[str, Path], tmp_path: Path) -> None:
    train(corpus, tmp_path, *FIRST)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    words = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run", *THEN, "model.optim.lr=0.7")
    listener = Listener()
    Pretraining(tiny_config(corpus, *words), listener).dry_run()
    assert "model.optim.lr is 0.7, was 0.1" in listener.notes[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_counts_of_steps_lie_where_the_new_options_want_them(fused: bool, device: str) -> None:
    weight = torch.nn.Parameter(torch.empty(2, device="meta"))  # as on a GPU
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight]["step"] = torch.tensor(3.0)
    optimizer.param_groups[0]["fused"] = fused
    place_steps(optimizer)
    assert optimizer.state[weight]["step"].device.type == device


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["model.mask_position=post_conv"], "model.mask_position is pre_conv there and post_conv here"),
        (
            ["model.preprocessor.features=40", "model.preprocessor.dither=0.1"],
            "model.preprocessor.features is 80 there and 40 here",
        ),
    ],
)
def test_another_shape_names_the_key_that_makes_it(corpus: dict[str, Path], words: list[str], key: str) -> None:
    former = resolved(tiny_config(corpus))
    assert _first_change(former, tiny_config(corpus, *words)) == key
