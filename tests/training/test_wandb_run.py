"""A resumed run continues the W&B run that it began."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger
from runs import train

from conftest import tiny_config
from nestcli.errors import ConfigError
from nestcli.training.loggers import ID_FILE, keep_wandb_id, make_loggers, wandb_options

WANDB = "exp_manager.create_wandb_logger=true"


def given(corpus: dict[str, Path], *options: str) -> Any:
    return tiny_config(corpus, WANDB, *(f"exp_manager.wandb_logger_kwargs.{option}" for option in options))


@pytest.fixture(autouse=True)
def _no_id_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def test_the_id_is_drawn_once_and_used_again(corpus: dict[str, Path], tmp_path: Path) -> None:
    assert "id" not in wandb_options(given(corpus), tmp_path)  # of a dry run, which writes nothing
    keep_wandb_id(given(corpus), tmp_path)
    drawn = (tmp_path / ID_FILE).read_text().strip()
    assert len(drawn) == 8
    keep_wandb_id(given(corpus), tmp_path)
    assert wandb_options(given(corpus), tmp_path)["id"] == drawn
    keep_wandb_id(given(corpus, "resume=never"), tmp_path)
    assert wandb_options(given(corpus), tmp_path)["id"] not in (drawn, None)


def test_the_users_id_goes_before_and_is_kept(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_wandb_id(given(corpus), tmp_path)
    mine = given(corpus, "id=mine", "resume=must")
    keep_wandb_id(mine, tmp_path)
    assert {**wandb_options(mine, tmp_path)} == {"name": None, "project": None, "id": "mine", "resume": "must"}
    assert wandb_options(given(corpus), tmp_path)["id"] == "mine"
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-job")
    keep_wandb_id(given(corpus), tmp_path)
    assert "id" not in wandb_options(given(corpus), tmp_path)  # W&B reads the variable itself
    monkeypatch.delenv("WANDB_RUN_ID")
    assert wandb_options(given(corpus), tmp_path)["id"] == "of-the-job"


@pytest.mark.parametrize("text", ["", "a b", "../x", "x" * 200])
def test_a_file_without_an_id_is_named(corpus: dict[str, Path], tmp_path: Path, text: str) -> None:
    (tmp_path / ID_FILE).write_text(text)
    with pytest.raises(ConfigError, match=rf"{ID_FILE} does not hold the id"):
        keep_wandb_id(given(corpus), tmp_path)


def test_runs_without_wandb_keep_no_id(corpus: dict[str, Path], tmp_path: Path) -> None:
    keep_wandb_id(tiny_config(corpus), tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_parts_of_a_run_are_one_of_wandb(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (1, 2):
        train(corpus, tmp_path, WANDB, f"trainer.max_steps={steps}", "trainer.val_check_interval=1")
        wandb.finish()
    ids = [path.name.rsplit("-", 1)[1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert ids
    assert set(ids) == {(tmp_path / "run" / ID_FILE).read_text().strip()}
    [logger] = [each for each in make_loggers(given(corpus), tmp_path / "run") if isinstance(each, WandbLogger)]
    assert logger._id == ids[0]
