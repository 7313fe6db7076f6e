"""The check of the targets before training: sample, judgement, and a training that it does not touch."""

import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Listener, train

from conftest import tiny_config, write_noise_wav
from nestcli.config import load_config
from nestcli.data.datamodule import NestDataModule
from nestcli.model.target_statistics import TargetStatistics
from nestcli.training import target_check
from nestcli.training.monitor.metrics import TIMED
from nestcli.training.run import Pretraining
from nestcli.training.target_check import judgement, read_sample


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty utterances of 1 to 14 s."""
    folder, rows = tmp_path_factory.mktemp("many"), []
    for number in range(40):
        seconds = 1.0 + number % 14
        write_noise_wav(folder / f"{number}.wav", seconds, number)
        rows.append({"audio_filepath": f"{number}.wav", "duration": seconds})
    manifest = folder / "many.json"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def data_of(corpus: dict[str, Path], manifest: Path, *words: str) -> NestDataModule:
    return NestDataModule(tiny_config(corpus, f"model.train_ds.manifest_filepath={manifest}", *words))


def asked(data: NestDataModule, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    lines: list[int] = []
    read = data.readable_speech
    monkeypatch.setattr(data, "readable_speech", lambda wanted: lines.extend(wanted) or read(wanted))
    return lines


def test_a_sample_is_spread_over_the_data(corpus: dict[str, Path], many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(corpus, many)
    lines = asked(data, monkeypatch)
    audios = read_sample(data, 60.0, 60.0, remote=False)
    assert max(map(len, audios)) == 160_000  # ten seconds of each at most
    assert 40 <= sum(map(len, audios)) / 16_000 <= 80
    assert len(set(lines)) == len(lines) == len(audios)
    assert (min(lines), max(lines)) == (0, 39)
    assert max(np.diff(sorted(lines[: len(lines) // 2]))) < 20  # an early end leaves no half out
    everything = read_sample(data, 1e4, 60.0, remote=False)
    assert len(everything) == 40
    assert max(map(len, everything)) == 14 * 16_000  # few utterances are read as a whole


def test_reading_ends_when_its_time_is_over(
    corpus: dict[str, Path], many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(target_check.time, "monotonic", lambda: float(next(clock)))
    assert len(read_sample(data_of(corpus, many), 1e4, 3.5, remote=False)) == 4


# ---- judgement ----


def statistics(**changed: float) -> TargetStatistics:
    values = {
        "utterances": 55, "seconds": 300.0, "tokens": 3700, "token_seconds": 0.08, "n_books": 1, "n_codes": 8192,
        "perplexity": 650.0, "dead_codes": math.nan, "unigram_loss": 6.5, "stable_after_shift": 0.42,
        "stable_with_noise": 0.08, "explained": (0.56, 0.07, 0.0), "nearest_visible": 2.4,
        "explained_by_visible": 0.086,
    }  # fmt: skip
    return TargetStatistics(**{**values, **changed})  # type: ignore[arg-type]


def test_nemos_masks_are_judged_as_a_long_plateau_with_what_to_change() -> None:
    assert judgement(statistics(), load_config("small")) == (
        "Expect a long plateau at the loss of guessing by frequency: a hidden token is 2.4 tokens from the nearest "
        "visible frames on average, and the visible frames explain 9% of its target. To shorten it, use shorter blocks "
        "(model.masking.block_size=16 model.masking.mask_prob=0.025), shorter tokens "
        "(model.encoder.subsampling_factor=4), fewer codes (model.num_classes=256 model.num_books=4)."
    )


def test_settings_that_learn_are_not_to_be_changed() -> None:
    words = ["model.masking.block_size=16", "model.encoder.subsampling_factor=4", "model.num_classes=256"]
    config = load_config("small", words)
    good = judgement(statistics(explained_by_visible=0.247), config)
    assert good.startswith("Expect the loss to fall below guessing by frequency within a few hundred steps")
    many = judgement(statistics(explained_by_visible=0.247), load_config("small"))
    assert many.endswith(" (Runs that did had at most 1,024 codes; this one has 8,192.)")
    assert "(" not in good
    between = judgement(statistics(explained_by_visible=0.12), config)
    assert between.startswith("Expect a plateau of a hundred steps or more")
    assert "To shorten it" not in between  # nothing is left to name
    assert "too small" in judgement(statistics(explained_by_visible=math.nan), config)
    few = judgement(statistics(perplexity=2.1), config)
    assert few.startswith("The targets hold little: a perplexity of 2.1 codes in 3,700 tokens. Check the audio")
    moved = judgement(statistics(perplexity=2.1), load_config("small", ["model.mask_position=post_conv"]))
    assert "model.mask_position=pre_conv" in moved


def test_the_share_of_masked_frames_stays_with_shorter_blocks() -> None:
    config = load_config("small", ["model.masking.block_size=32", "model.masking.mask_prob=0.02"])
    [blocks, *_] = target_check.remedies(config)
    assert blocks.endswith("model.masking.mask_prob=0.04)")
    assert math.isclose(1 - (1 - 0.04) ** 16, 1 - (1 - 0.02) ** 32, abs_tol=0.01)


# ---- runs ----


def checked(corpus: dict[str, Path], folder: Path, *words: str) -> tuple[object, list[str]]:
    listener = Listener()
    run = Pretraining(tiny_config(corpus, f"exp_manager.exp_dir={folder}", "exp_manager.name=run", *words), listener)
    return run.check_targets(60.0), listener.notes


def test_tarred_data_gives_the_same_statistics(corpus: dict[str, Path], many: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "audio_0.tar", "w") as tar:
        for number in range(40):
            tar.add(many.parent / f"{number}.wav", f"{number}.wav")
    rows = [{**json.loads(line), "shard_id": 0} for line in many.read_text().splitlines()]
    manifest = tmp_path / "tarred.json"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loose, notes = checked(corpus, tmp_path / "a", f"model.train_ds.manifest_filepath={many}")
    tarred, _ = checked(
        corpus, tmp_path / "b", f"model.train_ds.manifest_filepath={manifest}", "model.train_ds.is_tarred=true",
        f"model.train_ds.tarred_audio_filepaths={tmp_path}/audio_0.tar",
    )  # fmt: skip
    assert isinstance(loose, target_check.TargetCheck)
    assert loose == tarred
    assert loose.statistics.seconds == sum(min(10.0, 1.0 + number % 14) for number in range(40))
    assert loose.statistics.explained_by_visible >= 0
    assert notes == []


def test_a_sample_that_cannot_be_read_is_one_note(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"audio_filepath": f"s3://bucket/{number}.wav", "duration": 2.0} for number in range(8)]
    (tmp_path / "remote.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, [note] = checked(corpus, tmp_path, f"model.train_ds.manifest_filepath={tmp_path}/remote.json")
    assert found is None
    assert note == "targets    not examined: the audio is remote; --dry-run reads it and examines them"

    for number in range(8):
        (tmp_path / f"{number}.wav").write_bytes(b"<html>")
    (tmp_path / "broken.json").write_text("".join(json.dumps(row) + "\n" for row in rows).replace("s3://bucket/", ""))
    found, [note] = checked(corpus, tmp_path, f"model.train_ds.manifest_filepath={tmp_path}/broken.json")
    assert found is None
    assert note == "targets    not examined: no audio of model.train_ds could be read within 60 s"

    monkeypatch.setattr(target_check, "target_statistics", lambda *_: 1 / 0)
    found, [note] = checked(corpus, tmp_path)
    assert found is None
    assert note == "targets    not examined: division by zero"


def test_a_training_is_the_same_with_and_without_the_check(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ["trainer.max_steps=3", "model.train_ds.num_workers=0"]
    torch.set_num_threads(1)
    lines = []
    for name in ("without", "with"):
        run = Pretraining(
            tiny_config(corpus, f"exp_manager.exp_dir={tmp_path / name}", "exp_manager.name=run", *words), Listener()
        )
        if name == "with":
            assert run.check_targets(60.0) is not None
        result = run.fit()
        rows = [json.loads(line) for line in result.metrics.read_text().splitlines()]
        lines.append([{key: row[key] for key in row if key not in TIMED} for row in rows])
        assert run.module.trainer.global_step == 3
    assert lines[0] == lines[1]


def test_a_resumed_run_and_other_processes_skip_the_check(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestcli.training.run.is_first_process", lambda: False)
    assert checked(corpus, tmp_path) == (None, [])
    monkeypatch.undo()
    train(corpus, tmp_path, "trainer.max_steps=1")
    assert checked(corpus, tmp_path, "trainer.max_steps=2") == (None, [])
