"""Run an iterator in a thread that is one item ahead of the consumer."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_ITEM, _ERROR, _END = range(3)


def ahead(items: Iterator[Item], prepare: Callable[[], object] = lambda: None) -> Iterator[Item]:
    """Yield the items of an iterator, and raise its error; the thread first calls `prepare`.

    The thread makes an item while the consumer uses the one before, and no further ones. When this generator is closed
    or garbage-collected, the thread finishes its current item and ends.
    """
    made: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    wanted = threading.Semaphore()  # permits to make one more item
    unwanted = threading.Event()
    arguments = (items, prepare, made, wanted, unwanted)
    thread = threading.Thread(target=_work, args=arguments, daemon=True, name="nest-ahead")
    thread.start()
    try:
        while True:
            kind, item = made.get()
            if kind == _END:
                return
            if kind == _ERROR:
                raise item
            wanted.release()
            yield item
            del item  # frees its memory while the thread makes the next item
    finally:
        unwanted.set()
        wanted.release()
        if not sys.is_finalizing():  # threads no longer run when the interpreter shuts down
            thread.join()


def _work(
    items: Iterator[Any],
    prepare: Callable[[], object],
    made: queue.SimpleQueue[tuple[int, Any]],
    wanted: threading.Semaphore,
    unwanted: threading.Event,
) -> None:
    try:
        prepare()
        wanted.acquire()
        for item in items:
            made.put((_ITEM, item))
            del item
            wanted.acquire()
            if unwanted.is_set():
                return
        made.put((_END, None))
    except BaseException as error:
        made.put((_ERROR, error))
