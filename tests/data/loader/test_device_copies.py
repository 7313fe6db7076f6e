"""Batches on their way to a device: through few slots of page-locked memory, in order, never written too early."""

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_config
from data.loader.late_stream import LateMark, LateStream
from data.loader.test_ring import BATCHES, Batches, batch_of, same
from nestcli.data import datamodule
from nestcli.data.datamodule import NestDataModule
from nestcli.data.loader.device_copies import CudaStream, DeviceCopies
from nestcli.data.loader.loader import Loader
from nestcli.errors import RunFailedError


def loader_of(stream: Any, n_slots: int = 2, slot_bytes: int = 1_000, ring_bytes: int = 1 << 20) -> Loader:
    copies = DeviceCopies(stream, n_slots, slot_bytes)
    return Loader(Batches(), range(BATCHES), workers=2, copies=copies, slot_bytes=ring_bytes)


@pytest.mark.parametrize("slot_bytes", [64, 1_000, 1 << 20])
@pytest.mark.parametrize("n_slots", [1, 2, 5])
def test_the_same_batches_in_few_slots(n_slots: int, slot_bytes: int) -> None:
    stream = LateStream()
    loader = loader_of(stream, n_slots, slot_bytes)
    for _ in range(2):  # epochs
        ours = list(loader)  # all are held: none may be written over
        assert len(ours) == BATCHES
        assert all(same(batch, batch_of(number)) for number, batch in enumerate(ours))
    assert stream.allocated == [n_slots * slot_bytes]  # once for all batches
    assert max(stream.pieces) <= slot_bytes
    assert set(stream.waits) == {"nest-ahead"}  # the thread that trains never waits on the host
    assert set(stream.handed) == {threading.main_thread().name}
    assert stream.kept == 2 * BATCHES * 6  # every tensor of every batch


def test_a_batch_larger_than_the_ring_and_the_slots_goes_the_same_way() -> None:
    stream = LateStream()
    ours = list(loader_of(stream, 2, 256, ring_bytes=100))
    assert all(same(batch, batch_of(number)) for number, batch in enumerate(ours))
    assert sum(stream.pieces) == sum(
        value.numel() * value.element_size()
        for batch in ours
        for value in vars(batch).values()
        if isinstance(value, torch.Tensor)
    )


def test_the_stand_in_shows_a_slot_that_is_written_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateMark, "synchronize", lambda mark: None)
    ours = list(loader_of(LateStream()))
    assert not all(same(batch, batch_of(number)) for number, batch in enumerate(ours))


def test_the_stand_in_shows_a_batch_that_is_used_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateStream, "hand_over", lambda stream, mark, tensors: None)
    ours = list(loader_of(LateStream()))
    assert not all(same(batch, batch_of(number)) for number, batch in enumerate(ours))


def test_one_batch_is_copied_ahead_and_no_further_one() -> None:
    stream = LateStream()
    loader = loader_of(stream, 64, 1 << 20)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 5
    while len(stream.pieces) < 12 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(stream.pieces) == 12  # six tensors of two batches, one piece each
    del batches


def test_page_locked_memory_that_cannot_be_had_is_explained() -> None:
    class Full(LateStream):
        def page_locked(self, n_bytes: int) -> Any:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")

    with pytest.raises(RunFailedError, match=r"64 MiB of page-locked .*\(CUDA error: out of memory\)\. Lower num_wor"):
        list(loader_of(Full(), 4, 1 << 24))


def test_the_threads_of_the_trainer_keep_their_number() -> None:
    """A process of its own: PyTorch reads its settings of threads once."""
    import subprocess
    import sys

    code = """
import threading, torch
from data.loader.test_device_copies import loader_of
from data.loader.late_stream import LateStream
list(loader_of(LateStream()))
found = [torch.get_num_threads()]
thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
thread.start(); thread.join()
print(*found)
"""
    tests = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tests, check=False,
        env={"OMP_NUM_THREADS": "3", "MKL_DYNAMIC": "FALSE", "PYTHONPATH": ":".join([str(tests), *sys.path])},
    )  # fmt: skip
    assert done.stdout.split() == ["3", "3"], done.stderr


