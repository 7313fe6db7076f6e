"""The cache with several processes: one makes each copy, and a process that dies blocks nobody."""

import multiprocessing
import os
import signal
import time

import pytest

from nestcli.errors import NestError
from nestcli.storage import cache

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forks beside threads that tests before left
CONTEXT = multiprocessing.get_context("fork")
NAME = "0" * 32 + "-a.tar"


def note(folder, what):
    (folder / f"{what}-{os.getpid()}").touch()


def noted(folder, what):
    return len(list(folder.glob(f"{what}-*")))


def slowly(folder, seconds=0.3):
    def write(file):
        note(folder, "started")
        file.write(b"x" * 500)
        file.flush()
        time.sleep(seconds)
        file.write(b"y" * 500)
        return True

    return write


def start(*arguments):
    child = CONTEXT.Process(target=cache.make, args=arguments)
    child.start()
    return child


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_many_processes_one_makes_the_copy(tmp_path):
    copy = tmp_path / "cache" / NAME
    children = [start(copy, 1000, 10**6, slowly(tmp_path)) for _ in range(6)]
    for child in children:
        child.join(20)
    assert [child.exitcode for child in children] == [0] * 6
    assert noted(tmp_path, "started") == 1
    assert copy.read_bytes() == b"x" * 500 + b"y" * 500
    assert list(copy.parent.iterdir()) == [copy]


def test_who_dies_does_not_stop_the_others(tmp_path):
    copy = tmp_path / "cache" / NAME
    first = start(copy, 1000, 10**6, slowly(tmp_path, 60))
    wait_for(lambda: noted(tmp_path, "started") == 1)
    second = start(copy, 1000, 10**6, slowly(tmp_path))
    time.sleep(0.2)
    assert noted(tmp_path, "started") == 1  # it waits
    os.kill(first.pid, signal.SIGKILL)
    first.join(10)
    second.join(10)
    assert second.exitcode == 0
    assert noted(tmp_path, "started") == 2
    assert copy.read_bytes() == b"x" * 500 + b"y" * 500
    assert list(copy.parent.iterdir()) == [copy]


def test_a_process_forked_while_a_copy_is_made_does_not_keep_the_lock(tmp_path):
    copy = tmp_path / NAME
    children = []

    def write(file):
        child = CONTEXT.Process(target=time.sleep, args=(60,))
        child.start()
        children.append(child)
        return bool(file.write(b"x"))

    assert cache.make(copy, 1, 10**6, write)
    with cache._locked(copy) as file:
        assert file is not None
    children[0].kill()
    children[0].join()


def test_who_fails_leaves_nothing(tmp_path):
    copy = tmp_path / "cache" / NAME

    def write(file):
        file.write(b"x" * 100)
        raise KeyError

    with pytest.raises(KeyError):
        cache.make(copy, 1000, 10**6, write)
    assert list(copy.parent.iterdir()) == []


def aged(folder, number, size, age):
    path = folder / f"{number:032x}-{number}.tar"
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age,) * 2)
    return path


def make(folder, number, size, limit):
    copy = folder / f"{number:032x}-{number}.tar"
    cache.make(copy, size, limit, lambda file: bool(file.write(bytes(size))))
    return copy


def test_what_was_used_longest_ago_makes_room(tmp_path):
    old, older, oldest = (aged(tmp_path, number, 100, 1000 * number) for number in (1, 2, 3))
    cache.touch(oldest)
    new = make(tmp_path, 9, 100, 250)
    assert sorted(tmp_path.iterdir()) == sorted([oldest, new])
    assert not old.exists()
    assert not older.exists()


def test_what_is_not_ours_stays(tmp_path):
    (tmp_path / "thesis.txt").write_bytes(bytes(1000))
    os.utime(tmp_path / "thesis.txt", (0, 0))
    make(tmp_path, 1, 100, 150)
    assert (tmp_path / "thesis.txt").exists()


def test_rests_of_the_dead_make_room_first_when_old(tmp_path):
    rest = aged(tmp_path, 1, 100, 5000)
    rest = rest.rename(rest.with_name(rest.name + ".part"))
    kept = aged(tmp_path, 2, 100, 1000)
    make(tmp_path, 3, 100, 250)
    assert not rest.exists()
    assert kept.exists()


def test_what_was_asked_for_just_now_stays_over_the_limit(tmp_path):
    fresh = aged(tmp_path, 1, 100, 5)
    make(tmp_path, 2, 100, 150)
    assert fresh.exists()


def hold_and_wait(copy, folder):
    assert cache.hold(copy)
    note(folder, "holding")
    time.sleep(60)


def test_what_a_process_holds_stays_until_it_ends(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    held = aged(folder, 1, 100, 5000)
    child = CONTEXT.Process(target=hold_and_wait, args=(held, tmp_path))
    child.start()
    wait_for(lambda: noted(tmp_path, "holding") == 1)
    make(folder, 2, 100, 150)
    assert held.exists()
    child.kill()
    child.join()
    make(folder, 3, 100, 150)
    assert not held.exists()


def test_what_is_open_is_read_after_it_was_removed(tmp_path):
    with aged(tmp_path, 1, 100, 5000).open("rb") as file:
        make(tmp_path, 2, 100, 150)
        assert len(list(tmp_path.iterdir())) == 1
        assert len(file.read()) == 100


def test_a_copy_that_is_gone_is_neither_used_nor_held(tmp_path):
    assert not cache.touch(tmp_path / NAME)
    assert not cache.hold(tmp_path / NAME)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NestError, match=r"file cannot hold copies of remote files: .*Set \$NEST_CACHE"):
        make(tmp_path / "file", 1, 1, 10)
