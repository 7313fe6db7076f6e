"""Sides, orders and batches: for any sizes, seeds and processes, every utterance appears once, where it belongs."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuzz.strategies import any_text, bounded
from nestcli.data.batch_plan import BatchPlan, Limits, Mixing, Order, bucketed
from nestcli.data.sampler import OnePass, Position, ResumableSampler
from nestcli.model.config import MaskingConfig, QuantizerConfig
from nestcli.model.masking import RandomBlockMasking
from nestcli.model.quantizer import RandomProjectionQuantizer
from nestcli.prepare.split import for_validation

groups = st.lists(st.none() | any_text | st.sampled_from(["a", "b", "c"]), max_size=12)
shuffles: st.SearchStrategy[Literal["lines", "shards"] | None] = st.sampled_from([None, "lines", "shards"])
seeds = st.integers(0, 2**32)


@given(names=groups, more=groups, fraction=st.floats(0, 1))
@bounded(200)
def test_a_group_is_on_one_side(names: list[str | None], more: list[str | None], fraction: float) -> None:
    sides = for_validation(names, fraction)
    of_group = {name: {side for name_, side in zip(names, sides, strict=True) if name_ == name} for name in names}
    assert all(len(found) == 1 for found in of_group.values())
    assert of_group.get(None, {False}) == {False}
    known = set(names) - {None}
    if fraction > 0 and len(set(names)) > 1 and known:
        assert any(sides)
        assert not all(sides)
    if fraction == 0:
        assert not any(sides)
    # a corpus that grows keeps its sides, but for the one that was taken, or left, so that neither is empty
    grown = dict(zip(names + more, for_validation(names + more, fraction), strict=True))
    assert sum(grown[name] != side for name, side in dict(zip(names, sides, strict=True)).items()) <= 2


def plan_of(
    n: int, seed: int, shuffle: Literal["lines", "shards"] | None, size: int, buckets: int, together: int
) -> BatchPlan:
    rng = np.random.default_rng(n)
    durations = rng.uniform(0.5, 20, n)
    bins = tuple(np.linspace(0, 20, buckets + 1)[1:-1].tolist())
    order = Order(np.zeros(n, np.int16), rng.integers(-1, 4, n).astype(np.int32), shuffle, 1 + seed % 50, seed)
    limits = tuple(Limits(size + bucket, 40.0 if seed % 2 else None) for bucket in range(buckets))
    return BatchPlan(
        order,
        durations,
        limits,
        bucketed(durations, bins, upper_inclusive=True),
        sequence="shuffled buckets" if buckets > 1 else "filled",
        batches_per_step=together,
    )


plans = st.builds(plan_of, st.integers(1, 60), seeds, shuffles, st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))


@given(plan=plans, epoch=st.integers(0, 1000), before=st.integers(0, 9))
@bounded(150)
def test_every_utterance_is_in_an_epoch_once(plan: BatchPlan, epoch: int, before: int) -> None:
    n = len(plan.durations)
    assert sorted(plan.order.items(epoch).tolist()) == list(range(n))
    batches = plan.batches(epoch, before)
    held = [batches[number].tolist() for number in range(len(batches))]
    assert sorted(item for batch in held for item in batch) == list(range(n))
    for batch in held:
        [bucket] = set(plan.bucket_of[batch].tolist()) if len(plan.limits) > 1 else [0]
        limits = plan.limits[bucket]
        assert 0 < len(batch) <= (limits.size or n)
        assert limits.duration is None or len(batch) == 1 or len(batch) * plan.durations[batch].max() <= limits.duration


@given(plan=plans, ranks=st.integers(1, 4))
@bounded(80)
def test_processes_share_one_pass_out(plan: BatchPlan, ranks: int) -> None:
    shares = [list(OnePass(plan, ranks=ranks, rank=rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    counted = Counter(item for share in shares for place in share if place.counts for item in place.items.tolist())
    assert counted == Counter(range(len(plan.durations)))


@given(plan=plans, ranks=st.integers(1, 4), stop=st.integers(0, 12), later=st.integers(1, 4))
@bounded(80)
def test_a_run_goes_on_where_it_stopped_with_any_number_of_processes(
    plan: BatchPlan, ranks: int, stop: int, later: int
) -> None:
    """The batches of a run are one sequence: `ranks` processes, then other numbers, take the batches of one process."""

    def taken(start: Position, ranks: int, rounds: int) -> list[list[int]]:
        length = rounds + start.consumed // ranks
        samplers = [ResumableSampler(plan, length, lambda: start, ranks=ranks, rank=rank) for rank in range(ranks)]
        shares = [[place.items.tolist() for place in sampler] for sampler in samplers]
        return [share[number] for number in range(rounds) for share in shares]

    first = taken(Position(0, 0, 0), ranks, stop)
    alone = ResumableSampler(plan, stop * ranks + 8, lambda: Position(0, 0, 0))
    whole = [place.items.tolist() for place in alone]
    assert first == whole[: len(first)]
    seen = ResumableSampler(plan, stop * ranks, lambda: Position(0, 0, 0))
    list(seen)
    assert taken(seen.at(stop * ranks), later, 2) == whole[stop * ranks : stop * ranks + 2 * later]


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    length=st.integers(0, 60),
    seed=seeds,
    epoch=st.integers(0, 99),
    shuffle=shuffles,
    equal=st.booleans(),
)
@bounded(100)
def test_mixed_data_sets_are_gone_through_evenly(
    sizes: list[int], length: int, seed: int, epoch: int, shuffle: Literal["lines", "shards"] | None, equal: bool
) -> None:
    n = sum(sizes)
    part_of = np.repeat(np.arange(len(sizes)), sizes).astype(np.int16)
    mixing = Mixing(None if equal else tuple([1 / len(sizes)] * len(sizes)), length)
    items = Order(part_of, np.full(n, -1, np.int32), shuffle, 5, seed, mixing).items(epoch)
    assert len(items) == length == len(set(items.tolist()))
    for part in range(len(sizes)):
        times = np.bincount(items % n, minlength=n)[part_of == part]
        assert times.max() - times.min() <= 1


# ---- the model's own draws -------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(0, 120), min_size=1, max_size=4),
    block=st.integers(1, 40),
    prob=st.floats(0, 1),
    overlap=st.booleans(),
    seed=seeds,
    ratio=st.none() | st.floats(0.1, 1),
)
@bounded(100)
def test_padding_is_never_masked_and_the_rest_is_untouched(
    lengths: list[int], block: int, prob: float, overlap: bool, seed: int, ratio: float | None
) -> None:
    torch.manual_seed(seed)
    features, frames = torch.randn(len(lengths), 3, 120), torch.tensor(lengths)
    given_features = features.clone()
    masked, mask = RandomBlockMasking(MaskingConfig(3, block, prob, True, overlap, max_mask_ratio=ratio))(
        features, frames
    )
    mask = mask.bool()
    padding = torch.arange(120) >= frames[:, None]
    hidden = mask[:, None, :].expand_as(features) if mask.dim() == 2 else mask
    assert not (hidden & padding[:, None, :]).any()
    assert torch.equal(masked[~hidden], given_features[~hidden])


@given(batch=st.integers(1, 4), tokens=st.integers(0, 5), seed=seeds, books=st.integers(1, 3))
@bounded(50)
def test_tokens_of_a_batch_are_those_of_each_alone(batch: int, tokens: int, seed: int, books: int) -> None:
    torch.manual_seed(seed)
    quantizer = RandomProjectionQuantizer(QuantizerConfig(5, 4, books, 20, "l2", True, False, 8))
    features = torch.randn(batch, 5, 8 * tokens)
    together = quantizer(features)
    assert together.shape[:2] == (batch, tokens)
    assert torch.equal(together, torch.cat([quantizer(each[None]) for each in features]))
