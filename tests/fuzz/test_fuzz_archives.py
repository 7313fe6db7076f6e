"""Damaged checkpoints and shards are refused by name, or loaded as their configuration describes them."""

from __future__ import annotations

import io
import json
import resource
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.strategies import altered, bounded, damaged
from nestcli.checkpoint.archive import open_archive
from nestcli.checkpoint.digest import DamagedError, verify
from nestcli.checkpoint.lightning import AtomicCheckpointIO
from nestcli.checkpoint.load import checkpoint_config, checkpoint_weights, load_checkpoint
from nestcli.checkpoint.nemo import write_nemo
from nestcli.checkpoint.safetensors_file import write_safetensors
from nestcli.checkpoint.weights import load_weights, model_skeleton
from nestcli.config import load_config, resolved
from nestcli.errors import CheckpointError, ConfigError, DataError
from nestcli.model.config import NestConfig
from nestcli.model.module import CONFIG_KEY
from nestcli.model.nest import NestModel
from nestcli.storage.tar_members import TarMembers

TINY = [
    "model.encoder.d_model=8",
    "model.encoder.n_heads=1",
    "model.encoder.n_layers=1",
    "model.num_classes=4",
    "model.encoder.subsampling_conv_channels=2",
    "model.code_dim=2",
    "model.encoder.ff_expansion_factor=1",
    "model.encoder.conv_kernel_size=3",
]
MOST_BYTES = 512 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return a small model in each format; `.zip` holds only the weights."""
    folder, config = tmp_path_factory.mktemp("whole"), load_config("small", TINY)
    torch.manual_seed(0)
    state = dict(NestModel(NestConfig.from_config(config)).state_dict())
    write_nemo(folder / "a.nemo", config, state)
    write_safetensors(folder / "a.safetensors", config, state)
    content = {"state_dict": state, CONFIG_KEY: resolved(config), "pytorch-lightning_version": "2.6.6"}
    AtomicCheckpointIO().save_checkpoint(content, folder / "a.ckpt")
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.float64)}, buffer)
    return {**{path.suffix: path.read_bytes() for path in folder.iterdir()}, ".zip": buffer.getvalue()}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder for the files; check afterwards that it is as before, and that little memory was used."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield tmp_path
    assert len(list(tmp_path.iterdir())) <= 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_BYTES >> 10


def load_or_refused(path: Path, content: bytes) -> bool:
    """Return True if a file is loaded. It must then fit its configuration, or else the error must name it."""
    path.write_bytes(content)
    try:
        loaded = load_checkpoint(path)
    except (CheckpointError, ConfigError) as error:
        assert path.name in str(error)
        assert len(str(error)) < 2000
        loaded = None
    else:
        wanted = model_skeleton(loaded.config, str(path)).state_dict()
        assert {name: value.shape for name, value in loaded.state_dict.items()} == {
            name: value.shape for name, value in wanted.items()
        }
        assert all(bool(value.isfinite().all()) for value in loaded.state_dict.values())
    for alone in (checkpoint_config, checkpoint_weights):
        try:
            alone(path)
        except (CheckpointError, ConfigError) as error:
            assert path.name in str(error)
            assert loaded is None
    assert path.read_bytes() == content
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    return loaded is not None


def tar_headers(content: bytes) -> list[tuple[int, int]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(member.offset, member.offset + 512) for member in tar]


def zip_places(content: bytes, start: int = 0) -> list[tuple[int, int]]:
    """Return the pickle, and the directory at the end."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        [table] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        return [
            (start, start + 64),
            (start + table.header_offset, start + table.header_offset + 64 + table.file_size),
            (start + archive.start_dir, start + len(content)),
        ]


