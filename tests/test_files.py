"""Atomic file writing: the cause of an error is named, and paths may be written as people write them."""

import errno
import os
import resource
import signal

import pytest

from nestcli.errors import DataError, RunFailedError
from nestcli.files import atomic_file, new_folder, user_path
from nestcli.jobs.journal import disk_faults_told


def test_an_error_of_a_source_is_not_one_of_the_target(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "out", DataError) as file:
        file.write((tmp_path / "source").read_bytes())
    assert caught.value.filename == str(tmp_path / "source")
    with pytest.raises(ConnectionResetError), atomic_file(tmp_path / "out", DataError):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(OSError, match="Input/output"), atomic_file(tmp_path / "out", DataError):
        raise OSError(errno.EIO, "Input/output error")  # of what was read
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "folder", DataError):
        (tmp_path / "source").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_target_are_told(tmp_path):
    with (
        pytest.raises(DataError, match="out cannot be written: No space left"),
        atomic_file(tmp_path / "out", DataError),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(DataError, match="folder cannot be written: No such file"),
        new_folder(tmp_path / "folder", DataError) as folder,
    ):
        (folder / "a" / "b").write_bytes(b"")
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="below cannot be written: File exists"),
        atomic_file(tmp_path / "file" / "below", DataError),
    ):
        pass


def writes_with_an_error_of_its_own(file):
    try:
        file.write(bytes(1 << 20))
    except OSError:
        raise OSError("encoder error -2") from None


def test_a_write_that_fails_is_one_of_the_target_whatever_the_body_makes_of_it(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        with (
            pytest.raises(DataError, match="out cannot be written: File too large"),
            atomic_file(tmp_path / "out", DataError) as file,
        ):
            writes_with_an_error_of_its_own(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_source_that_a_disk_cannot_read_is_told_so(tmp_path):
    with (
        pytest.raises(RunFailedError, match=r"^/corpus/a\.wav cannot be read: Input/output error"),
        disk_faults_told(tmp_path),
    ):
        raise OSError(errno.EIO, "Input/output error", "/corpus/a.wav")
    with pytest.raises(RunFailedError, match="x cannot be written: Input/output error"), disk_faults_told(tmp_path):
        raise OSError(errno.EIO, "Input/output error", str(tmp_path / "x"))


HOME = os.path.expanduser("~")  # noqa: PTH111


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", HOME),
        ("~/a b", f"{HOME}/a b"),
        ("~nobody-of-that-name/a", "~nobody-of-that-name/a"),
        ("a/~/b", "a/~/b"),
        ("./~", "./~"),
        ("file:///a%20b/c", "/a b/c"),
        ("file://localhost/a", "/a"),
        ("file:/a", "/a"),
        ("file://server/a", "file://server/a"),
        ("file:a", "file:a"),
        ("s3://bucket/~", "s3://bucket/~"),
        ("$HOME/a", "$HOME/a"),
        ("~\0", "~\0"),
        ("", ""),
    ],
)
def test_paths_as_persons_write_them(written, meant):
    assert user_path(written) == meant
