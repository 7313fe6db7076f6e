"""Problems that can be known before training are refused or reported then; --dry-run says the same."""

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import TINY_RUN, tiny_config
from nestcli.cli.app import app
from nestcli.data import preflight
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.preflight import available_memory, check_noise, check_speech, look_for_files, machine_notes
from nestcli.errors import DataError, NestError
from nestcli.training.run import Pretraining
from training.test_run import Recorder


def manifest_of(rows: list[dict[str, object]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(manifest: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def without(manifest: Path, gone: int, path: Path) -> Path:
    """Write a manifest whose first few files are missing."""
    rows = rows_of(manifest)
    for row in rows[:gone]:
        row["audio_filepath"] = f"moved/{Path(str(row['audio_filepath'])).name}"
    return manifest_of(rows, path)


@pytest.fixture
def noise_of_twenty(corpus: dict[str, Path], tmp_path: Path) -> Path:
    return manifest_of(rows_of(corpus["noise"])[:1] * 20, tmp_path / "twenty.json")


def refused(corpus: dict[str, Path], folder: Path, *overrides: str) -> str:
    """Return the message that refuses a run and its dry run, and check that nothing is written."""
    words = [f"model.train_ds.noise_manifest={corpus['noise']}", f"model.train_ds.manifest_filepath={corpus['train']}"]
    words += [f"model.validation_ds.manifest_filepath={corpus['val']}", f"exp_manager.exp_dir={folder / 'runs'}"]
    message = ""
    for option in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["pretrain", "small", *TINY_RUN, *words, *overrides, *option])
        assert isinstance(result.exception, NestError), result.output
        assert result.exception.exit_code == 2
        assert message in ("", str(result.exception))
        message = str(result.exception)
        assert not (folder / "runs").exists()
    return message


def test_noise_that_is_gone(corpus: dict[str, Path], tmp_path: Path) -> None:
    noise = without(corpus["noise"], 3, tmp_path / "n.json")
    message = refused(corpus, tmp_path, f"model.train_ds.noise_manifest={noise}")
    assert message.startswith(
        "model.train_ds.noise_manifest: 3 of 3 files are not there, or may not be read; the first"
    )
    assert f"moved/0.wav ({noise}, line 1). If the audio was moved, run `nest prepare-data`" in message
    assert message.endswith("Set model.train_ds.noise_manifest=null to train without noise.")


def test_one_of_three_noises_is_gone(corpus: dict[str, Path], tmp_path: Path) -> None:
    noise = without(corpus["noise"], 1, tmp_path / "n.json")
    assert "1 of 3 files" in refused(corpus, tmp_path, f"model.train_ds.noise_manifest={noise}")


def test_noise_without_a_manifest_or_lines(corpus: dict[str, Path], tmp_path: Path) -> None:
    assert "nowhere.json" in refused(corpus, tmp_path, "model.train_ds.noise_manifest=nowhere.json")
    empty = manifest_of([], tmp_path / "empty.json")
    assert "empty.json has no lines" in refused(corpus, tmp_path, f"model.train_ds.noise_manifest={empty}")


def test_noise_of_validation_is_gone(corpus: dict[str, Path], tmp_path: Path) -> None:
    noise = without(corpus["noise"], 3, tmp_path / "n.json")
    message = refused(corpus, tmp_path, f"model.validation_ds.noise_manifest={noise}")
    assert message.startswith("model.validation_ds.noise_manifest: 3 of 3")


@pytest.mark.parametrize(("key", "name", "count"), [("train_ds", "train", 12), ("validation_ds", "val", 3)])
def test_speech_that_is_gone(corpus: dict[str, Path], tmp_path: Path, key: str, name: str, count: int) -> None:
    speech = without(corpus[name], count, tmp_path / "s.json")
    message = refused(corpus, tmp_path, f"model.{key}.manifest_filepath={speech}")
    assert message.startswith(f"model.{key}: {count} of {count} files are not there")
    assert f"moved/0.wav ({speech}, line 1)" in message
    assert f"Paths in {speech} are absolute, or relative to its folder." in message


def test_tars_that_are_gone(corpus: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "audio_filepath": "x.wav", "shard_id": 0} for row in rows_of(corpus["train"])]
    speech = manifest_of(rows, tmp_path / "s.json")
    message = refused(
        corpus, tmp_path, f"model.train_ds.manifest_filepath={speech}", "model.train_ds.is_tarred=true",
        f"model.train_ds.tarred_audio_filepaths={tmp_path}/audio_0.tar",
    )  # fmt: skip
    assert f"{tmp_path}/audio_0.tar: x.wav" in message


def test_a_little_noise_that_is_gone_is_told(corpus: dict[str, Path], tmp_path: Path, noise_of_twenty: Path) -> None:
    noise = without(noise_of_twenty, 2, tmp_path / "n.json")
    recorder = Recorder()
    words = [f"model.train_ds.noise_manifest={noise}", f"exp_manager.exp_dir={tmp_path}"]
    Pretraining(tiny_config(corpus, *words), recorder)
    [note] = recorder.notes
    assert note.startswith("model.train_ds.noise_manifest: 2 of 20 files are not there")
    assert note.endswith("Other noise is taken instead.")
    three = without(noise_of_twenty, 3, tmp_path / "n.json")
    with pytest.raises(DataError, match="3 of 20"):
        Pretraining(tiny_config(corpus, *words), recorder)
    assert check_noise(read_manifests(str(three)), "k", 0.2) is not None
    assert check_noise(read_manifests(str(noise_of_twenty)), "k", 0.0) is None


def test_speech_is_judged_by_the_share_that_a_run_allows(corpus: dict[str, Path], tmp_path: Path) -> None:
    many = manifest_of(rows_of(corpus["train"]) * 20, tmp_path / "many.json")  # 240 lines
    check_speech(read_manifests(str(without(many, 24, tmp_path / "s.json"))), "k", 0.1)
    with pytest.raises(DataError, match="25 of 240"):
        check_speech(read_manifests(str(without(many, 25, tmp_path / "s.json"))), "k", 0.1)
    check_speech(read_manifests(str(without(corpus["train"], 6, tmp_path / "s.json"))), "k", 0.1)  # few: one in two
    with pytest.raises(DataError, match="7 of 12"):
        check_speech(read_manifests(str(without(corpus["train"], 7, tmp_path / "s.json"))), "k", 0.1)


def test_of_a_long_manifest_some_lines_are_looked_at(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_SAMPLE", 120)
    many = manifest_of(rows_of(corpus["train"]) * 50, tmp_path / "many.json")  # 600 lines
    found = look_for_files(read_manifests(str(without(many, 600, tmp_path / "s.json"))), 120)
    assert (found.total, found.looked, found.missing) == (600, 120, 120)
    check_speech(read_manifests(str(without(many, 66, tmp_path / "s.json"))), "k", 0.1)  # 11%: may be chance
    with pytest.raises(DataError, match="of 120 that were looked for"):
        check_speech(read_manifests(str(without(many, 150, tmp_path / "s.json"))), "k", 0.1)


def test_remote_files_are_not_asked_for(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "s3://bucket/0.wav", "duration": 1.2}]
    assert look_for_files(read_manifests(str(manifest_of(rows, tmp_path / "n.json"))), 10).missing == 0


def test_looking_is_fast(corpus: dict[str, Path], tmp_path: Path) -> None:
    many = read_manifests(str(manifest_of(rows_of(corpus["noise"])[:1] * 10_000, tmp_path / "many.json")))
    start = time.process_time()
    assert check_noise(many, "k", 0.1) is None
    assert time.process_time() - start < 5  # 0.4 s on an idle machine


def test_what_the_machine_lacks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "available_cores", lambda: 4)
    monkeypatch.setattr(preflight, "available_memory", lambda: 3 << 30)
    assert machine_notes("k", 4, 3 << 30, 1) == []
    [cores] = machine_notes("k", 5, 0, 1)
    assert cores == "k.num_workers=5 are more than the 4 processor cores that there are to use; 4 are started"
    [cores, memory] = machine_notes("k", 3, 2 << 30, 2)
    assert "k.num_workers=3 for each of 2 training processes" in cores
    assert "may need 4.0 GiB for its batches, and 3.0 GiB of memory are free" in memory
    monkeypatch.setattr(preflight, "available_memory", lambda: None)
    assert machine_notes("k", 1, 1 << 60, 1) == []


def test_the_memory_that_is_left_is_known() -> None:
    memory = available_memory()
    assert memory is None or 0 < memory < 1 << 50