def repacked(content: bytes, change: Any) -> bytes:
    """Return a zip of weights with another pickle, correct checksums and no digest."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            record = old.read(entry)
            new.writestr(entry.filename, change(record) if entry.filename.endswith("/data.pkl") else record)
    return out.getvalue()


def pickle_of(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def header_of_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    [length] = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_what_is_whole_is_loaded(folder: Path, whole: dict[str, bytes]) -> None:
    for suffix in (".nemo", ".ckpt", ".safetensors"):
        assert load_or_refused(folder / f"a{suffix}", whole[suffix])
        (folder / f"a{suffix}").unlink()


@given(content=st.data())
@bounded(20)
def test_any_damage_to_a_nemo_file(folder: Path, whole: dict[str, bytes], content: st.DataObject) -> None:
    with tarfile.open(fileobj=io.BytesIO(whole[".nemo"])) as tar:
        text, weights = (tar.getmember(f"./{name}") for name in ("model_config.yaml", "model_weights.ckpt"))
        inside = whole[".nemo"][weights.offset_data : weights.offset_data + weights.size]
    places = [
        *tar_headers(whole[".nemo"]),
        *zip_places(inside, weights.offset_data),
        (text.offset_data, text.offset_data + text.size),
    ]
    load_or_refused(folder / "a.nemo", content.draw(damaged(whole[".nemo"], places)))


@given(content=st.data())
@bounded(20)
def test_any_damage_to_a_checkpoint_of_ours_is_found(
    folder: Path, whole: dict[str, bytes], content: st.DataObject
) -> None:
    damage = content.draw(damaged(whole[".ckpt"], zip_places(whole[".ckpt"])))
    assert load_or_refused(folder / "a.ckpt", damage) == (damage == whole[".ckpt"])


@given(bit=st.data())
@bounded(150)
def test_any_bit_of_a_checkpoint_of_ours_is_found(folder: Path, whole: dict[str, bytes], bit: st.DataObject) -> None:
    size = len(whole[".ckpt"])
    place = bit.draw(st.integers(0, size - 1) | st.integers(size - 120, size - 1))
    damage = bytearray(whole[".ckpt"])
    damage[place] ^= 1 << bit.draw(st.integers(0, 7))
    path = folder / "a.ckpt"
    path.write_bytes(damage)
    with pytest.raises(DamagedError, match=r"a\.ckpt"):
        verify(path)


@given(content=st.data())
@bounded(30)
def test_any_damage_to_the_pickle_of_a_checkpoint(
    folder: Path, whole: dict[str, bytes], content: st.DataObject
) -> None:
    damage = content.draw(damaged(pickle_of(whole[".ckpt"])))
    load_or_refused(folder / "a.ckpt", repacked(whole[".ckpt"], lambda _: damage))


@given(content=st.data())
@bounded(200)
def test_any_damage_to_the_pickle_of_weights(whole: dict[str, bytes], content: st.DataObject) -> None:
    damage = content.draw(damaged(pickle_of(whole[".zip"])))
    packed = repacked(whole[".zip"], lambda _: damage)
    try:
        state = load_weights(io.BytesIO(packed), len(packed), "x.nemo")
    except CheckpointError as error:
        assert "x.nemo" in str(error)
        return
    assert sum(value.numel() for value in state.values()) < 1 << 20


@given(content=st.data())
@bounded(200)
def test_any_damage_to_a_zip_of_weights(whole: dict[str, bytes], content: st.DataObject) -> None:
    damage = content.draw(damaged(whole[".zip"], zip_places(whole[".zip"])))
    try:
        state = load_weights(io.BytesIO(damage), len(damage), "x.nemo")
    except CheckpointError as error:
        assert "x.nemo" in str(error)
        return
    assert sum(value.numel() for value in state.values()) < 1 << 20


@given(content=st.data())
@bounded(30)
def test_any_damage_to_a_safetensors_file(folder: Path, whole: dict[str, bytes], content: st.DataObject) -> None:
    [length] = struct.unpack("<Q", whole[".safetensors"][:8])
    load_or_refused(folder / "a.safetensors", content.draw(damaged(whole[".safetensors"], [(0, 9), (8, 8 + length)])))


LIKELY = (
    "F64",
    "F16",
    "BF16",
    "I64",
    "BOOL",
    "U8",
    "F8_E4M3",
    "F8_E8M0",
    "C64",
    "F4",
    "I32",
    0,
    -1,
    1 << 62,
    [],
    [0],
    [0, 8],
    {},
    None,
)


@given(content=st.data())
@bounded(20)
def test_any_header_of_a_safetensors_file(folder: Path, whole: dict[str, bytes], content: st.DataObject) -> None:
    header, body = header_of_safetensors(whole[".safetensors"])
    text = json.dumps(content.draw(altered(header, *LIKELY))).encode()
    load_or_refused(folder / "a.safetensors", struct.pack("<Q", len(text)) + text + body)


# ---- tars ------------------------------------------------------------------------------------------------------

MEMBERS = {"a.flac": b"x" * 700, "./b/c.wav": b"", "d" * 120: b"yz"}


def tar_of(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in MEMBERS.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


TARS = [tar_of(format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


@st.composite
def edited_tars(draw: st.DrawFn) -> bytes:
    """Draw a tar whose headers have other sizes, kinds, names or magic, with correct checksums."""
    content = bytearray(draw(st.sampled_from(TARS)))
    for _ in range(draw(st.integers(1, 2))):
        start = draw(
            st.sampled_from([at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"])
        )
        at, value = draw(
            st.tuples(
                st.just(124),
                st.sampled_from(
                    [
                        b"77777777777\0",
                        b"\x80" + b"\xff" * 11,
                        b"\xff" * 12,
                        b"00000000001\0",
                        b"-0000000001\0",
                        b" " * 12,
                    ]
                ),
            )
            | st.tuples(
                st.just(156),
                st.integers(0, 255).map(lambda byte: bytes([byte]))
                | st.sampled_from([b"L", b"x", b"g", b"S", b"5", b"K"]),
            )
            | st.tuples(
                st.just(0),
                st.sampled_from([b"../x\0", b"/etc/x\0", b"\xff\xfe\0", b"\0"]) | st.binary(min_size=1, max_size=8),
            )
            | st.tuples(st.just(257), st.binary(min_size=1, max_size=8))
            | st.tuples(st.just(345), st.binary(min_size=1, max_size=8))
        )
        content[start + at : start + at + len(value)] = value
        content[start + 148 : start + 156] = b" " * 8
        content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    return bytes(content)


tars = edited_tars() | st.sampled_from(TARS).flatmap(lambda tar: damaged(tar, tar_headers(tar)))


@given(content=tars)
@example(content=TARS[0] + TARS[0])
@bounded(150)
def test_any_damage_to_a_shard(folder: Path, content: bytes) -> None:
    path = folder / "a.tar"
    path.write_bytes(content)
    try:
        shard = TarMembers(str(path))
        read = {name: shard.read(name) for name in shard.members}
    except DataError as error:
        assert str(path) in str(error)
        return
    assert sum(map(len, read.values())) <= len(content)
    for name, (position, size) in shard.members.items():
        assert read[name] == content[position : position + size]


@given(content=tars)
@bounded(150)
def test_any_damage_to_an_archive(folder: Path, content: bytes) -> None:
    path = folder / "a.nemo"
    path.write_bytes(content)
    try:
        with open_archive(path) as archive:
            members = {name: archive.open(name)[0].read() for name in archive.members}
            sizes = {name: member.size for name, member in archive.members.items()}
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert {name: len(read) for name, read in members.items()} == sizes
    assert sum(sizes.values()) <= len(content)
    assert not any(name.startswith("/") or ".." in name.split("/") or "\\" in name for name in members)


@pytest.mark.parametrize("content", TARS)
def test_whole_tars_are_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    shard = TarMembers(str(path))
    assert {name: shard.read(name) for name in shard.members} == {
        name.removeprefix("./"): inside for name, inside in MEMBERS.items()
    }
