"""Run an iterator in a thread that is one item ahead of the consumer."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_LOOK = 0.1  # s between checks that the consumer still wants items
_ITEM, _ERROR, _END = range(3)


def ahead(items: Iterator[Item], prepare: Callable[[], object] = lambda: None) -> Iterator[Item]:
    """Yield the items of an iterator, and raise its error; the thread first calls `prepare`.

    When this generator is closed or garbage-collected, the thread finishes its current item and ends.
    """
    made: queue.Queue[tuple[int, Any]] = queue.Queue(1)
    unwanted = threading.Event()
    thread = threading.Thread(target=_work, args=(items, prepare, made, unwanted), daemon=True, name="nest-ahead")
    thread.start()
    try:
        while True:
            kind, item = made.get()
            if kind == _END:
                return
            if kind == _ERROR:
                raise item
            yield item
            del item  # frees its memory while the thread waits for the next item
    finally:
        unwanted.set()
        if not sys.is_finalizing():  # threads no longer run when the interpreter shuts down
            thread.join()


def _work(
    items: Iterator[Any],
    prepare: Callable[[], object],
    made: queue.Queue[tuple[int, Any]],
    unwanted: threading.Event,
) -> None:
    def put(kind: int, item: Any = None) -> bool:
        while not unwanted.is_set():
            try:
                made.put((kind, item), timeout=_LOOK)
            except queue.Full:
                continue
            return True
        return False

    try:
        prepare()
        for item in items:
            if not put(_ITEM, item):
                return
        put(_END)
    except BaseException as error:
        put(_ERROR, error)
