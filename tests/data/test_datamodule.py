"""The loader: the plan, the same batches from any number of processes, and the messages for bad data."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_config, write_noise_wav
from nestcli.data import datamodule
from nestcli.data.batch_plan import BatchPlan, Limits, Order
from nestcli.data.datamodule import NestDataModule
from nestcli.data.dataset import NoiseBatch, SkipCounter, collate
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.sampler import OnePass, Position, ResumableSampler, plan_batches
from nestcli.data.utterance_audio import NoisePool, Skipped
from nestcli.errors import ConfigError, DataError, NestError


def plan_of(n_items: int, batch_size: int) -> BatchPlan:
    zeros = np.zeros(n_items, np.int16)
    order = Order(zeros, zeros.astype(np.int32) - 1, "lines", 50, 1)
    return BatchPlan(order, np.ones(n_items), (Limits(batch_size),), zeros)


def places(sampler: ResumableSampler) -> list[tuple[int, list[int]]]:
    return [(place.epoch, place.items.tolist()) for place in sampler]


@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 9, 10])
def test_the_sampler_goes_on_where_training_stands(consumed: int) -> None:
    plan = plan_of(16, 4)
    whole = ResumableSampler(plan, 10, lambda: Position(0, 0, 0))
    drawn = places(whole)
    assert [epoch for epoch, _ in drawn] == [0] * 4 + [1] * 4 + [2] * 2
    position = whole.at(consumed)
    assert position.consumed == consumed
    rest = ResumableSampler(plan, 10, lambda: position)
    assert places(rest) == drawn[consumed:]
    assert rest.at(10) == Position(10, 2, 2)


def test_a_position_is_told_while_the_sampler_is_ahead_of_it() -> None:
    sampler = ResumableSampler(plan_of(8, 4), 100, lambda: Position(0, 0, 0))
    ahead = iter(sampler)
    for _ in range(9):  # into the fifth epoch
        next(ahead)
    assert [sampler.at(consumed) for consumed in (1, 2, 5)] == [
        Position(1, 0, 1), Position(2, 1, 0), Position(5, 2, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("consumed", [0, 5, 6, 9])
def test_processes_take_turns_from_wherever_the_run_stands(ranks: int, consumed: int) -> None:
    plan = plan_of(16, 4)
    whole = ResumableSampler(plan, 24, lambda: Position(0, 0, 0))
    drawn = places(whole)
    start = whole.at(consumed)
    shares = [
        places(ResumableSampler(plan, 5 + 2, lambda: start, ranks=ranks, rank=rank, used=lambda: 2))
        for rank in range(ranks)
    ]
    assert [place for turn in zip(*shares, strict=True) for place in turn] == drawn[consumed : consumed + 5 * ranks]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_one_pass_gives_each_process_as_many_batches(ranks: int) -> None:
    plan = plan_of(16, 4)
    shares = [list(OnePass(plan, ranks=ranks, rank=rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = sorted(item for share in shares for place in share if place.counts for item in place.items.tolist())
    assert counted == list(range(16))
    assert sum(not place.counts for share in shares for place in share) == -4 % ranks


def batches(corpus: dict[str, Path], *overrides: str) -> list[NoiseBatch]:
    loaded = list(NestDataModule(tiny_config(corpus, *overrides)).train_dataloader())
    assert all(isinstance(batch, NoiseBatch) for batch in loaded)
    return loaded


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(datamodule, "available_cores", lambda: 4)
    threads = torch.get_num_threads()
    alone = batches(corpus, "model.train_ds.batch_size=2")
    several = NestDataModule(
        tiny_config(corpus, "model.train_ds.batch_size=2", f"model.train_ds.num_workers={workers}")
    ).train_dataloader()
    assert several.num_workers == workers
    for ours, theirs in zip(several, alone, strict=True):
        for name in ("audio", "audio_len", "noise", "noise_len", "noisy_audio", "noisy_audio_len"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.sample_ids == theirs.sample_ids
    assert torch.get_num_threads() == threads


def test_another_seed_gives_other_batches(corpus: dict[str, Path]) -> None:
    assert batches(corpus, "seed=1")[0].sample_ids != batches(corpus, "seed=2")[0].sample_ids


def test_lengths_are_those_of_the_files_and_noise_is_mixed_in(corpus: dict[str, Path]) -> None:
    manifest = read_manifests(str(corpus["train"]))
    loaded = batches(corpus, "model.train_ds.batch_augmentor.prob=1.0")
    for batch in loaded:
        for item, length in zip(batch.sample_ids, batch.audio_len, strict=True):
            assert int(length) == int(manifest.durations[item] * 16000)
        assert torch.equal(batch.noisy_audio_len, batch.audio_len)
        assert (batch.noisy_audio != batch.audio).any(dim=1).all()
    assert sorted(item for batch in loaded for item in batch.sample_ids) == list(range(12))


def test_without_an_augmentor_noise_is_added_as_it_is(corpus: dict[str, Path]) -> None:
    batch = batches(corpus, "model.train_ds.batch_augmentor=null")[0]
    pool = NoisePool(read_manifests(str(corpus["noise"])), 16000)
    for item, row, clean in zip(batch.sample_ids, batch.noisy_audio, batch.audio, strict=True):
        length = int(batch.audio_len[batch.sample_ids.index(item)])
        noise = pool.draw(length, random.Random(f"0/noise/0/{item}")).samples
        assert torch.equal(row[: len(noise)], clean[: len(noise)] + torch.from_numpy(noise))
    clean = batches(corpus, "model.train_ds.batch_augmentor=null", "model.train_ds.noise_manifest=null")[0]
    assert torch.equal(clean.noisy_audio, clean.audio)


def test_a_clip_that_is_a_little_shorter_than_it_says_is_repeated_to_a_second(
    tmp_path: Path, corpus: dict[str, Path]
) -> None:
    write_noise_wav(tmp_path / "short.wav", 0.96, 1)
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"audio_filepath": "short.wav", "duration": 1.1}) + "\n")
    [batch] = batches(
        corpus, f"model.train_ds.manifest_filepath={manifest}", "model.train_ds.batch_size=1",
        "model.train_ds.noise_manifest=null",
    )  # fmt: skip
    assert batch.audio_len.tolist() == [16000]
    assert torch.equal(batch.audio[0, :640], batch.audio[0, 15360:])


def test_collating_cuts_and_pads_noise_to_the_longest_speech() -> None:
    ones = [np.ones(count, np.float32) for count in (5, 3)]
    batch = collate(ones, [np.ones(9, np.float32), np.ones(2, np.float32)], [4, 7])
    assert batch.audio.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch.noise.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.noise_len.tolist() == [5, 2]


def test_noise_stays_inside_its_line_and_silence_becomes_white_noise(tmp_path: Path) -> None:
    import soundfile as sf

    ramp = np.linspace(0.1, 0.9, 160000).astype(np.float32)
    sf.write(tmp_path / "ramp.wav", ramp, 16000, subtype="FLOAT")
    sf.write(tmp_path / "silent.wav", np.zeros(160000, np.float32), 16000)
    line = {"audio_filepath": "ramp.wav", "duration": 2.0, "offset": 5.0}
    (tmp_path / "ramp.json").write_text(json.dumps(line) + "\n")
    pool = NoisePool(read_manifests(str(tmp_path / "ramp.json")), 16000)
    for seed in range(20):
        clip = pool.draw(8000, random.Random(seed)).samples
        assert len(clip) == 8000
        assert ramp[80000] <= clip.min() <= clip.max() <= ramp[112000 - 1]
    assert len(pool.draw(64000, random.Random(0)).samples) == 32000
    (tmp_path / "silent.json").write_text(json.dumps({"audio_filepath": "silent.wav", "duration": 10.0}) + "\n")
    part = pool.draw(8000, random.Random(3), keep=3000)
    assert np.array_equal(part.samples, pool.draw(8000, random.Random(3)).samples[:3000])
    assert part.offset == pool.draw(8000, random.Random(3)).offset
    white = NoisePool(read_manifests(str(tmp_path / "silent.json")), 16000).draw(8000, random.Random(0)).samples
    assert -91 < 20 * np.log10(white.std()) < -45


# ---- what a new user would meet


def test_a_manifest_that_is_not_there(corpus: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json"):
        NestDataModule(tiny_config(corpus, "model.train_ds.manifest_filepath=nowhere.json"))


def test_an_empty_manifest(corpus: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(DataError, match=r"empty\.json has no lines"):
        NestDataModule(tiny_config(corpus, f"model.train_ds.manifest_filepath={tmp_path / 'empty.json'}"))


def test_no_speech_long_enough(corpus: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"none of the 12 utterances lasts between 5 and 60 s \(theirs: 1.20 to 1.60"):
        NestDataModule(tiny_config(corpus, "model.train_ds.min_duration=5"))


def test_fewer_utterances_than_a_batch(corpus: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"Lower model\.train_ds\.batch_size"):
        NestDataModule(tiny_config(corpus, "model.train_ds.batch_size=13")).train_dataloader()


@pytest.fixture
def partly_rotten(corpus: dict[str, Path], tmp_path: Path) -> Path:
    """Write the training manifest; of its twelve files, one is broken and one is missing."""
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but not really")
    rows = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    rows[3]["audio_filepath"], rows[7]["audio_filepath"] = str(tmp_path / "broken.wav"), str(tmp_path / "gone.wav")
    manifest = tmp_path / "m.json"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_left_out_and_named(corpus: dict[str, Path], partly_rotten: Path, workers: int) -> None:
    whole = batches(corpus, "model.train_ds.drop_last=false")
    some = batches(corpus, f"model.train_ds.manifest_filepath={partly_rotten}", f"model.train_ds.num_workers={workers}")
    for ours, theirs in zip(some, whole, strict=True):
        assert ours.sample_ids == tuple(line for line in theirs.sample_ids if line not in (3, 7))
    skipped = sorted((each.line.rpartition(" ")[2], each.why) for batch in some for each in batch.skipped)
    assert [line for line, _ in skipped] == ["4", "8"]
    assert "broken.wav" in skipped[0][1]
    assert "gone.wav" in skipped[1][1]


def test_audio_that_is_shorter_than_was_promised_is_left_out_with_its_reason(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    write_noise_wav(tmp_path / "cut.wav", 2.0, 1)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:32044])
    write_noise_wav(tmp_path / "short.wav", 1.0, 2)
    for line, name in ((3, "cut.wav"), (7, "short.wav")):
        rows[line] = {"audio_filepath": str(tmp_path / name), "duration": 2.0}
    (tmp_path / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = batches(corpus, f"model.train_ds.manifest_filepath={tmp_path / 'm.json'}", "model.train_ds.drop_last=false")
    why = {each.line.rpartition(" ")[2]: each.why for batch in found for each in batch.skipped}
    assert sorted(why) == ["4", "8"]
    assert "the header declares 64000 bytes of audio, the file holds 32000" in why["4"]
    assert "the manifest promises 2.00 s from 0 s on, the file has 1.00 s there" in why["8"]


def test_what_is_left_out_is_told_once_and_counted(corpus: dict[str, Path], partly_rotten: Path) -> None:
    told: list[str] = []
    data = NestDataModule(tiny_config(corpus, f"model.train_ds.manifest_filepath={partly_rotten}"), told.append)
    for _ in range(3):
        for batch in data.train_dataloader():
            data.on_before_batch_transfer(batch, 0)
    assert (data.skipped.skipped, data.skipped.read) == (6, 30)
    assert len(told) == 2
    assert all("nest prepare-data" in message for message in told)


def test_a_batch_of_which_nothing_is_left_keeps_its_place(corpus: dict[str, Path], partly_rotten: Path) -> None:
    alone = batches(corpus, f"model.train_ds.manifest_filepath={partly_rotten}", "model.train_ds.batch_size=1")
    assert len(alone) == 12
    empty = [batch for batch in alone if batch.skipped]
    assert [batch.counts for batch in empty] == [False, False]
    assert {batch.sample_ids[0] for batch in empty} == {4, 8}  # the next lines stand in


def test_too_many_unreadable_files_stop_the_run() -> None:
    counter = SkipCounter(0.1, lambda message: None)
    rotten = tuple(Skipped(f"m.json, line {line}", f"{line}.wav: gone") for line in range(6))
    counter.add(40, rotten)  # 13%, but of few
    counter.add(54, ())
    with pytest.raises(DataError, match=r"12 of 106 utterances .*max_failed_share allows. The last: 5\.wav: gone"):
        counter.add(0, rotten)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_of_which_nothing_can_be_read(corpus: dict[str, Path], tmp_path: Path, workers: int) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but not really")
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"audio_filepath": "broken.wav", "duration": 1.5}) + "\n")
    data = NestDataModule(
        tiny_config(corpus, f"model.train_ds.manifest_filepath={manifest}", "model.train_ds.batch_size=1",
                    f"model.train_ds.num_workers={workers}")
    )  # fmt: skip
    [failed] = list(data.train_dataloader())
    assert isinstance(failed, NestError)
    with pytest.raises(DataError, match=r"none of 21 utterances.*broken\.wav.*nest prepare-data"):
        data.on_before_batch_transfer(failed, 0)


def test_noise_that_is_gone_is_passed_over_and_told(corpus: dict[str, Path], tmp_path: Path) -> None:
    rows = [*corpus["noise"].read_text().splitlines(), json.dumps({"audio_filepath": "gone.wav", "duration": 1.5})]
    (tmp_path / "n.json").write_text("\n".join(rows) + "\n")
    words = [f"model.train_ds.noise_manifest={tmp_path / 'n.json'}", "model.train_ds.batch_augmentor.prob=1"]
    loaded = batches(corpus, *words, "model.train_ds.batch_augmentor.noise_ratio=1")
    assert all((batch.noisy_audio != batch.audio).any(dim=1).all() for batch in loaded)
    assert {each.line.rpartition("/")[2] for batch in loaded for each in batch.skipped} == {"n.json, line 4"}


def test_noise_that_cannot_be_read(corpus: dict[str, Path], tmp_path: Path) -> None:
    manifest = tmp_path / "n.json"
    manifest.write_text(json.dumps({"audio_filepath": "gone.wav", "duration": 1.5}) + "\n")
    words = ["model.train_ds.batch_augmentor.prob=1", "model.train_ds.batch_augmentor.noise_ratio=1"]
    data = NestDataModule(tiny_config(corpus, f"model.train_ds.noise_manifest={manifest}", *words))
    failed = next(iter(data.train_dataloader()))
    assert isinstance(failed, DataError)
    assert "none of 20 noise files drawn can be read" in str(failed)


def test_a_manifest_must_be_given() -> None:
    from nestcli.config import load_config

    with pytest.raises(ConfigError, match=r"model\.train_ds\.manifest_filepath is not set"):
        NestDataModule(load_config("small"))


def test_the_start_of_a_run_makes_the_training_plan_once(corpus, monkeypatch) -> None:
    made = []

    def counted(read, settings, key, **options):
        made.append((key, options["batches_per_step"]))
        return plan_batches(read, settings, key, **options)

    monkeypatch.setattr(datamodule, "plan_batches", counted)
    data = NestDataModule(tiny_config(corpus, "model.train_ds.num_workers=0", "trainer.accumulate_grad_batches=2"))
    data.check_ready(ranks=1)
    data.train_plan().batches(0)
    next(iter(data.train_dataloader()))
    data.load_state_dict(data.state_dict())
    data.train_batch(0, 0)
    assert made == [("model.train_ds", 2)]
