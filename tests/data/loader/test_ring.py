"""Batches through the ring of shared memory, beside the same batches made here."""

import itertools
import os
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader.late_stream import LateStream
from nestcli.data.datamodule import InProcess
from nestcli.data.dataset import Empty, NoiseBatch, empty
from nestcli.data.loader.device_copies import DeviceCopies
from nestcli.data.loader.loader import Loader
from nestcli.data.loader.ring import Lies, Ring
from nestcli.data.loader.watch import Watch
from nestcli.errors import DataError, RunFailedError

BATCHES = 23
COPIED = [False, True]  # to a device, by a thread


def batch_of(number: int) -> NoiseBatch:
    generator = torch.Generator().manual_seed(number)
    clips, samples = 1 + number % 3, 50 + 37 * number
    audio, noise, noisy = (torch.randn(clips, samples, generator=generator) for _ in range(3))
    lengths = torch.full((clips,), samples)
    return NoiseBatch(audio, lengths, noise, lengths - 1, noisy, lengths, tuple(range(clips)), number != 5)


class Batches:
    """Batches by number; every second one has its audio made in the memory that it is sent in."""

    make_array: Empty = staticmethod(empty)

    def __init__(self, failing: int = -1) -> None:
        self.failing = failing

    def __getitem__(self, number: int) -> Any:
        if number == self.failing:
            return DataError("corrupt")
        batch = batch_of(number)
        if number % 2:
            return batch
        made = torch.from_numpy(self.make_array(tuple(batch.audio.shape))).copy_(batch.audio)
        return NoiseBatch(**{**{field.name: getattr(batch, field.name) for field in fields(batch)}, "audio": made})


def loader_of(data: Any = None, workers: int = 1, copied: bool = False, **options: Any) -> Any:
    if workers == 0:
        return InProcess(data or Batches(), range(BATCHES))
    copies = DeviceCopies(LateStream(), 2, 1_000) if copied else None
    return Loader(data or Batches(), range(BATCHES), workers=workers, copies=copies, **options)


def same(ours: NoiseBatch, theirs: NoiseBatch) -> bool:
    pairs = ((getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(NoiseBatch))
    return all(torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("prefetched", [1, 2, 5])
@pytest.mark.parametrize("copied", COPIED)
def test_the_same_batches(workers: int, prefetched: int, copied: bool) -> None:
    loader = loader_of(workers=workers, prefetched=prefetched, copied=copied)
    assert len(loader) == BATCHES
    pids = set()
    for _ in range(2):  # epochs
        ours = list(loader)  # all are held: none may be written over
        assert len(ours) == BATCHES
        assert all(same(batch, batch_of(number)) for number, batch in enumerate(ours))
        pids.add(tuple(process.pid for process in loader.watch.processes) if workers else ())
    assert len(pids) == 1  # the processes stay
    assert len(*pids) == workers


def test_what_is_too_large_is_sent_as_it_is() -> None:
    ring = Ring(1, 4_000)
    ring.begin(0)
    sent = [{type(there) for there in ring.put(batch_of(number)).tensors.values()} for number in (0, BATCHES)]
    assert sent == [{Lies}, {Lies, np.ndarray}]
    assert all(same(batch, batch_of(number)) for number, batch in enumerate(loader_of(slot_bytes=4_000)))


def test_memory_is_taken_once(tmp_path: Path) -> None:
    ring = Ring(2, 1 << 20)
    for number in range(6):
        ring.begin(number)
        whole = batch_of(number)
        assert same(ring.take(number, ring.put(whole)), whole)
        first = ring.array((1 << 18,))
        assert first.ctypes.data != ring.array((1,)).ctypes.data
    ring.begin(6)
    ring.array((2, 3))[:] = 1
    ring.begin(8)
    assert ring.array((2, 3)).tolist() == [[1.0] * 3] * 2  # the slot of batch 6, and 4, and 2


def test_errors_that_the_data_set_returns_pass() -> None:
    loaded = list(loader_of(Batches(failing=3)))
    assert isinstance(loaded[3], DataError)
    assert str(loaded[3]) == "corrupt"
    assert same(loaded[4], batch_of(4))


class OddError(ValueError):
    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{number}: {why}")


@pytest.mark.parametrize("copied", COPIED)
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("corrupt"), DataError, "^corrupt$"),
        (KeyError("x"), KeyError, "^'x'$"),
        (OddError(1, "no"), RuntimeError, "^OddError: 1: no$"),
    ],
)
def test_an_error_in_a_process_is_raised_where_its_batch_would_come(
    error: Exception, kind: type[Exception], message: str, copied: bool
) -> None:
    class Raising(Batches):
        def __getitem__(self, number: int) -> Any:
            if number == 7:
                raise error
            return super().__getitem__(number)

    loader = loader_of(Raising(), workers=2, copied=copied)
    for _ in range(2):
        batches = iter(loader)
        assert all(same(batch, batch_of(number)) for number, batch in enumerate(itertools.islice(batches, 7)))
        with pytest.raises(kind, match=message) as raised:
            next(batches)
        assert "in __getitem__" in str(raised.value.__cause__)
        assert "raise error" in str(raised.value.__cause__)


