"""The configuration's keys for data sets, weights and buckets, and the errors in them."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import tiny_config
from nestcli.config import section
from nestcli.data.batch_plan import BatchPlan
from nestcli.data.corpus import Corpus, DatasetConfig, read_corpus
from nestcli.data.sampler import plan_batches
from nestcli.errors import ConfigError, DataError

KEY = "model.train_ds"


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Manifests of 8, 4 and 2 lines that last 2, 4 and 8 s."""
    paths = []
    for number, (count, seconds) in enumerate(((8, 2.0), (4, 4.0), (2, 8.0))):
        path = tmp_path / f"{number}.json"
        rows = ({"audio_filepath": f"/{number}/{line}.wav", "duration": seconds} for line in range(count))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths


def open_corpus(corpus: dict[str, Path], *words: str) -> tuple[Corpus, BatchPlan]:
    config = tiny_config(corpus, *(f"{KEY}.{word}" for word in words))
    read = read_corpus(config, KEY)
    return read, plan_batches(read, section(DatasetConfig, config, KEY), KEY, seed=1)


def batches(plan: BatchPlan, epoch: int = 0) -> list[list[int]]:
    made = plan.batches(epoch)
    return [made[number].tolist() for number in range(len(made))]


def test_lists_and_commas_make_one_data_set(corpus, three):
    for paths in (",".join(three), f"[{','.join(three)}]"):
        read, _ = open_corpus(corpus, f"manifest_filepath={paths}")
        assert (len(read.speech), read.n_parts, read.weights) == (14, 1, None)


def test_concat_draws_by_temperature(corpus, three):
    words = (f"manifest_filepath=[{','.join(three)}]", "is_concat=true", "batch_size=1", "drop_last=false")
    read, plan = open_corpus(corpus, *words, "concat_sampling_temperature=1000")
    assert read.n_parts == 3
    counts = np.zeros(3)
    for epoch in range(60):
        items = np.concatenate([plan.batches(epoch)[number] for number in range(14)]) % 14
        counts += np.bincount(read.part_of[items], minlength=3)
    assert counts / counts.sum() == pytest.approx([1 / 3] * 3, abs=0.05)


def test_concat_takes_turns_or_given_shares(corpus, three):
    words = (f"manifest_filepath=[{','.join(three)}]", "is_concat=true", "batch_size=1", "concat_shuffle=false")
    read, plan = open_corpus(corpus, *words, "concat_sampling_technique=round-robin")
    assert [int(read.part_of[batch[0] % 14]) for batch in batches(plan)] == [0, 1, 2] * 4 + [0, 1]
    shares = "concat_sampling_probabilities=[0,0,1]"
    read, plan = open_corpus(corpus, *words, "concat_sampling_technique=random", shares, "concat_sampling_scale=2")
    assert {int(read.part_of[batch[0] % 14]) for batch in batches(plan)} == {2}
    assert len(batches(plan)) == 28


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("concat_sampling_probabilities=[0.5,0.6]", "do not add up to 1"),
        ("concat_sampling_technique=best", "not one of temperature, random, round-robin"),
        ("concat_sampling_temperature=0", "must be from 0.05"),
        ("bucketing_strategy=any", "not one of fixed_order"),
        ("batch_size=0", "must be from 1 to"),
        ("batch_size=null", "null is not a number"),
        ("num_workers=-1", "must be from 0 to 4,096"),
        ("max_failed_share=2", "must be from 0 to 1"),
        ("trim_silence=true", "Trim the files beforehand"),
        ("bucket_batch_size=[1,2]", "one size from 1 on for each"),
        ("bucket_duration_bins=[4,2]", "rising order"),
        ("bucketing_weights=[0]", "0 must be from 1 to"),
        ("is_tarred=true", "tarred_audio_filepaths is not set"),
    ],
)
def test_wrong_values_are_named(corpus, words, message):
    with pytest.raises(ConfigError, match=message):
        open_corpus(corpus, words)


def test_shares_for_another_number_of_data_sets(corpus, three):
    words = (f"manifest_filepath=[{','.join(three)}]", "is_concat=true", "concat_sampling_technique=random")
    with pytest.raises(ConfigError, match="2 numbers for 3 data sets"):
        open_corpus(corpus, *words, "concat_sampling_probabilities=[0.5,0.5]")


def test_a_data_set_without_usable_lines(corpus, three):
    with pytest.raises(DataError, match="data set 3 of 3 has no utterance"):
        open_corpus(corpus, f"manifest_filepath=[{','.join(three)}]", "is_concat=true", "max_duration=5")


# ---- NeMo's buckets


