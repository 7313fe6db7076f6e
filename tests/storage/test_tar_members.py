"""Positions of members in tars, compared with Python's own reader; hostile and damaged tars."""

import gzip
import io
import multiprocessing
import os
import pickle
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nestcli.errors import DataError
from nestcli.storage import tar_members
from nestcli.storage.tar_members import TarMembers, open_shard


def write(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def reference(path):
    with tarfile.open(path) as tar:
        return {info.name.removeprefix("./"): tar.extractfile(info).read() for info in tar if info.isfile()}


def built(path, *members):
    """Write a tar of members (name, type, size in the header, content); the size need not match the content."""
    with path.open("wb") as file:
        for name, kind, size, content in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, size
            file.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    return str(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_member_is_what_tarfile_reads(tmp_path, format):
    rng = np.random.default_rng(0)
    names = [
        "a.flac",
        "./b.wav",
        "deep/er/c.flac",
        "f" * 90 + ".flac",
        ("d" * 50 + "/") * 2 + "e" * 60 + ".wav",
        "empty.wav",
    ]
    if format != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".flac", "ünï.wav"]
    sizes = [0 if "empty" in name else int(rng.integers(1, 3000)) for name in names]
    path = write(tmp_path / "a.tar", [(name, rng.bytes(size)) for name, size in zip(names, sizes, strict=True)], format)
    shard = TarMembers(path)
    assert {name: shard.read(name) for name in shard.members} == reference(path)


def test_what_is_no_file_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("a.wav")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert list(TarMembers(str(tmp_path / "a.tar")).members) == ["a.wav"]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_links_and_folders_that_state_a_size_hide_nothing(tmp_path, kind):
    members = ("a.wav", b"0", 3, b"abc"), ("odd", kind, 700, b""), ("b.wav", b"0", 3, b"bcd")
    path = built(tmp_path / "a.tar", *members)
    assert {name: TarMembers(path).read(name) for name in ("a.wav", "b.wav")} == reference(path)
    assert list(TarMembers(path).members) == ["a.wav", "b.wav"]


def test_kinds_that_nobody_knows_are_files_of_which_none_is_read(tmp_path):
    path = built(tmp_path / "a.tar", ("x", b"Z", 700, b"x" * 700), ("d/", b"\0", 0, b""), ("b.wav", b"0", 3, b"bcd"))
    assert list(TarMembers(path).members) == ["b.wav"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar")
@pytest.mark.parametrize("format", ["gnu", "oldgnu", "posix"])
def test_sparse_files_are_refused(tmp_path, format):
    with (tmp_path / "sparse.wav").open("wb") as file:
        for position in range(0, 2_000_000, 100_000):  # more pieces than a header holds
            file.seek(position)
            file.write(b"x" * 5000)
    tar = ["tar", "-S", f"--format={format}", "-C", str(tmp_path), "-cf", str(tmp_path / "a.tar"), "sparse.wav"]
    if subprocess.run(tar, capture_output=True).returncode:
        pytest.skip("this tar is not GNU's")
    if (tmp_path / "a.tar").stat().st_size > 1_000_000:
        pytest.skip("this file system has no holes")
    with pytest.raises(DataError, match=r"a\.tar holds a sparse file, 'sparse\.wav'"):
        TarMembers(str(tmp_path / "a.tar"))


def test_a_name_outside_of_the_shard_is_a_name(tmp_path):
    path = built(tmp_path / "a.tar", ("../../etc/passwd", b"0", 3, b"abc"), ("/etc/shadow", b"0", 3, b"bcd"))
    assert TarMembers(path).read("../../etc/passwd") == b"abc"
    assert list(TarMembers(path).members) == ["../../etc/passwd", "/etc/shadow"]


def test_code_in_a_shard_is_bytes(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    content = pickle.dumps(Evil())
    path = write(tmp_path / "a.tar", [("a.pkl", content), ("a.pt", content), ("a.pyd", content)])
    shard = TarMembers(path)
    assert {shard.read(name) for name in shard.members} == {content}
    assert not (tmp_path / "ran").exists()


def test_sums_of_signed_bytes_are_sums(tmp_path):
    path = write(tmp_path / "a.tar", [("\xfc.wav", b"abc")], tarfile.GNU_FORMAT)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    high = sum(byte > 127 for byte in content[:512])
    assert high
    content[148:156] = b"%06o\0 " % (int(content[148:154], 8) - 256 * high)
    (tmp_path / "a.tar").write_bytes(content)
    assert reference(path) == {"\xfc.wav": b"abc"}
    assert TarMembers(path).read("\xfc.wav") == b"abc"


def test_of_two_of_a_name_the_last_counts(tmp_path):
    path = write(tmp_path / "a.tar", [("a.wav", b"old"), ("./a.wav", b"new")])
    assert TarMembers(path).read("a.wav") == b"new"


def test_a_tar_without_its_end_is_read(tmp_path):
    path = write(tmp_path / "a.tar", [("a.wav", b"x" * 512)])
    content = (tmp_path / "a.tar").read_bytes()[:1024]
    (tmp_path / "a.tar").write_bytes(content)
    assert TarMembers(path).read("a.wav") == b"x" * 512


@pytest.mark.parametrize("kept", [1600, 1536 + 600, 1024 + 100])
def test_a_cut_off_tar_names_the_last_whole_member(tmp_path, kept):
    path = write(tmp_path / "a.tar", [("a.wav", b"x" * 500), ("b.wav", b"y" * 900)])
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a\.tar is cut off: .*last whole member is 'a\.wav'"):
        TarMembers(path)


def test_compressed_and_other_files_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(gzip.compress(b"x" * 1000))
    with pytest.raises(DataError, match="is compressed; unpack it with gunzip"):
        TarMembers(str(path))
    path.write_bytes(b"<html>" * 500)
    with pytest.raises(DataError, match="not a tar file, or a damaged one"):
        TarMembers(str(path))
    with pytest.raises(DataError, match=r"gone\.tar cannot be read: No such file"):
        TarMembers(str(tmp_path / "gone.tar"))


def test_a_header_with_a_wrong_sum_is_refused(tmp_path):
    path = write(tmp_path / "a.tar", [("a.wav", b"x")])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[3] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        TarMembers(path)


def patched(header, start, field):
    """Return a header with a field replaced and its checksum corrected."""
    changed = bytearray(header)
    changed[start : start + len(field)] = field
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


@pytest.mark.parametrize("size", [b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"77777777777\0"])
def test_giant_and_negative_sizes_are_refused_before_anything_is_read(tmp_path, size):
    path = tmp_path / "a.tar"
    write(path, [("a.wav", b"x")])
    content = path.read_bytes()
    path.write_bytes(patched(content[:512], 124, size) + content[512:])
    with pytest.raises(DataError, match=r"cut off|damaged"):
        TarMembers(str(path))


def test_sizes_of_pax_records_count(tmp_path):
    """Files beyond 8 GiB have such records, because their size does not fit into the header's own field."""
    path = built(
        tmp_path / "a.tar", ("x", b"x", 11, b"11 size=03\n"), ("a.wav", b"0", 0, b"abc"), ("b.wav", b"0", 1, b"d")
    )
    content = (tmp_path / "a.tar").read_bytes()
    assert reference(path) == {"a.wav": b"abc", "b.wav": b"d"}
    shard = TarMembers(path)
    assert {name: shard.read(name) for name in shard.members} == {"a.wav": b"abc", "b.wav": b"d"}
    (tmp_path / "a.tar").write_bytes(content.replace(b"11 size=03\n", b"11 size=9e\n"))
    with pytest.raises(DataError, match="damaged"):
        TarMembers(path)
    (tmp_path / "a.tar").write_bytes(content.replace(b"11 size=03\n", b"11 size=-9\n"))
    with pytest.raises(DataError, match="cut off"):
        TarMembers(path)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_names_and_records_without_end_are_refused(tmp_path, kind):
    path = built(tmp_path / "a.tar", ("x", kind, 2 << 20, bytes(2 << 20)), ("a.wav", b"0", 1, b"a"))
    with pytest.raises(DataError, match=r"damaged one: a name or PAX header of 2,097,152 bytes"):
        TarMembers(path)


def test_random_damage_ends_in_an_error_or_in_an_index(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [(f"{number}.wav", b"x" * 700) for number in range(4)], tarfile.PAX_FORMAT)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 20):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            shard = TarMembers(str(path))
        except DataError:
            continue
        for name in shard.members:
            shard.read(name)


def test_a_hundred_thousand_members(tmp_path):
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("000000.wav")
    info.size = 1
    header = info.tobuf(tarfile.USTAR_FORMAT)
    with path.open("wb") as file:
        for number in range(100_000):
            digits = b"%06d" % number
            sum_of = int(header[148:154], 8) + sum(digits) - 6 * ord("0")
            file.write(digits + header[6:148] + b"%06o\0 " % sum_of + header[156:] + b"x" + bytes(511))
        file.write(bytes(1024))
    shard = TarMembers(str(path))
    assert len(shard.members) == 100_000
    assert shard.members["099999.wav"] == (99_999 * 1024 + 512, 1)


def test_threads_and_forks_read_what_they_ask_for(tmp_path):
    contents = [bytes([number]) * 50_000 for number in range(20)]
    shard = TarMembers(write(tmp_path / "a.tar", [(f"{n}.wav", content) for n, content in enumerate(contents)]))

    def read() -> None:
        with ThreadPoolExecutor(4) as pool:
            numbers = [number % 20 for number in range(200)]
            assert all(
                content == contents[number]
                for number, content in zip(numbers, pool.map(lambda n: shard.read(f"{n}.wav"), numbers), strict=True)
            )

    children = [multiprocessing.get_context("fork").Process(target=read) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    read()


def test_a_shard_goes_to_other_processes_without_its_descriptor(tmp_path):
    shard = pickle.loads(pickle.dumps(TarMembers(write(tmp_path / "a.tar", [("a.wav", b"abc")]))))
    assert shard.read("a.wav") == b"abc"


def test_a_shard_that_shrinks_is_noticed(tmp_path):
    path = write(tmp_path / "a.tar", [("a.wav", b"x" * 5000)])
    shard = TarMembers(path)
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="has become shorter"):
        shard.read("a.wav")


def test_another_shard_of_the_name_is_noticed(tmp_path):
    path = write(tmp_path / "a.tar", [("a.wav", b"x" * 5000)])
    packed = pickle.dumps(TarMembers(path))
    write(tmp_path / "a.tar", [("a.wav", b"x" * 50_000)])
    with pytest.raises(DataError, match="has changed since it was opened"):
        pickle.loads(packed).read("a.wav")


def test_a_remote_shard_is_fetched_again_where_its_copy_is_gone(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", [("a.wav", b"abc")])
    fetched = []

    def local_copy(address):
        fetched.append(address)
        return path

    monkeypatch.setattr(tar_members.addresses, "local_copy", local_copy)
    packed = pickle.dumps(TarMembers("s3://bucket/a.tar"))
    assert pickle.loads(packed).read("a.wav") == b"abc"
    assert fetched == ["s3://bucket/a.tar"] * 2


def test_few_shards_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_members, "_OPEN_SHARDS", 2)
    paths = [write(tmp_path / f"{number}.tar", [("a.wav", bytes([number]))]) for number in range(4)]
    first = open_shard(paths[0])
    assert open_shard(paths[0]) is first
    for path in paths:
        assert open_shard(path).read("a.wav") == bytes([paths.index(path)])
    assert len(tar_members._opened) == 2
    assert open_shard(paths[0]) is not first
