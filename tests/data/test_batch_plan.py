"""Batches of an epoch: limits, buckets, ranks in step; Lhotse's own rules beside ours."""

from itertools import pairwise

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.cut import MonoCut
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets
from lhotse.testing.dummies import dummy_recording

from nestcli.data.batch_plan import BatchPlan, Limits, Mixing, Order, bucketed, duration_bins, temperature_shares


def plan(durations, limits=None, bucket_of=None, *, shuffle="lines", seed=1, mixing=None, shard_of=None, **options):
    durations = np.asarray(durations, np.float64)
    zeros = np.zeros(len(durations), np.int16)
    order = Order(zeros, zeros.astype(np.int32) - 1 if shard_of is None else shard_of, shuffle, 50, seed, mixing)
    limits = (Limits(4),) if limits is None else limits
    return BatchPlan(order, durations, limits, zeros if bucket_of is None else bucket_of, **options)


def all_batches(made, epoch=0):
    batches = made.batches(epoch)
    return [batches[number].tolist() for number in range(len(batches))]


def some_durations(count=500, seed=0):
    return np.round(np.random.default_rng(seed).gamma(2, 4, count) + 0.5, 3)


# ---- plain batches


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [None, "lines"])
def test_an_epoch_holds_every_item_once(together, shuffle):
    made = plan(np.ones(50), shuffle=shuffle, batches_per_step=together)
    assert sorted(item for batch in all_batches(made, 3) for item in batch) == list(range(50))


def test_plain_batches_follow_in_the_order_of_their_items():
    made = plan(np.ones(10), shuffle=None, batches_per_step=4)
    assert all_batches(made) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_dropping_the_last_batch_keeps_whole_ones_only():
    made = plan(np.ones(50), drop_last=True, batches_per_step=2)
    assert [len(batch) for batch in all_batches(made)] == [4] * 12


def test_epochs_differ_and_repeat():
    made = plan(np.ones(50))
    assert all_batches(made, 0) != all_batches(made, 1)
    assert all_batches(made, 1) == all_batches(plan(np.ones(50)), 1)


def test_nothing_is_left_of_too_few():
    assert all_batches(plan(np.ones(3), drop_last=True)) == []


# ---- limits in seconds


def reference_batches(durations, **limits):
    """Lhotse's constraint, item by item."""
    constraint = TimeConstraint(**limits)
    batches, batch = [], []
    for duration in durations:
        cut = MonoCut("c", 0, float(duration), 0, recording=dummy_recording(0, duration=float(duration)))
        constraint.add(cut)
        if batch and constraint.exceeded():
            batches.append(batch)
            constraint.reset()
            constraint.add(cut)
            batch = []
        batch.append(float(duration))
        if constraint.close_to_exceeding():
            batches.append(batch)
            constraint.reset()
            batch = []
    return [*batches, batch] if batch else batches


@pytest.mark.parametrize("quadratic", [None, 15.0])
@pytest.mark.parametrize("size", [None, 3])
def test_a_batch_is_as_full_as_lhotse_makes_it(quadratic, size):
    durations = some_durations(300)
    ends = Limits(size, 40.0, quadratic).ends(durations)
    ours = [durations[first:last].tolist() for first, last in zip([0, *ends[:-1]], ends, strict=True)]
    assert ours == reference_batches(durations, max_duration=40.0, quadratic_duration=quadratic, max_cuts=size)


def test_an_item_beyond_the_limit_is_a_batch_of_its_own():
    assert Limits(None, 10.0).ends(np.array([4.0, 30.0, 4.0, 4.0])) == [1, 2, 4]


def test_no_items_no_batches():
    assert Limits(None, 10.0).ends(np.zeros(0)) == []
    assert Limits(4).ends(np.zeros(0)) == []
    assert Limits(4).ends(np.zeros(8)) == [4, 8]


@pytest.mark.parametrize("limits", [Limits(7), Limits(None, 40.0), Limits(None, 40.0, 15.0), Limits(100_000, 900.0)])
@pytest.mark.parametrize("shortest", [0.0, 1.0])
def test_no_batch_is_larger_than_the_bound(limits, shortest):
    rng = np.random.default_rng(0)
    for durations in (rng.uniform(0.05, 20, 300), rng.uniform(0.05, 0.5, 300), np.ones(5)):
        repeated = np.maximum(durations, shortest)
        made = [batch for epoch in range(3) for batch in plan(durations, (limits,)).batches(epoch)]
        largest = max(len(batch) * repeated[batch].max() for batch in made)
        bound = plan(durations, (limits,)).largest_batch(shortest)
        assert largest <= bound <= max(2.2 * largest, 20 * 7)


def test_the_bound_of_data_that_are_drawn_again_and_again():
    order = Order(np.zeros(2, np.int16), np.full(2, -1, np.int32), None, 1, 0, Mixing((1.0,), 50))
    drawn = BatchPlan(order, np.array([0.5, 2.0]), (Limits(None, 60.0),), np.zeros(2, np.int16))
    largest = max(len(batch) * 2.0 for batch in drawn.batches(0))
    assert largest <= drawn.largest_batch(1.0) == 60.0


