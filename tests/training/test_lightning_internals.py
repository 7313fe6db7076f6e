"""Private names of Lightning and PyTorch: in one file, and in the installed versions."""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities import distributed
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import launchers

from nestcli import training
from nestcli.training import lightning_internals
from nestcli.training.lightning_internals import OpenModelCheckpoint

ROOM = Path(training.__file__).parent
INTERNALS = Path(lightning_internals.__file__)
VERSIONS = f"lightning {lightning.__version__}, torch {torch.__version__}"


@functools.cache
def trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


def schedule() -> object:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


OWNERS: dict[str, Callable[[], Any]] = {
    "_batches_that_stepped": lambda: trainer().fit_loop.epoch_loop,
    "_signal_connector": trainer,
    "_launcher": lambda: trainer().strategy,
    "_last_lr": schedule,
    "_foreach_copy_": lambda: torch,
    "_set_num_threads_if_needed": lambda: distributed,
    "_SubprocessScriptLauncher": lambda: launchers,
    "_call_children_scripts": lambda: launchers._SubprocessScriptLauncher,
    **dict.fromkeys(
        (
            "_save_checkpoint", "_save_topk_checkpoint", "_save_last_checkpoint", "_should_remove_checkpoint",
            "_monitor_candidates", "_every_n_epochs", "_should_save_on_train_epoch_end",
            "_should_skip_saving_checkpoint", "_defer_save_until_validation", "_last_global_step_saved",
        ),
        ModelCheckpoint,
    ),
}  # fmt: skip


def check_name(name: str, owner: object) -> None:
    if not hasattr(owner, name):
        where = owner.__name__ if hasattr(owner, "__name__") else type(owner).__name__
        pytest.fail(f"{where} has no {name} in {VERSIONS}; {INTERNALS.name} says why. Fix it or cap the version.")


def is_private(name: str) -> bool:
    return name.startswith("_") and name not in ("_", "_target_") and not name.startswith("__")  # Hydra's key


def private_names(path: Path) -> Iterator[str]:
    """Private names that a file takes from elsewhere: imported ones, attributes, keys; none that it defines itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("nestcli"):
            used |= {part for each in node.names for part in (*(node.module or "").split("."), each.name)}
        elif isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
        elif isinstance(node, ast.Subscript | ast.Call):  # x["_name"], getattr(x, "_name")
            words = node.args if isinstance(node, ast.Call) else [node.slice]
            used |= {word.value for word in words if isinstance(word, ast.Constant) and isinstance(word.value, str)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    overridden = {name for name in own if hasattr(ModelCheckpoint, name)}
    yield from sorted(name for name in used - (own - overridden) if is_private(name) and name.isidentifier())


@pytest.mark.parametrize("name", OWNERS)
def test_the_installed_versions_have_the_private_names(name: str) -> None:
    check_name(name, OWNERS[name]())


def test_a_name_that_is_gone_is_named() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"TrainingEpochLoop has no _gone in lightning 2.*internals.py says"
    ):
        check_name("_gone", trainer().fit_loop.epoch_loop)


def test_the_hooks_are_those_that_lightning_calls() -> None:
    """Every private method that we override is one of Lightning's: another name would never be called."""
    overridden = {name for name in vars(OpenModelCheckpoint) if is_private(name)}
    assert overridden == {name for name in overridden if name in vars(ModelCheckpoint)}
    assert hasattr(trainer()._signal_connector, "register_signal_handlers")


def test_every_private_name_of_the_file_is_looked_for() -> None:
    mine = {*private_names(INTERNALS)} - {"_defer_save_until_validation"}  # set there too
    assert mine == {*OWNERS} - {"_defer_save_until_validation"}


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_no_other_file_of_the_room_uses_private_names(path: Path) -> None:
    if path != INTERNALS:
        assert [name for name in private_names(path) if name != "_exit"] == []  # os._exit is documented


def test_a_private_name_is_found_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        "from torch._C import _a\nx._b()\ny['_c'] = 1\nself._d = 1\nself._d.go()\nclass _E: pass\ngetattr(x, '_f')\n"
    )
    assert [*private_names(path)] == ["_C", "_a", "_b", "_c", "_f"]