def test_the_slots_hold_the_largest_batch_of_any_size(corpus: dict[str, Path]) -> None:
    words = ["model.train_ds.num_workers=1", "model.train_ds.batch_size=3000", "model.train_ds.drop_last=false"]
    loader = NestDataModule(tiny_config(corpus, *words)).train_dataloader()
    assert isinstance(loader, Loader)
    (batch,) = list(loader)
    assert loader._ring.n_bytes >= 2 * 4 * batch.audio.numel() + 3 * 8 * len(batch.audio)
    assert loader._ring.n_bytes < 2 * 4 * batch.audio.numel() + (1 << 20)  # not for 3,000 utterances


@pytest.mark.parametrize(("pin_memory", "copied"), [("true", True), ("false", False)])
def test_the_data_module_copies_to_its_gpu(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch, pin_memory: str, copied: bool
) -> None:
    stream = LateStream()
    monkeypatch.setattr(datamodule, "CudaStream", lambda device: stream)
    words = ["model.train_ds.num_workers=2", f"model.train_ds.pin_memory={pin_memory}"]
    plain, sent = NestDataModule(tiny_config(corpus, *words)), NestDataModule(tiny_config(corpus, *words))
    sent.device = torch.device("cuda")
    assert all(map(same, plain.train_dataloader(), sent.train_dataloader()))
    assert stream.allocated == ([1 << 26] if copied else [])


def test_slots_that_no_memory_can_hold_are_refused() -> None:
    with pytest.raises(
        RunFailedError, match=r"3 batches of up to 4294967296\.0 GiB do not fit .* Lower the loader\.num"
    ):
        Loader(Batches(), range(3), workers=1, slot_bytes=1 << 62)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


def on_gpu() -> Any:
    return CudaStream(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("slot_bytes", [256, 1 << 24])
def test_batches_on_a_gpu_equal_those_of_the_processor(slot_bytes: int) -> None:
    loader = loader_of(on_gpu(), 2, slot_bytes)
    for _ in range(3):
        for number, batch in enumerate(loader):
            assert batch.audio.is_cuda
            assert same(batch.to(torch.device("cpu")), batch_of(number))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_is_reused_only_behind_the_work_that_reads_it() -> None:
    """The GPU is kept behind the host by long work, while batches come and their memory is freed and taken again."""
    many = 200

    class Many(Batches):
        def __getitem__(self, number: int) -> Any:
            return super().__getitem__(number % BATCHES)

    loader = Loader(Many(), range(many), workers=2, copies=DeviceCopies(on_gpu(), 2, 4_096))
    sums, busy = [], torch.randn(2048, 2048, device="cuda")
    for batch in loader:
        for _ in range(5):
            busy = torch.nn.functional.normalize(busy @ busy)
        sums.append(batch.audio.double().sum() + 0 * busy[0, 0].double())  # reads late
        del batch
    gc.collect()
    expected = [float(batch_of(number % BATCHES).audio.double().sum()) for number in range(many)]
    assert torch.stack(sums).cpu().tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_data_module_delivers_on_the_gpu(corpus: dict[str, Path]) -> None:
    words = ["model.train_ds.num_workers=2", "model.train_ds.shuffle=false"]
    plain, sent = NestDataModule(tiny_config(corpus, *words)), NestDataModule(tiny_config(corpus, *words))
    sent.device = torch.device("cuda", torch.cuda.current_device())
    pairs = list(zip(plain.train_dataloader(), sent.train_dataloader(), strict=True))
    assert pairs
    assert all(theirs.audio.is_cuda and same(theirs.to(torch.device("cpu")), ours) for ours, theirs in pairs)