# ---- buckets


def test_bins_are_lhotses():
    durations = some_durations(2000)
    cuts = CutSet.from_cuts(
        MonoCut(str(number), 0, float(duration), 0, recording=dummy_recording(0, duration=float(duration)))
        for number, duration in enumerate(durations)
    )
    assert duration_bins(durations, 12) == estimate_duration_buckets(cuts, 12)


def bucket_plan(durations, n_buckets=8, **options):
    bins = duration_bins(durations, n_buckets)
    limits = (Limits(None, 60.0),) * (len(bins) + 1)
    return plan(durations, limits, bucketed(durations, bins, upper_inclusive=False), sequence="random", **options)


@pytest.mark.parametrize("together", [1, 2, 3, 200])
def test_buckets_hold_every_item_once_within_the_limit(together):
    durations = some_durations()
    made = bucket_plan(durations, batches_per_step=together)
    for before in (0, 1, 7):
        batches = [made.batches(2, before)[number].tolist() for number in range(len(made.batches(2, before)))]
        assert sorted(item for batch in batches for item in batch) == list(range(500))
        assert all(len(batch) * durations[batch].max() <= 60.0 for batch in batches)


def test_the_batches_of_almost_every_step_are_of_one_bucket():
    durations = some_durations(2000)
    made = bucket_plan(durations, batches_per_step=4)
    buckets = []
    for epoch in range(3):  # a step may begin in one epoch and end in the next
        batches = made.batches(epoch, len(buckets))
        buckets.extend(int(made.bucket_of[batches[number][0]]) for number in range(len(batches)))
    steps = [set(buckets[first : first + 4]) for first in range(0, len(buckets), 4)]
    assert sum(len(step) > 1 for step in steps) <= 3 * len(made.limits)
    assert len(steps) > 20 * len(made.limits)


def test_buckets_waste_less_than_plain_batches():
    durations = some_durations(2000)
    plain = plan(durations, (Limits(8),)).padding_waste()
    lengths = durations[plan(durations, (Limits(8),)).batches(0).items].reshape(-1, 8)
    assert plain == pytest.approx(1 - lengths.sum() / (8 * lengths.max(axis=1).sum()))
    assert bucket_plan(durations).padding_waste() < plain / 3


def test_steps_of_shards_follow_as_they_fill():
    durations = some_durations(2000)
    shard_of = np.repeat(np.arange(20), 100).astype(np.int32)
    made = plan(
        durations, (Limits(8), Limits(8)), bucketed(durations, [8.0], upper_inclusive=False),
        shuffle="shards", shard_of=shard_of, sequence="filled",
    )  # fmt: skip
    place = {item: number for number, item in enumerate(made.order.items(0).tolist())}
    filled = [max(place[item] for item in batch) for batch in all_batches(made)]
    assert filled == sorted(filled)


def test_nemos_strategies_go_bucket_by_bucket():
    bucket_of = np.repeat([0, 1, 2], 40).astype(np.int16)
    for sequence in ("buckets", "shuffled buckets"):
        made = plan(np.ones(120), (Limits(4),) * 3, bucket_of, sequence=sequence)
        seen = [int(bucket_of[batch[0]]) for batch in all_batches(made)]
        changes = sum(first != second for first, second in pairwise(seen))
        assert changes == 2
        assert sequence == "shuffled buckets" or seen == sorted(seen)
    orders = {
        tuple(dict.fromkeys(int(bucket_of[batch[0]]) for batch in all_batches(made, epoch))) for epoch in range(20)
    }
    assert len(orders) > 2


def test_mixed_data_may_be_bucketed():
    durations = some_durations()
    bins = duration_bins(durations, 4)
    order = Order(
        np.repeat([0, 1], 250).astype(np.int16), np.full(500, -1, np.int32), "lines", 50, 1, Mixing((0.9, 0.1), 500)
    )
    made = BatchPlan(
        order, durations, (Limits(None, 60.0),) * (len(bins) + 1), bucketed(durations, bins, upper_inclusive=False)
    )
    batches = all_batches(made)
    lines = [item % 500 for batch in batches for item in batch]
    assert len(lines) == 500
    assert 400 < sum(line < 250 for line in lines) < 490


# ---- changes


@pytest.mark.parametrize("change", ["durations", "seed", "limits"])
def test_the_fingerprint_changes_with_the_batches(change):
    durations = np.ones(50)
    before = plan(durations).fingerprint
    changed = {
        "durations": plan(np.append(durations, 1.0)),
        "seed": plan(durations, seed=2),
        "limits": plan(durations, (Limits(5),)),
    }[change]
    assert changed.fingerprint != before
    assert plan(durations).fingerprint == before


def test_the_fingerprint_changes_with_the_batches_of_a_step_only_where_there_are_buckets():
    assert plan(np.ones(50), batches_per_step=2).fingerprint == plan(np.ones(50)).fingerprint
    durations = some_durations()
    assert bucket_plan(durations, batches_per_step=2).fingerprint != bucket_plan(durations).fingerprint


# ---- the order of an epoch: every line once, near to its shards, and data sets in their shares


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
