"""`nest pretrain` as it is typed: train, resume, finish, count what is in the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import TINY_RUN


def nest(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from nestcli.cli.app import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def words(corpus: dict[str, Path]) -> list[str]:
    return [
        "pretrain", "small", *TINY_RUN, f"model.train_ds.manifest_filepath={corpus['train']}",
        f"model.validation_ds.manifest_filepath={corpus['val']}", f"model.train_ds.noise_manifest={corpus['noise']}",
        "exp_manager.name=try",
    ]  # fmt: skip


def test_train_resume_finish_count(words: list[str], tmp_path: Path) -> None:
    dry = nest(*words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "Everything is ready" in dry.stderr
    assert "tokens of 80 ms" in dry.stderr
    assert "same token after a shift of 5 ms" in dry.stderr
    assert not list(tmp_path.iterdir())

    first = nest(*words, "trainer.max_steps=3", "trainer.val_check_interval=2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "trained to step 3" in first.stderr
    assert "tokens of 80 ms" in first.stderr
    assert "Traceback" not in first.stderr
    assert "Warning" not in first.stderr

    second = nest(*words, "trainer.max_steps=4", "trainer.val_check_interval=2", cwd=tmp_path)
    assert "at step 3" in second.stderr
    assert "tokens of 80 ms" not in second.stderr  # its targets are those of the first
    assert "trained to step 4" in second.stderr
    leftover = tmp_path / "nest_experiments" / "try" / "checkpoints" / ".try.nemo.77.tmp"
    leftover.touch()  # of a kill in the very last write
    complete = nest(*words, "trainer.max_steps=4", "trainer.val_check_interval=2", cwd=tmp_path)
    assert "This run is complete: 4 of 4 steps" in complete.stderr
    assert not leftover.exists()

    folder = tmp_path / "nest_experiments" / "try"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    [last] = (folder / "checkpoints").glob("*-step=4-last.ckpt")
    counted = nest("count-params", str(last), "--json", cwd=tmp_path)
    assert json.loads(counted.stdout)["nemo"]["difference"] == 0
    further = nest("pretrain", str(last), "trainer.max_steps=5", cwd=tmp_path)  # a checkpoint carries its configuration
    assert "at step 4" in further.stderr
    assert "trained to step 5" in further.stderr


def test_unreadable_audio_ends_training_with_its_name(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"<html>not found</html>")
    row = json.dumps({"audio_filepath": "broken.wav", "duration": 2.0})
    (tmp_path / "m.json").write_text((row + "\n") * 4)
    done = nest(*words, "model.train_ds.manifest_filepath=m.json", "model.train_ds.num_workers=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "broken.wav" in done.stderr
    assert "prepare-data" in done.stderr
    assert "Traceback" not in done.stderr
