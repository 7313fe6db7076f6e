"""Waits of the host for a GPU in whole training steps, counted on a processor."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from runs import Listener

from conftest import tiny_config
from nestcli.model import fast, quantizer
from nestcli.training.run import Pretraining
from waiting import Waits

ON_THE_HOST = ["_local_scalar_dense", *["lift_fresh"] * 6]  # the seed of the draws; two logged numbers, four lengths


@pytest.mark.parametrize("words", [[], ["trainer.gradient_clip_val=1.0", "nest.explode_factor=2.0"]])
def test_a_step_without_a_line_waits_once(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """The forward pass learns how many tokens are selected. The guard's numbers arrive in the next step."""
    for module in (fast, quantizer):
        monkeypatch.setattr(module, "on_a_gpu", lambda _: True)
    unlogged = ["trainer.max_steps=6", "trainer.log_every_n_steps=100", "trainer.val_check_interval=6"]
    config = tiny_config(corpus, f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run", *unlogged, *words)
    run = Pretraining(config, Listener())
    step, begins, waits = run.module.training_step, [], Waits()

    def recorded(batch: Any, batch_idx: int) -> Any:
        begins.append(len(waits.found))
        return step(batch, batch_idx)

    monkeypatch.setattr(run.module, "training_step", recorded)
    with waits:
        run.fit()
    for begin, end in pairwise(begins[1:]):  # the first step also makes the state of the optimiser
        assert sorted(waits.found[begin:end]) == sorted([*ON_THE_HOST, "nonzero"])
