"""Checkpoint files: verified to the last bit, readable by everyone, and whole whatever fails while they are written."""

import errno
import hashlib
import io
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nestcli import files
from nestcli.checkpoint.atomic import UnwrittenError
from nestcli.checkpoint.digest import DamagedError, verify
from nestcli.checkpoint.lightning import AtomicCheckpointIO, load_lightning_checkpoint
from nestcli.errors import CheckpointError
from nestcli.files import remove_leftovers


def content(step: int, values: int = 64) -> dict[str, Any]:
    return {"state_dict": {"a": torch.arange(values) * 1.5, "b": torch.full((3, 5), step)}, "global_step": step}


def written(path: Path, step: int = 1, values: int = 64) -> Path:
    AtomicCheckpointIO().save_checkpoint(content(step, values), path)
    return path


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_anyone_reads_a_checkpoint_with_its_digest(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", values=100_000)
    verify(path)
    for mmap in (False, True):
        assert torch.equal(
            torch.load(path, mmap=mmap, weights_only=True)["state_dict"]["a"], content(1, 100_000)["state_dict"]["a"]
        )
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = archive.comment
    data = path.read_bytes()
    assert comment == b"nest sha256 " + hashlib.sha256(data[:-64]).hexdigest().encode()


def test_a_flipped_bit_and_a_cut_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt", values=4)
    data = path.read_bytes()
    end = 8 * (len(data) - 120)
    for bit in [*range(0, end, 29), *range(end, 8 * len(data))]:
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DamagedError):
            verify(path)
    for size in [*range(0, end // 8, 13), *range(end // 8, len(data))]:
        path.write_bytes(data[:size])
        with pytest.raises(DamagedError):
            verify(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(DamagedError, match="more data follows its end"):
        load_lightning_checkpoint(path)


def test_a_flipped_bit_is_not_loaded(tmp_path: Path) -> None:
    path = written(tmp_path / "x.ckpt")
    data = path.read_bytes()
    at = data.index(content(1)["state_dict"]["a"].numpy().tobytes())
    path.write_bytes(flipped(data, 8 * at + 100))
    assert not torch.equal(torch.load(path, weights_only=True)["state_dict"]["a"], content(1)["state_dict"]["a"])
    with pytest.raises(DamagedError, match=r"x\.ckpt cannot be read as a checkpoint: its SHA-256 is not the one"):
        load_lightning_checkpoint(path)


def test_a_checkpoint_without_a_digest_is_checked_by_its_records(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(content(5), path)
    assert load_lightning_checkpoint(path)["global_step"] == 5
    data = path.read_bytes()
    at = data.index(content(5)["state_dict"]["a"].numpy().tobytes())
    for bit in random.Random(1).sample(range(8 * at, 8 * (at + 256)), 20):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DamagedError, match="CRC-32"):
            load_lightning_checkpoint(path)
    for size in random.Random(2).sample(range(len(data)), 20):
        path.write_bytes(data[:size])
        with pytest.raises(DamagedError):
            load_lightning_checkpoint(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content(6), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_lightning_checkpoint(path)["global_step"] == 6


# ---- writes that fail ----


class Faults:
    """Counts calls that touch the disk, and fails the one with a given number."""

    def __init__(self, number: int, code: int) -> None:
        self.left, self.code, self.happened = number, code, ""

    def call(self, name: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.happened = name
            raise OSError(self.code, os.strerror(self.code))

    def failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.call(name)
            return real(*args, **options)

        return wrapped


def faulty_file(faults: Faults) -> type:
    """A file whose every call to the disk may fail, below what notes such failures."""

    class FaultyDisk(io.FileIO):
        def __init__(self, *args: Any) -> None:
            faults.call("open")
            super().__init__(*args)

        def write(self, data: Any) -> int:
            faults.call("write")
            return super().write(data)

        def readinto(self, buffer: Any) -> int:
            faults.call("read")
            return super().readinto(buffer)

        def seek(self, *args: Any) -> int:
            faults.call("seek")
            return super().seek(*args)

        def close(self) -> None:
            was_open = not self.closed
            super().close()
            if was_open:
                faults.call("close")

    return type("FaultyFile", (files._Watched, FaultyDisk), {})


@contextmanager
def faulty_disk(faults: Faults) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_Watched", faulty_file(faults))
        patch.setattr(Path, "replace", faults.failing("rename", Path.replace))
        for name in ("open", "close", "fsync", "posix_fadvise"):
            patch.setattr(f"nestcli.files.os.{name}", faults.failing(f"os.{name}", getattr(os, name)))
        yield


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["old.ckpt", "new.ckpt"])
def test_a_write_that_fails_at_any_call_leaves_the_old_checkpoint(tmp_path: Path, code: int, name: str) -> None:
    failed, number = set(), 0
    while True:
        number += 1
        for path in tmp_path.iterdir():
            path.unlink()
        old, new, faults = written(tmp_path / "old.ckpt", 1), tmp_path / name, Faults(number, code)
        message = None
        try:
            with faulty_disk(faults):
                AtomicCheckpointIO().save_checkpoint(content(2), new)
        except UnwrittenError as error:
            message = str(error)
        expected = f"{new} cannot be written: {os.strerror(code)}. Older checkpoints are untouched."
        assert message == (expected if faults.happened else None), f"{faults.happened} fails"
        failed.add(faults.happened)
        present = {path.name for path in tmp_path.iterdir()}
        assert present <= {old.name, name}  # no half file, under whatever name
        steps = {path: load_lightning_checkpoint(tmp_path / path)["global_step"] for path in present}
        assert steps["old.ckpt"] == 1 or steps == {"old.ckpt": 2}  # of before or whole: the folder's fsync failed
        if not faults.happened:
            break
    assert failed >= {"open", "write", "os.fsync", "close", "rename", "os.open", "os.close", "read"}
    assert steps[name] == 2
    assert number >= 20


def test_a_disk_that_gives_back_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "x.ckpt", 1)
    monkeypatch.setattr("nestcli.checkpoint.digest._digest", lambda *_: "0" * 64)
    with pytest.raises(UnwrittenError, match="reads back other than it was written"):
        written(tmp_path / "x.ckpt", 2)
    monkeypatch.undo()
    assert load_lightning_checkpoint(tmp_path / "x.ckpt")["global_step"] == 1


def test_leftovers_of_killed_writes_go_and_nothing_else(tmp_path: Path) -> None:
    keep = ["a.ckpt", ".hidden", ".a.tmp", "b.12.tmp", "a.ckpt.damaged"]
    for name in [*keep, ".a.ckpt.123.tmp", ".metrics.jsonl.7.tmp"]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert {path.name for path in tmp_path.iterdir()} == set(keep)


def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_lightning_checkpoint(tmp_path / "x.ckpt")