def test_a_process_that_was_not_forked_sends_whole_batches() -> None:
    ring = Ring(0, 1 << 20)
    ring.begin(1)
    batch = batch_of(1)
    sent = ring.put(batch)
    assert {type(there) for there in sent.tensors.values()} == {np.ndarray}
    assert same(ring.take(1, sent), batch)


def test_an_unmixed_batch_names_one_tensor_twice() -> None:
    class Unmixed(Batches):
        def __getitem__(self, number: int) -> Any:
            audio = torch.full((2, 5), float(number))
            lengths = torch.tensor([5, 4])
            return NoiseBatch(audio, lengths, torch.zeros(2, 0), lengths, audio, lengths)

    for number, batch in enumerate(loader_of(Unmixed())):
        assert batch.audio.tolist() == batch.noisy_audio.tolist() == [[float(number)] * 5] * 2
        assert batch.noise.shape == (2, 0)


def test_a_part_of_an_array_is_not_taken_for_the_whole() -> None:
    ring = Ring(1, 1 << 20)
    ring.begin(0)
    wide = torch.from_numpy(ring.array((2, 6))).copy_(torch.arange(12.0).view(2, 6))
    lengths = torch.tensor([4, 4])
    batch = NoiseBatch(wide[:, :4], lengths, wide[:, 4:], lengths, wide, lengths)
    assert same(ring.take(0, ring.put(batch)), batch)


@pytest.mark.parametrize("copied", COPIED)
def test_epochs_that_are_left_early(copied: bool) -> None:
    loader = loader_of(workers=2, copied=copied)
    for _ in range(3):
        some = list(itertools.islice(loader, 5))
        assert all(same(batch, batch_of(number)) for number, batch in enumerate(some))


def test_two_passes_at_once_are_refused() -> None:
    loader = loader_of()
    first, second = iter(loader), iter(loader)
    next(first)
    assert same(next(second), batch_of(0))
    with pytest.raises(RuntimeError, match="only one can run at a time"):
        next(first)


@pytest.mark.parametrize("copied", COPIED)
def test_a_process_that_dies_is_named(copied: bool) -> None:
    class Deadly(Batches):
        def __getitem__(self, number: int) -> Any:
            return os.kill(os.getpid(), signal.SIGKILL) if number == 7 else super().__getitem__(number)

    loader = loader_of(Deadly(), watch=Watch(1, "model.train_ds", 50.0), copied=copied)
    with pytest.raises(RunFailedError, match=r"killed by SIGKILL between two files; it had not read any"):
        list(loader)


@pytest.mark.parametrize("copied", COPIED)
def test_a_loader_that_is_closed_starts_again(copied: bool) -> None:
    loader = loader_of(workers=2, copied=copied)
    for _ in range(2):
        batches = iter(loader)
        assert same(next(batches), batch_of(0))
        processes = loader.watch.processes
        loader.close()
        assert all(process.exitcode == -signal.SIGKILL for process in processes)
        with pytest.raises(RunFailedError):
            list(batches)


def test_a_batch_that_is_on_its_device_is_not_copied() -> None:
    batch = batch_of(3)
    moved = batch.to(torch.device("cpu"))
    assert moved.audio is batch.audio
    assert same(moved, batch)
