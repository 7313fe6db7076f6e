"""Processes that work through tasks and may die doing so: a decoder that crashes costs one file, not the run.

Workers are fresh interpreters that talk over sockets. Nothing is forked, so it does not matter which threads the caller
has, and nothing of the caller's is imported but what a task needs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Protocol, TypeVar

from nestcli import interpreter

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 8  # tasks for each worker that may wait for an earlier one's result
_SMALL = 1 << 15  # bytes of a task that may wait in a socket while its worker is busy
_DONE, _RAISED = 0, 1


@dataclass(frozen=True, slots=True)
class Died:
    """Stands for the result of a task whose process died: a crash in a decoder, a kill, no memory."""

    detail: str


class Pool(Protocol):
    """Works through tasks, in processes of this machine or of a cluster. A context manager."""

    jobs: int

    def in_order(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result | Died]:
        """Results in the order of the tasks, whatever finishes first; few are ever waiting.

        `work` is a function of a module; what it raises is raised here.
        """

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def local_pool(jobs: int) -> Pool:
    """A pool of `jobs` processes on this machine; none is started before there is a task for it."""
    return _LocalPool(jobs)


class _LocalPool:
    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._workers: list[_Worker] = []

    def __enter__(self) -> _LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def in_order(self, work: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result | Died]:
        waiting = enumerate(tasks)
        again: deque[_Sent] = deque()  # tasks behind one that its worker died of
        results: dict[int, Result | Died] = {}
        turn = 0
        more = True
        try:
            while True:
                while turn in results:
                    yield results.pop(turn)
                    turn += 1
                for worker in self._free():
                    task = again.popleft() if again else None
                    if task is None and more and len(results) < _AHEAD * self.jobs:
                        number, content = next(waiting, (-1, None))
                        more = number >= 0
                        task = _Sent(number, pickle.dumps((work, content))) if more else None
                    if task is None:
                        break
                    worker.give(task)
                busy = {worker.connection: worker for worker in self._workers if worker.given}
                if busy:
                    for connection in wait(list(busy)):
                        self._take(busy[connection], results, again)  # type: ignore[index]
                elif not more and not again and turn not in results:
                    return
        finally:
            self._drop(worker for worker in self._workers if worker.given)

    def _free(self) -> Iterator[_Worker]:
        """Workers that may be given a task: idle ones first, new ones, then such as have little waiting for them."""
        while True:
            idle = next((worker for worker in self._workers if not worker.given), None)
            if idle is None and len(self._workers) < self.jobs:
                idle = _Worker()
                self._workers.append(idle)
            if idle is None:
                idle = next((worker for worker in self._workers if worker.has_room), None)
            if idle is None:
                return
            yield idle

    def _take(self, worker: _Worker, results: dict[int, Any], again: deque[_Sent]) -> None:
        """Receive a result, or find out that the worker died of its first task."""
        try:
            outcome, value = pickle.loads(worker.connection.recv_bytes())  # noqa: S301  (our own process)
        except (EOFError, OSError):
            culprit, *behind = worker.given
            results[culprit.number] = Died(worker.cause_of_death())
            again.extend(behind)
            self._drop([worker])
            return
        task = worker.given.popleft()
        if outcome == _RAISED:
            raise value
        results[task.number] = value

    def _drop(self, workers: Iterable[_Worker]) -> None:
        for worker in list(workers):
            worker.stop()
            self._workers.remove(worker)


@dataclass(frozen=True, slots=True)
class _Sent:
    number: int
    content: bytes


class _Worker:
    """A process and the tasks that it was given, the first of which it works on."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self._alive, life = os.pipe()  # closed when this process ends, however it does
        os.set_inheritable(self._alive, False)
        self.given: deque[_Sent] = deque()
        code = f"from nestcli.data.pool import serve; serve({theirs.fileno()}, {self._alive})"
        self._life = life
        self._process = subprocess.Popen(  # noqa: S603  (ourselves)
            interpreter.command(code),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what C libraries have to say about damaged files
            pass_fds=(theirs.fileno(), self._alive),
            env=interpreter.environment(),
        )
        theirs.close()
        os.close(self._alive)

    @property
    def has_room(self) -> bool:
        return len(self.given) == 1 and len(self.given[0].content) < _SMALL

    def give(self, task: _Sent) -> None:
        self.given.append(task)
        with contextlib.suppress(OSError):  # dead: its end of the socket tells
            self.connection.send_bytes(task.content)

    def cause_of_death(self) -> str:
        self._process.wait()
        code = self._process.returncode
        if code >= 0:
            return f"its process ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process was ended by signal {-code}"

    def stop(self) -> None:
        self.connection.close()
        os.close(self._life)
        self._process.kill()
        self._process.wait()


def serve(connection_descriptor: int, alive_descriptor: int) -> None:
    """What a worker does: tasks until there are no more, or until the caller is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who then ends us
    threading.Thread(target=_end_with_the_caller, args=(alive_descriptor,), daemon=True).start()
    connection: Connection[Any, Any] = Connection(connection_descriptor)
    while True:
        try:
            content = connection.recv_bytes()
        except EOFError:
            return
        try:
            work, task = pickle.loads(content)  # noqa: S301  (from our caller)
            reply = pickle.dumps((_DONE, work(task)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # goes to the caller, whatever it is
            reply = _raised(error)
        connection.send_bytes(reply)


def _raised(error: Exception) -> bytes:
    try:
        reply = pickle.dumps((_RAISED, error))
        pickle.loads(reply)  # noqa: S301  (exceptions with arguments of their own may not come back)
    except Exception:
        return pickle.dumps((_RAISED, RuntimeError(f"{type(error).__name__}: {error}")))
    return reply


def _end_with_the_caller(alive_descriptor: int) -> None:
    os.read(alive_descriptor, 1)
    os._exit(1)
