"""Items made by a thread ahead of their use."""

import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from nestcli.jobs.prefetch_thread import ahead


def threads() -> int:
    return sum(thread.name == "nest-ahead" for thread in threading.enumerate())


def counted(made: list[int], count: int = 1000) -> Iterator[int]:
    for number in range(count):
        made.append(number)
        yield number


def test_the_same_items_and_an_end() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))
    assert list(ahead(iter(()))) == []
    assert threads() == 0


def test_the_next_item_is_made_while_one_is_used_and_no_further_one() -> None:
    made: list[int] = []
    items = ahead(counted(made))
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert made == [0, 1]  # in use, ready
    items.close()  # type: ignore[attr-defined]
    assert threads() == 0


def test_an_error_comes_where_its_item_would() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("corrupt")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="corrupt"):
        next(items)
    assert threads() == 0


def test_an_error_of_the_preparation_comes_first() -> None:
    def prepare() -> None:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        list(ahead(iter([1]), prepare))


def test_the_thread_is_prepared_and_is_not_the_callers() -> None:
    seen: list[int] = []

    def items() -> Iterator[int]:
        seen.append(threading.get_ident())
        yield 1

    assert list(ahead(items(), lambda: seen.append(threading.get_ident()))) == [1]
    assert seen[0] == seen[1] != threading.get_ident()


def test_items_that_are_let_go_end_the_thread() -> None:
    items = ahead(counted([]))
    next(items)
    del items
    assert threads() == 0


def test_an_item_that_was_given_back_is_kept_nowhere() -> None:
    class Large:
        pass

    made: list[weakref.ref[Large]] = []

    def large() -> Iterator[Large]:
        for _ in range(5):
            item = Large()
            made.append(weakref.ref(item))
            yield item
            del item

    items = ahead(large())
    for count in range(1, 5):
        next(items)
        deadline = time.monotonic() + 5
        while len(made) <= count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [each() is not None for each in made[: count + 1]] == [False] * (count - 1) + [True, True]
