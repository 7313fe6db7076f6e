"""Orders of an epoch: every line once, near to its shards, and data sets in their shares."""

import numpy as np
import pytest

from nestcli.data.order import Mixing, Order, temperature_shares


def order(n=1000, *, parts=(), shards=(), shuffle="lines", window=50, seed=1, mixing=None) -> Order:
    return Order(
        part_of=np.array(parts or [0] * n, np.int16),
        shard_of=np.array(shards or [-1] * n, np.int32),
        shuffle=shuffle,
        window=window,
        seed=seed,
        mixing=mixing,
    )


def test_a_shuffled_epoch_has_every_line_once_and_epochs_differ():
    first, second = order().items(0), order().items(1)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, order().items(0))
    assert not np.array_equal(first, order(seed=2).items(0))


def test_without_shuffling_lines_come_as_they_stand():
    assert np.array_equal(order(shuffle=None).items(3), np.arange(1000))


def test_shards_are_read_a_few_at_a_time():
    shards = [line // 100 for line in range(1000)]
    items = order(shards=shards, shuffle="shards", window=50).items(0)
    assert sorted(items) == list(range(1000))
    read = np.array(shards)[items]
    for start in range(0, 1000, 50):
        assert len(set(read[start : start + 50].tolist())) <= 3
    assert not np.array_equal(read, np.sort(read))
    within = items[read == read[0]] % 100
    assert not np.array_equal(within, np.sort(within))


def test_loose_lines_among_shards_are_read_too():
    shards = [-1] * 10 + [0] * 10
    assert sorted(order(20, shards=shards, shuffle="shards").items(0)) == list(range(20))


def test_shares_hold_and_a_small_data_set_comes_again():
    parts = [0] * 900 + [1] * 100
    mixing = Mixing((0.5, 0.5), 1000)
    items = order(parts=parts, mixing=mixing).items(0)
    lines = items % 1000
    small = lines[lines >= 900]
    assert 430 < len(small) < 570
    passes = items[lines >= 900] // 1000
    assert passes.max() == (len(small) - 1) // 100
    for number in range(passes.max()):
        assert sorted(lines[(lines >= 900) & (items // 1000 == number)]) == list(range(900, 1000))
    assert len(np.unique(items)) == len(items)  # every repetition is an item of its own


def test_round_robin_takes_turns():
    items = order(6, parts=[0, 0, 0, 0, 1, 1], shuffle=None, mixing=Mixing(None, 6)).items(0)
    assert (items % 6).tolist() == [0, 4, 1, 5, 2, 4]


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [0.9, 0.1]), (1e9, [0.5, 0.5])])
def test_temperature(temperature, expected):
    assert temperature_shares([900, 100], temperature) == pytest.approx(expected)


def test_temperature_is_nemos_formula():
    sizes = np.array([3.0, 5.0, 20.0])
    weights = (sizes / sizes.sum()) ** (1 / 5)
    assert temperature_shares([3, 5, 20], 5) == pytest.approx((weights / weights.sum()).tolist())


def test_a_window_of_nothing_keeps_the_lines_of_a_shard_in_order():
    shards = [line // 5 for line in range(20)]
    items = order(20, shards=shards, shuffle="shards", window=0).items(0)
    assert sorted(items) == list(range(20))
    assert all((np.diff(five) == 1).all() for five in items.reshape(4, 5))
