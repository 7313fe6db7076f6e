"""The pool: order, deaths, exceptions, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from nestcli.jobs.pool import Died, local_pool


def square(number):
    time.sleep(0.002 * (number % 3))
    return number * number


def fragile(number):
    if number % 10 == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number % 10 == 7:
        os._exit(5)
    return number


def picky(number):
    if number == 4:
        raise ValueError("four")
    return number


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(one + two)


def odd(number):
    raise OddError("a", "b")


def large(size):
    return b"x" * size


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_the_order_of_the_tasks(jobs):
    with local_pool(jobs) as pool:
        assert list(pool.in_order(square, range(100))) == [number * number for number in range(100)]
        assert list(pool.in_order(square, range(5))) == [0, 1, 4, 9, 16]
        assert list(pool.in_order(square, [])) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_death_costs_its_own_task_only(jobs):
    with local_pool(jobs) as pool:
        results = list(pool.in_order(fragile, range(25)))
    assert [each for each in results if not isinstance(each, Died)] == [n for n in range(25) if n % 10 not in (3, 7)]
    assert "SIGSEGV" in results[3].detail
    assert "exit code 5" in results[7].detail


def test_what_the_work_raises_is_raised_here():
    with local_pool(2) as pool:
        with pytest.raises(ValueError, match="four"):
            list(pool.in_order(picky, range(100)))
        with pytest.raises(RuntimeError, match="OddError: ab"):
            list(pool.in_order(odd, range(3)))
        assert list(pool.in_order(picky, range(4))) == [0, 1, 2, 3]


def test_tasks_are_taken_as_they_are_needed():
    taken = 0

    def tasks():
        nonlocal taken
        for number in count():
            taken = number
            yield number

    with local_pool(2) as pool:
        results = pool.in_order(square, tasks())
        assert [next(results) for _ in range(10)] == [number * number for number in range(10)]
        assert taken < 10 + 2 * 8 + 4
        results.close()


def test_results_may_be_large():
    with local_pool(2) as pool:
        assert [len(each) for each in pool.in_order(large, [10_000_000] * 6)] == [10_000_000] * 6


def test_workers_end_with_a_caller_that_is_killed(tmp_path: Path):
    script = (
        "import time\n"
        "from nestcli.jobs.pool import local_pool\n"
        "with local_pool(2) as pool:\n"
        "    for pid in pool.in_order(time.sleep, [0.0, 0.0, 600, 600]):\n"
        "        print('ready', flush=True)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert [caller.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        workers = children_of(caller.pid)
        assert len(workers) == 2
    finally:
        caller.kill()
        caller.communicate()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def children_of(pid: int) -> list[int]:
    if not Path("/proc").is_dir():
        pytest.skip("there is no /proc to look at processes")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(folder.name))
    return found


def stopped(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGSTOP)  # as by a disk that does not answer
    return number


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_task_that_gives_no_answer_costs_itself_only(jobs):
    with local_pool(jobs) as pool:
        results = list(pool.in_order(stopped, range(5), lambda _: 3.0))
    assert results == [0, 1, Died("there was no answer after 3 s", timed_out=True), 3, 4]


def patient(number):
    time.sleep(1.2)
    return number


def test_the_limit_is_of_each_task_not_of_all():
    with local_pool(1) as pool:
        assert list(pool.in_order(patient, range(4), lambda _: 3.0)) == [0, 1, 2, 3]
        assert list(pool.in_order(patient, range(2), lambda number: 60.0 if number else 0.1)) == [
            Died("there was no answer after 0 s", timed_out=True), 1
        ]  # fmt: skip


def starts_a_program(path):
    with subprocess.Popen(["sleep", "600"]) as program:
        Path(path).write_text(str(program.pid))
        program.wait()


def test_programs_that_a_task_has_started_end_with_it(tmp_path):
    with local_pool(1) as pool:
        assert next(pool.in_order(starts_a_program, [str(tmp_path / "pid")], lambda _: 2.0)).timed_out
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
