"""An iterator that is worked through by a thread, one item ahead of who uses it."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

_LOOK = 0.1  # s between looks whether the items are still wanted
_ITEM, _ERROR, _END = range(3)


def ahead(items: Iterator[Item], prepare: Callable[[], object] = lambda: None) -> Iterator[Item]:
    """The same items and the same error; `prepare` is called first in the thread.

    When this iterator is closed or let go, the thread ends with the item that it has in hand.
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
            del item  # not kept while the next one is waited for
    finally:
        unwanted.set()
        if not sys.is_finalizing():  # when threads no longer run
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