def nested(paths: list[str]) -> str:
    return f"manifest_filepath=[{','.join(f'[{path}]' for path in paths)}]"


def test_nested_lists_are_buckets(corpus, three):
    read, plan = open_corpus(corpus, nested(three), "batch_size=1", "bucketing_batch_size=2", "drop_last=false")
    assert read.in_buckets
    sizes = {int(read.part_of[batch[0]]): len(batch) for batch in reversed(batches(plan))}
    assert sizes == {0: 6, 1: 4, 2: 2}
    assert sorted(item for batch in batches(plan) for item in batch) == list(range(14))
    read, plan = open_corpus(corpus, nested(three), "bucketing_batch_size=[4,2,1]", "bucketing_strategy=fixed_order")
    assert [len(batch) for batch in batches(plan)] == [4, 4, 2, 2, 1, 1]


def test_weights_repeat_buckets(corpus, three):
    read, plan = open_corpus(corpus, nested(three), "bucketing_weights=[1,1,3]", "bucketing_batch_size=1")
    assert np.bincount(read.part_of).tolist() == [8, 4, 6]
    # NeMo counts the repeated buckets when it scales: 5, 4, 3
    assert [limits.size for limits in plan.limits] == [5, 4, 3]
    with pytest.raises(ConfigError, match="2 weights for 3 buckets"):
        open_corpus(corpus, nested(three), "bucketing_weights=[1,1]")
    with pytest.raises(ConfigError, match="one size from 1 on for each of 3"):
        open_corpus(corpus, nested(three), "bucketing_batch_size=[1,1]")


# ---- Lhotse


def test_dynamic_batches_of_lhotse(corpus, three):
    words = (",".join(three), "use_lhotse=true", "batch_size=null", "batch_duration=16")
    _, plan = open_corpus(corpus, f"manifest_filepath={words[0]}", *words[1:])
    assert len(plan.limits) == 1
    made = batches(plan)
    assert sorted(item for batch in made for item in batch) == list(range(14))
    assert all(len(batch) * plan.durations[batch].max() <= 16 for batch in made)
    _, plan = open_corpus(corpus, f"manifest_filepath={words[0]}", *words[1:], "num_buckets=3")
    assert len(plan.limits) > 1
    assert plan.padding_waste() == 0
    _, plan = open_corpus(corpus, f"manifest_filepath={words[0]}", *words[1:], "num_buckets=3", "use_bucketing=false")
    assert len(plan.limits) == 1


def test_fixed_batches_per_bin(corpus, three):
    read, plan = open_corpus(
        corpus, f"manifest_filepath={','.join(three)}", "use_lhotse=true", "batch_size=null",
        "bucket_duration_bins=[2.0,4.0]", "bucket_batch_size=[4,2]",
    )  # fmt: skip
    assert read.left_out == 2  # longer than the last bin
    assert sorted(len(batch) for batch in batches(plan)) == [2, 2, 4, 4]
    assert plan.padding_waste() == 0


def test_weighted_lists_and_input_cfg(corpus, three, tmp_path):
    words = ("use_lhotse=true", "batch_size=2")
    read, _ = open_corpus(corpus, f"manifest_filepath=[[{three[0]},0.25],[{three[1]},0.75]]", *words)
    assert read.weights == (0.25, 0.75)
    inner = (
        f"{{type: lhotse, cuts_path: {three[1]}, weight: 1}}, {{type: nemo, manifest_filepath: {three[2]}, weight: 3}}"
    )
    group = f"{{type: group, weight: 0.5, input_cfg: [{inner}]}}"
    entries = f"[{{type: nemo, manifest_filepath: {three[0]}, weight: 0.5}}, {group}]"
    read, plan = open_corpus(corpus, f"input_cfg={entries}", *words)
    assert read.weights == pytest.approx((0.5, 0.125, 0.375))
    assert plan.order.mixing is not None
    (tmp_path / "input.yaml").write_text(entries)
    read, _ = open_corpus(corpus, f"input_cfg={tmp_path / 'input.yaml'}", *words, "reweight_temperature=0")
    assert read.weights == pytest.approx((0.5, 0.25, 0.25))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[{type: txt, paths: a}]", "'txt' is not one of nemo"),
        ("[{type: nemo}]", "lacks manifest_filepath"),
        ("[]", "must be a list of data sets"),
        ("nowhere.yaml", "nowhere.yaml: cannot be read"),
        ("[{type: nemo, manifest_filepath: a, weight: 0}]", "must be above 0"),
    ],
)
def test_a_wrong_input_cfg_is_named(corpus, entries, message):
    with pytest.raises(ConfigError, match=message):
        open_corpus(corpus, f"input_cfg={entries}", "use_lhotse=true")
