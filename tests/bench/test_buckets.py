"""The section `buckets`: bins against Lhotse's, padding counted by hand, and the search for the largest batches."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_config
from nestcli.bench import trial
from nestcli.bench.buckets import (
    default_buckets,
    estimate_bins,
    padding_of_buckets,
    padding_of_plain,
)
from nestcli.bench.context import BenchContext, Options
from nestcli.bench.fit import Trials, buckets_section
from nestcli.bench.largest import Search, Trial
from nestcli.bench.trial import is_out_of_memory
from nestcli.config import load_config
from nestcli.conversation import DiedError
from nestcli.data.batch_plan import bucketed
from nestcli.errors import RunFailedError

# ---- bins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "buckets"), [(30, 2), (400, 7), (3_000, 30), (50, 50)])
@pytest.mark.parametrize("seed", [0, 1])
def test_bins_beside_those_of_lhotse(count: int, buckets: int, seed: int) -> None:
    from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

    durations = np.round(np.random.default_rng(seed).gamma(3, 3, count) + 0.3, 3)
    theirs = estimate_duration_buckets([SimpleNamespace(duration=float(value)) for value in durations], buckets)
    ours = estimate_bins(durations, buckets)
    assert ours == pytest.approx(sorted({*theirs, durations.max()}), abs=1e-9)
    assert len(ours) <= buckets


def test_bins_hold_the_same_time() -> None:
    durations = np.random.default_rng(0).uniform(1, 20, 20_000)
    bins = estimate_bins(durations, 10)
    in_bin = np.bincount(bucketed(durations, bins, upper_inclusive=True), weights=durations)
    assert len(in_bin) == len(bins) == 10
    assert in_bin.max() / in_bin.min() < 1.02


def test_every_utterance_has_a_bin() -> None:
    durations = np.array([1.00004, 3.14159265, 3.0, 2.0])
    bins = estimate_bins(durations, 3)
    assert bins[-1] >= 3.14159265
    assert bucketed(durations, bins, upper_inclusive=True).max() == len(bins) - 1
    assert estimate_bins(np.full(40, 10.0), 4) == [10.0]  # all the same: one bucket
    assert bucketed(np.array([2.0, 2.0001]), [2.0, 3.0], upper_inclusive=True).tolist() == [0, 1]  # ends are included


def test_few_utterances_few_buckets() -> None:
    assert [default_buckets(count) for count in (5, 100, 10**6)] == [1, 5, 30]
    assert default_buckets(10**6, wanted=8) == 8


def test_padding() -> None:
    durations = np.array([1.0, 1.0, 3.0, 3.0])
    assert padding_of_plain(durations, 4) == pytest.approx(1 - 8 / 12)
    assert padding_of_plain(durations, 1) == 0
    assert padding_of_buckets(durations, [1.0, 3.0], [2, 2]) == 0
    assert padding_of_buckets(durations, [3.0], [4]) == pytest.approx(1 - 8 / 12)
    long = np.random.default_rng(0).uniform(1, 20, 5_000)
    expected = 1 - 10.5 / (1 + 19 * 8 / 9)  # mean over the expected largest of eight
    assert padding_of_plain(long, 8) == pytest.approx(expected, abs=0.01)


# ---- the search --------------------------------------------------------------------------------------------------

BINS = [2.0, 3.1, 4.4, 6.0, 8.5, 12.0, 20.0]


@dataclass
class Device:
    """Memory that a batch takes, as a function of its size and duration; counts what it is asked."""

    takes: Callable[[int, float], float]
    room: float = 1.0
    asked: int = 0

    def attempt(self, batch: int, seconds: float) -> Trial:
        self.asked += 1
        used = self.takes(batch, seconds) / self.room
        return Trial(batch, seconds, used if used <= 1 else None)

    def largest(self, seconds: float) -> int:
        """Find the size by trying all."""
        size = 0
        while self.takes(size + 1, seconds) <= self.room:
            size += 1
        return size


@pytest.mark.parametrize(
    "takes",
    [
        lambda batch, seconds: batch * seconds / 2_000,
        lambda batch, seconds: batch * (seconds + 0.2 * seconds**2) / 3_000,
        lambda batch, seconds: 0.1 + batch * seconds / 700,  # some of it before the first utterance
        lambda batch, seconds: (batch * seconds / 1_000) ** 1.3,
        lambda batch, seconds: batch * seconds / 30,  # one or two utterances
    ],
    ids=["linear", "attention", "constant", "superlinear", "tight"],
)
def test_the_search_finds_the_largest(takes: Callable[[int, float], float]) -> None:
    device = Device(takes)
    found = Search(device.attempt).largest(BINS, [10_000] * len(BINS))
    for size, seconds in zip(found, BINS, strict=True):
        largest = device.largest(seconds)
        assert size <= largest
        assert size >= min(largest - 1, 0.94 * largest) or largest == 0
    assert found == sorted(found, reverse=True)
    assert device.asked <= 5 * len(BINS)


def test_the_memory_that_is_reported_may_be_wrong() -> None:
    """A device that reports nothing useful: doubling and bisection still find the edge."""
    device = Device(lambda batch, seconds: batch * seconds / 2_000)
    for lie in (1e-9, 0.5):

        def attempt(batch: int, seconds: float, lie: float = lie) -> Trial:
            honest = device.attempt(batch, seconds)
            return Trial(batch, seconds, lie if honest.fits else None)

        found = Search(attempt).largest(BINS, [10_000] * len(BINS))
        for size, seconds in zip(found, BINS, strict=True):
            assert 0.94 * device.largest(seconds) - 1 <= size <= device.largest(seconds)


def test_the_search_stops_at_what_there_is() -> None:
    device = Device(lambda batch, seconds: batch * seconds / 1e6)
    assert Search(device.attempt).largest([1.0, 2.0], [7, 3]) == [7, 3]
    assert Search(Device(lambda batch, seconds: seconds).attempt).largest([0.5, 2.0], [9, 9]) == [9, 0]


# ---- the training step -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_section(corpus: dict[str, Path], tmp_path: Path) -> None:
    told: list[str] = []
    context = BenchContext(tiny_config(corpus), Options(buckets=2, memory=900 << 20), tmp_path, told.append)
    section: Any = buckets_section(context).to_json()
    assert section["device"] == "cpu"
    assert 0 < section["peak_memory_bytes"]["ours"] <= section["memory_budget_bytes"]
    sizes = [row["batch_size"] for row in section["bins"]]
    assert sizes == [row["utterances"] for row in section["bins"]]  # twelve short clips fit at once
    assert section["keys"]["model.train_ds.bucket_batch_size"] == sizes
    load_config("small", ["+" + word for word in section["words"]])
    assert all(0 <= share < 1 for share in section["padding"].values())
    assert len(section["trials"]) == len(told)
    json.dumps(section)


@pytest.mark.slow
def test_what_does_not_fit_is_found_and_nothing_is_lost(corpus: dict[str, Path]) -> None:
    config = tiny_config(corpus)
    with Trials(config, "cpu", 900 << 20, lambda doing: None) as trials:
        assert trials.attempt(1, 1.0).fits
        assert not trials.attempt(600, 20.0).fits
        again = trials.attempt(1, 1.0)
        assert again.fits
        assert again.peak <= 900 << 20


@pytest.mark.slow
def test_too_little_memory_for_the_model(corpus: dict[str, Path], tmp_path: Path) -> None:
    context = BenchContext(tiny_config(corpus), Options(memory=40 << 20), tmp_path, lambda doing: None)
    with pytest.raises(RunFailedError, match="MiB"):
        buckets_section(context)


@pytest.mark.slow
def test_a_process_that_dies_did_not_fit(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
            if operation == "try_step" and parameters["batch"] > 4:
                raise DiedError("ended with -9")
            return {"memory": 1000, "fits": True, "used": 0.1, "seconds": 1.0, "peak": 10}

        def close(self) -> None:
            ended.append(self)

    ended: list[Any] = []
    monkeypatch.setattr("nestcli.bench.fit.our_peer", lambda **options: Dying())
    with Trials(tiny_config(corpus), "cpu", 1000, lambda doing: None) as trials:
        assert [trials.attempt(batch, 1.0).fits for batch in (4, 5, 3)] == [True, False, True]
    assert len(ended) == 2


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_which_errors_mean_no_memory(error: BaseException, verdict: bool) -> None:
    assert is_out_of_memory(error) is verdict


def test_a_gpu_that_is_full(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is caught, the cache emptied, and the next step runs, as on a GPU. The device is this CPU."""
    monkeypatch.setattr(trial, "_limit", lambda device, memory: None)
    step = trial.TrainingStep(tiny_config(corpus), "cpu", 8 << 30)
    freed: list[bool] = []
    monkeypatch.setattr(step, "_free", lambda: freed.append(True))
    made = trial._noise

    def full(clips: int, samples: int) -> Any:
        if clips > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return made(clips, samples)

    monkeypatch.setattr(trial, "_noise", full)
    assert step.attempt(2, 1.0)["fits"]
    assert step.attempt(3, 1.0) == {"fits": False}
    assert step.attempt(2, 1.0)["fits"]
    assert len(freed) == 3
    assert all(value.grad is not None for value in step.model.encoder.parameters())  # they take room in the next step
    monkeypatch.setattr(trial, "_noise", lambda clips, samples: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.attempt(1, 1.0)


@pytest.mark.parametrize(
    "words",
    [
        "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false.",
        "nll_loss2d: expected numel to be smaller than INT_MAX",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    ],
)
def test_a_tensor_with_too_many_elements_ends_no_search(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """Such an error comes before memory is full, from the GPU's kernels. The device is this CPU."""
    monkeypatch.setattr(trial, "_limit", lambda device, memory: None)
    step = trial.TrainingStep(tiny_config(corpus), "cpu", 8 << 30)
    subsampling = step.model.encoder.pre_encode
    original = subsampling.forward

    def counted(features: torch.Tensor, *others: Any) -> Any:
        if len(features) > 2:
            raise RuntimeError(words)
        return original(features, *others)

    monkeypatch.setattr(subsampling, "forward", counted)
    search = Search(lambda batch, seconds: Trial(batch, seconds, step.attempt(batch, seconds).get("used")))
    assert search.largest([1.0], [8]) == [2]
    monkeypatch.setattr(subsampling, "forward", lambda *given: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        step.attempt(1, 1.0)


def test_a_step_trains(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is a real training step: all trainable weights change."""
    monkeypatch.setattr(trial, "_limit", lambda device, memory: None)
    step = trial.TrainingStep(tiny_config(corpus, "trainer.gradient_clip_val=1.0"), "cpu", 8 << 30)
    before = {name: value.detach().clone() for name, value in step.model.named_parameters()}
    for group in step.optimizer.param_groups:
        group["lr"] = 0.1
    step.attempt(2, 3.0)
    still = {name for name, value in step.model.named_parameters() if torch.equal(before[name], value)}
    assert still
    assert all(name.startswith(("quantizer", "mask")) or name.endswith("bias") for name in still), still


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(corpus: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(corpus, "trainer.accelerator=gpu")
    with Trials(config, "cuda", 1 << 30, lambda doing: None) as trials:
        assert trials.attempt(1, 1.0).fits
        assert not trials.attempt(4_000, 20.0).fits
        assert trials.attempt(1, 1.0).fits


def test_the_parent_stays_off_the_gpu() -> None:
    """A context in the parent would take memory that the trials need."""
    code = "import nestcli.bench.run, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
