"""A run resumes from the newest intact checkpoint, whatever happened to the others, and survives full disks."""

import json
import os
import random
import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from runs import Listener

from conftest import tiny_config
from nestcli import files
from nestcli.checkpoint.lightning import AtomicCheckpointIO, load_lightning_checkpoint
from nestcli.errors import CheckpointError, ConfigError, RunFailedError
from nestcli.files import held_alone
from nestcli.training.find_checkpoint import Resume, find_resume
from nestcli.training.resume_callbacks import SameResume
from nestcli.training.run import Pretraining, RunResult
from nestcli.training.run_folder import disk_explained, needed_bytes

Moves = tuple[Path, DictConfig, torch.nn.Module]


def train(corpus: dict[str, Path], folder: Path, *overrides: str) -> tuple[RunResult, list[str]]:
    reporter = Listener()
    words = (f"exp_manager.exp_dir={folder}", "exp_manager.name=run", "trainer.val_check_interval=2", *overrides)
    return Pretraining(tiny_config(corpus, *words), reporter).fit(), reporter.notes


@pytest.fixture(scope="module")
def finished(corpus: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 steps: last checkpoints of 4 and 6, and the best."""
    folder = tmp_path_factory.mktemp("finished")
    train(corpus, folder, "trainer.max_steps=6")
    return folder / "run"


@pytest.fixture
def run(corpus: dict[str, Path], finished: Path, tmp_path: Path) -> Moves:
    """Return a copy of that folder, its configuration, and its model."""
    shutil.copytree(finished, tmp_path / "run")
    config = tiny_config(corpus, f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run")
    return tmp_path / "run", config, Pretraining(config, Listener()).module.model


def at(folder: Path, step: int, last: bool = True) -> list[Path]:
    return list((folder / "checkpoints").glob(f"*-step={step}{'-last' if last else ''}.ckpt"))


def only_lasts(folder: Path) -> tuple[Path, Path]:
    for path in (folder / "checkpoints").glob("*.ckpt"):
        if "-last" not in path.name:
            path.unlink()
    [before], [newest] = at(folder, 4), at(folder, 6)
    return before, newest


def damage(path: Path, *, keep: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def test_the_newest_is_that_of_most_steps_not_the_youngest_file(run: Moves) -> None:
    folder, config, model = run
    before, newest = only_lasts(folder)
    os.utime(before)
    assert find_resume(folder, config, model) == Resume(newest, 6)
    plain = newest.rename(newest.with_name("renamed.ckpt"))  # by content then
    assert find_resume(folder, config, model) == Resume(plain, 6)


def test_twenty_cuts_and_twenty_flipped_bits_are_passed_over(run: Moves) -> None:
    folder, config, model = run
    before, newest = only_lasts(folder)
    data, draw = newest.read_bytes(), random.Random(3)
    for number in range(40):
        changed = bytearray(data)
        if number < 20:
            del changed[draw.randrange(len(data)) :]
        else:
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        newest.write_bytes(changed)
        found = find_resume(folder, config, model)
        assert (found.path, found.step) == (before, 4)
        assert [skipped.path for skipped in found.skipped if skipped.damaged] == [newest]
    newest.write_bytes(data)
    assert find_resume(folder, config, model).path == newest


def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_as_if_it_were_not(
    corpus: dict[str, Path], run: Moves, tmp_path: Path
) -> None:
    folder, *_ = run
    whole, _ = train(corpus, tmp_path / "whole", "trainer.max_steps=8")
    for path in (*at(folder, 6), *at(folder, 6, last=False)):
        damage(path)
    before = {path.name for path in (folder / "checkpoints").iterdir()}
    config = tiny_config(corpus, f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run")
    reporter = Listener()
    Pretraining(config, reporter).dry_run()
    assert (
        "-step=6-last.ckpt is damaged: it is cut off, or more data follows its end. The run resumes"
        in reporter.notes[0]
    )
    assert reporter.notes[0].endswith("-step=4-last.ckpt, step 4. It will be set aside.")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == before

    result, notes = train(corpus, tmp_path, "trainer.max_steps=8")
    assert notes[0].endswith("-step=6-last.ckpt.damaged.")
    [kept] = (folder / "checkpoints").glob("*-step=6-last.ckpt.damaged")
    assert kept.stat().st_size == 1000
    ours, theirs = ([json.loads(line) for line in each.metrics.read_text().splitlines()] for each in (result, whole))
    assert [(row["step"], row["train_loss"]) for row in ours] == [(row["step"], row["train_loss"]) for row in theirs]
    assert result.last is not None
    assert whole.last is not None
    ours, theirs = (load_lightning_checkpoint(each.last)["state_dict"] for each in (result, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_that_was_set_aside_before_is_not_overwritten(run: Moves) -> None:
    folder, config, model = run
    _, newest = only_lasts(folder)
    old = newest.with_name(f"{newest.name}.damaged")
    old.write_text("older")
    damage(newest)
    find_resume(folder, config, model).set_aside(print)
    assert old.read_text() == "older"
    assert newest.with_name(f"{newest.name}.damaged-2").stat().st_size == 1000


def test_a_run_without_any_whole_checkpoint_does_not_start_from_zero(corpus: dict[str, Path], run: Moves) -> None:
    folder, *_ = run
    for path in (folder / "checkpoints").glob("*.ckpt"):
        damage(path)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"cannot resume from any.*step=6-last.*cut off.*exp_manager\.name"):
            train(corpus, folder.parent, "trainer.max_steps=8")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == names
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.rename(f"{path}.damaged")
    with pytest.raises(CheckpointError, match="Only damaged ones are left"):
        train(corpus, folder.parent, "trainer.max_steps=8")


def test_a_best_checkpoint_serves_where_no_last_one_does(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ("trainer.val_check_interval=1", "exp_manager.checkpoint_callback_params.save_top_k=-1")
    train(corpus, tmp_path, "trainer.max_steps=3", *words)
    for step in (2, 3):
        [last] = at(tmp_path / "run", step)
        damage(last)
    result, notes = train(corpus, tmp_path, "trainer.max_steps=4", *words)
    assert "The run resumes from" in notes[0]
    assert notes[0].count("-step=3.ckpt, step 3.") == 1
    assert result.step == 4


def test_checkpoints_of_another_kind_are_left_alone(run: Moves) -> None:
    folder, config, model = run
    before, newest = only_lasts(folder)
    content = load_lightning_checkpoint(newest)
    weights = {key: content[key] for key in ("state_dict", "global_step")}
    AtomicCheckpointIO().save_checkpoint(weights, newest)
    foreign = newest.with_name("x-step=9.ckpt")
    torch.save({"state_dict": Path(), "global_step": 9}, foreign)  # a class of somebody's
    found = find_resume(folder, config, model)
    assert found.path == before
    assert [(skipped.path, skipped.damaged) for skipped in found.skipped] == [(foreign, False), (newest, False)]
    found.set_aside(print)
    assert foreign.is_file()
    assert newest.is_file()
    before.unlink()
    with pytest.raises(CheckpointError, match=r"it holds weights without the state of training.*init_from_ptl_ckpt"):
        find_resume(folder, config, model)


def test_a_checkpoint_of_an_older_version_is_resumed(corpus: dict[str, Path], run: Moves, tmp_path: Path) -> None:
    folder, *_ = run
    _, newest = only_lasts(folder)
    torch.save(torch.load(newest, weights_only=True), newest)  # no digest
    result, notes = train(corpus, tmp_path, "trainer.max_steps=7")
    assert result.step == 7
    assert not notes


def test_a_run_that_was_moved_knows_its_best_model(corpus: dict[str, Path], run: Moves, tmp_path: Path) -> None:
    folder, *_ = run
    bests = {path.name for path in (folder / "checkpoints").glob("*.ckpt") if "-last" not in path.name}
    result, _ = train(corpus, tmp_path, "trainer.max_steps=8")
    assert result.best is not None
    assert result.best.parent == folder / "checkpoints"
    left = {path.name for path in (folder / "checkpoints").glob("*.ckpt") if "-last" not in path.name}
    assert left == {result.best.name}
    assert len(bests) == 1


def test_a_run_that_has_no_checkpoint_yet_says_that_it_starts_again(corpus: dict[str, Path], tmp_path: Path) -> None:
    _, notes = train(corpus, tmp_path, "trainer.max_steps=1")
    assert not notes
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / ".metrics.jsonl.77.tmp").touch()
    _, notes = train(corpus, tmp_path, "trainer.max_steps=1")
    assert notes == [f"{tmp_path / 'run'} holds no checkpoint yet: the run starts from the beginning."]
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_last_checkpoint_is_written_where_validation_finds_no_better_model(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    worse = ("trainer.val_check_interval=1", "model.optim.lr=40.0")
    train(corpus, tmp_path, "trainer.max_steps=5", *worse)
    assert at(tmp_path / "run", 4)  # not the end of training
    assert not at(tmp_path / "run", 4, last=False)
    assert len(list((tmp_path / "run" / "checkpoints").glob("*-last.ckpt"))) == 2


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["filename=same", "save_last=link"], {"same.ckpt", "same-step=2-last.ckpt", "same-step=3-last.ckpt"}),
        (
            ["filename=a-{step}-x", "auto_insert_metric_name=false", "save_top_k=0"],
            {"a-2-x-step=2-last.ckpt", "a-3-x-step=3-last.ckpt"},
        ),
    ],
)
def test_names_of_last_checkpoints_tell_the_step(
    corpus: dict[str, Path], tmp_path: Path, words: list[str], names: set[str]
) -> None:
    options = [f"+exp_manager.checkpoint_callback_params.{word}" for word in words]
    train(corpus, tmp_path, "trainer.max_steps=3", "trainer.val_check_interval=1", *options)
    found = set((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert {path.name for path in found} == names
    assert not any(path.is_symlink() for path in found)


def test_processes_that_find_different_checkpoints_do_not_start(tmp_path: Path) -> None:
    class Strategy:
        def broadcast(self, _: Any) -> Any:
            return ("a-step=6-last.ckpt", 6)

    trainer = namedtuple("Trainer", "strategy global_rank")(Strategy(), 1)
    SameResume(Resume(tmp_path / "a-step=6-last.ckpt", 6)).setup(trainer, None, "fit")
    with pytest.raises(CheckpointError, match=r"process 1 finds no checkpoint.*a-step=6-last\.ckpt.*share"):
        SameResume(Resume()).setup(trainer, None, "fit")


# ---- the disk ----


def test_a_disk_with_too_little_room_is_refused_before_training(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("nestcli.training.run_folder.shutil.disk_usage", lambda _: usage(9, 8, 300_000))
    with pytest.raises(ConfigError, match=r"the checkpoints need 1\.\d MB, and 0\.3 MB are free.*exp_manager\.exp_dir"):
        train(corpus, tmp_path, "trainer.max_steps=1")
    config = tiny_config(corpus, f"exp_manager.exp_dir={tmp_path}")
    with pytest.raises(ConfigError, match=r"save_top_k"):
        Pretraining(config, Listener()).dry_run()
    assert not list(tmp_path.rglob("*.ckpt"))
    monkeypatch.undo()
    train(corpus, tmp_path, "trainer.max_steps=4")
    monkeypatch.setattr("nestcli.training.run_folder.shutil.disk_usage", lambda _: usage(9, 8, 700_000))
    result, _ = train(corpus, tmp_path, "trainer.max_steps=5")  # what is there will be replaced
    assert result.step == 5


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("run/x.ckpt", r"run/x\.ckpt cannot be written: No space left"),
        (None, r"a file in run cannot be written: No space left"),
    ],
)
def test_a_full_disk_is_named_behind_the_errors_that_follow(name: str | None, said: str) -> None:
    follows = RuntimeError("what follows from it")
    follows.__context__ = OSError(28, "No space left on device", name)
    with pytest.raises(RunFailedError, match=said), disk_explained(Path("run")):
        raise follows


def test_the_room_that_checkpoints_need_is_what_they_take(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run", "trainer.max_steps=5")
    run = Pretraining(tiny_config(corpus, *words, "trainer.val_check_interval=2"), Listener())
    checkpoints = run.checkpoint_callback()
    assert checkpoints is not None
    needed = needed_bytes(run.folder, checkpoints, run.module.model)
    run.fit()
    sizes = [path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(sizes) == 4
    assert 0.5 * sum(sizes) < needed < 2 * sum(sizes)


@pytest.mark.parametrize("blocked", ["a/file/below", "run/checkpoints"])
def test_a_folder_that_cannot_be_written_is_refused(corpus: dict[str, Path], tmp_path: Path, blocked: str) -> None:
    name = "run" if blocked.startswith("run") else "file/below"
    path = tmp_path / "a" / "file" if name == "file/below" else tmp_path / "a" / blocked
    path.parent.mkdir(parents=True)
    path.write_text("in the way")
    config = tiny_config(corpus, f"exp_manager.exp_dir={tmp_path / 'a'}", f"exp_manager.name={name}")
    for action in (Pretraining(config, Listener()).dry_run, Pretraining(config, Listener()).fit):
        with pytest.raises(ConfigError, match=r"the experiment's folder .* Set exp_manager\.exp_dir"):
            action()


def test_a_file_that_the_disk_refuses_stops_the_run_which_goes_on_later(
    corpus: dict[str, Path], run: Moves, tmp_path: Path
) -> None:
    folder, *_ = run
    whole, _ = train(corpus, tmp_path / "whole", "trainer.max_steps=8")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, hard))  # the kernel's refusal in the midst of a file
    try:
        with pytest.raises(
            RunFailedError, match=r"\.ckpt cannot be written: File too large.*give the same command again"
        ) as raised:
            train(corpus, tmp_path, "trainer.max_steps=8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.exit_code == 1
    assert not list((folder / "checkpoints").glob(".*"))
    result, _ = train(corpus, tmp_path, "trainer.max_steps=8")
    ours, theirs = ([json.loads(line) for line in each.metrics.read_text().splitlines()] for each in (result, whole))
    assert [(row["step"], row["train_loss"]) for row in ours] == [(row["step"], row["train_loss"]) for row in theirs]


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.nemo", "config.yaml"])
def test_other_files_that_the_disk_refuses_do_not_destroy_the_run(
    corpus: dict[str, Path], run: Moves, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = run
    old = next(folder.rglob(name)).read_bytes()

    class Refused(files._Watched):
        def __init__(self, path: Path, mode: str) -> None:
            if name in path.name:
                raise OSError(28, "No space left on device", str(path))
            super().__init__(path, mode)

    def descriptor(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).endswith(name) and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(28, "No space left on device", str(path))
        return opens(path, flags, *args, **options)

    opens = os.open
    monkeypatch.setattr("nestcli.files.os.open", descriptor)
    monkeypatch.setattr(files, "_Watched", Refused)
    with pytest.raises((RunFailedError, ConfigError), match=rf"{name} cannot be written: No space left") as raised:
        train(corpus, tmp_path, "trainer.max_steps=9", "trainer.max_time=01:00:00:00")
    assert raised.value.exit_code == 1
    monkeypatch.undo()
    assert next(folder.rglob(name)).read_bytes() == old
    result, _ = train(corpus, tmp_path, "trainer.max_steps=9", "trainer.max_time=01:00:00:00")
    assert result.step == 9
    rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))


# ---- two runs at once ----


def test_a_folder_belongs_to_one_run_at_a_time(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestcli.training.run._PATIENCE", 0.2)
    words = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run", "trainer.max_steps=2")
    first, second = (Pretraining(tiny_config(corpus, *words), Listener()) for _ in range(2))
    (tmp_path / "run").mkdir()
    with held_alone(tmp_path / "run", ConfigError("")), pytest.raises(ConfigError, match="another run of nest is tra"):
        second.fit()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]
    assert first.fit().step == 2
    with pytest.raises(ConfigError, match=r"then give the same command again"):  # it knows nothing of the first one's
        second.fit()
    train(corpus, tmp_path, "trainer.max_steps=3")
