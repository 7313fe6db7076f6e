"""Batches through shared slots, beside the same batches sent by PyTorch."""

import itertools
import os
import pickle
import signal
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from nestcli.data.batch import NoiseBatch
from nestcli.data.loader.shared_buffers import SlabLoader, Slabs
from nestcli.data.loader.watched_workers import Watch
from nestcli.errors import DataError, RunFailedError

BATCHES = 23


def batch_of(number: int) -> NoiseBatch:
    generator = torch.Generator().manual_seed(number)
    clips, samples = 1 + number % 3, 50 + 37 * number
    audio, noise, noisy = (torch.randn(clips, samples, generator=generator) for _ in range(3))
    lengths = torch.full((clips,), samples)
    return NoiseBatch(audio, lengths, noise, lengths - 1, noisy, lengths, tuple(range(clips)), number != 5)


class Batches(Dataset[Any]):
    def __init__(self, slabs: Slabs | None, failing: int = -1) -> None:
        self.slabs, self.failing = slabs, failing

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, number: int) -> Any:
        if number == self.failing:
            return DataError("rotten")
        batch = batch_of(number)
        return batch if self.slabs is None else self.slabs.put(batch)


def same(ours: NoiseBatch, theirs: NoiseBatch) -> bool:
    pairs = ((getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(NoiseBatch))
    return all(torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [1, 2, 5])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_same_batches(workers: int, prefetch: int, device: torch.device | None) -> None:
    slabs = Slabs(workers, prefetch, 1 << 20)
    options: dict[str, Any] = {"batch_size": None, "num_workers": workers}
    if workers:
        options |= {"prefetch_factor": prefetch, "persistent_workers": True}
    loader = SlabLoader(Batches(slabs), slabs=slabs, device=device, **options)
    theirs = list(DataLoader(Batches(None), batch_size=None))
    for _ in range(2):  # epochs
        ours = list(loader)  # all are held: none may be written over
        assert len(ours) == BATCHES
        assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_is_too_large_goes_the_usual_way() -> None:
    slabs = Slabs(1, 2, 4_000)
    sent = list(DataLoader(Batches(slabs), batch_size=None, num_workers=1))
    kinds = {type(batch).__name__ for batch in sent}
    assert kinds == {"Placed", "NoiseBatch"}
    loader = SlabLoader(Batches(slabs), slabs=slabs, batch_size=None, num_workers=1)
    assert all(same(batch, batch_of(number)) for number, batch in enumerate(loader))


def test_errors_pass() -> None:
    slabs = Slabs(1, 2, 1 << 20)
    loaded = list(SlabLoader(Batches(slabs, failing=3), slabs=slabs, batch_size=None, num_workers=1))
    assert str(loaded[3]) == "rotten"
    assert same(loaded[4], batch_of(4))


def test_a_process_that_was_not_forked_sends_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    copy: Slabs = pickle.loads(pickle.dumps(Slabs(1, 2, 1 << 20)))
    monkeypatch.setattr("nestcli.data.loader.shared_buffers.get_worker_info", lambda: object())
    batch = batch_of(1)
    assert copy.put(batch) is batch


def test_an_unmixed_batch_names_one_tensor_twice() -> None:
    slabs = Slabs(1, 2, 1 << 20)

    class Unmixed(Batches):
        def __getitem__(self, number: int) -> Any:
            audio = torch.full((2, 5), float(number))
            lengths = torch.tensor([5, 4])
            return slabs.put(NoiseBatch(audio, lengths, torch.zeros(2, 0), lengths, audio, lengths))

    for number, batch in enumerate(SlabLoader(Unmixed(None), slabs=slabs, batch_size=None, num_workers=1)):
        assert batch.audio.tolist() == batch.noisy_audio.tolist() == [[float(number)] * 5] * 2
        assert batch.noise.shape == (2, 0)


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_epochs_that_are_left_early(device: torch.device | None) -> None:
    slabs = Slabs(2, 2, 1 << 20)
    loader = SlabLoader(
        Batches(slabs), slabs=slabs, device=device, batch_size=None, num_workers=2, persistent_workers=True
    )
    for _ in range(3):
        some = list(itertools.islice(loader, 5))
        assert all(same(batch, batch_of(number)) for number, batch in enumerate(some))


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_process_that_dies_is_named(device: torch.device | None) -> None:
    class Deadly(Batches):
        def __getitem__(self, number: int) -> Any:
            return os.kill(os.getpid(), signal.SIGKILL) if number == 7 else super().__getitem__(number)

    slabs = Slabs(1, 2, 1 << 20)
    loader = SlabLoader(
        Deadly(slabs),
        slabs=slabs,
        watch=Watch(1, "model.train_ds", 50.0),
        device=device,
        batch_size=None,
        num_workers=1,
    )
    with pytest.raises(RunFailedError, match=r"killed by SIGKILL between two files; it had not read any"):
        list(loader)


def test_page_locked_batches_are_sent_while_other_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bool] = []
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: Any, non_blocking: bool) -> torch.Tensor:
        sent.append(non_blocking)
        return original(tensor, *arguments, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "to", to)
    batch_of(3).to(torch.device("cpu"))
    assert set(sent) == {False}
    sent.clear()
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    batch_of(3).to(torch.device("cpu"))
    assert set(sent) == {True}
