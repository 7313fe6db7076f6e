"""Processes that work through tasks and may die doing so: a decoder that crashes costs one file, not the run.

Workers are fresh interpreters that talk over sockets. Nothing is forked, so it does not matter which threads the caller
has, and nothing of the caller's is imported but what a task needs.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Protocol, TypeVar

from nestcli import interpreter

Task = TypeVar("Task")
Result = TypeVar("Result")
Limit = Callable[[Task], float] | None

_AHEAD = 8  # tasks for each worker that may wait for an earlier one's result
_LOOK = 1.0  # s between looks at tasks that may take too long
_ENDING = 5.0  # s for a killed process to go
_SMALL = 1 << 15  # bytes of a task that may wait in a socket while its worker is busy
_DONE, _RAISED = 0, 1


@dataclass(frozen=True, slots=True)
class Died:
    """Stands for the result of a task whose process died: a crash in a decoder, a kill, no memory.

    `timed_out`: it was ended because the task took longer than it may.
    """

    detail: str
    timed_out: bool = False


class Pool(Protocol):
    """Works through tasks, in processes of this machine or of a cluster. A context manager."""

    jobs: int

    def in_order(
        self, work: Callable[[Task], Result], tasks: Iterable[Task], limit: Limit[Task] = None
    ) -> Iterator[Result | Died]:
        """Results in the order of the tasks, whatever finishes first; few are ever waiting.

        `work` is a function of a module; what it raises is raised here. `limit` tells the seconds after which the
        process of a task is ended; without it a task may take for ever.
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

    def in_order(
        self, work: Callable[[Task], Result], tasks: Iterable[Task], limit: Limit[Task] = None
    ) -> Iterator[Result | Died]:
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
                        if more:
                            seconds = math.inf if limit is None else limit(content)  # type: ignore[arg-type]  # of this call's tasks
                            task = _Sent(number, pickle.dumps((work, content)), seconds)
                    if task is None:
                        break
                    worker.give(task)
                busy = {worker.connection: worker for worker in self._workers if worker.given}
                if busy:
                    began = time.monotonic()
                    ready = wait(list(busy), None if limit is None else _LOOK)
                    passed = min(time.monotonic() - began, 2 * _LOOK)  # more: this process was stopped, perhaps all
                    for connection, worker in busy.items():
                        if connection in ready:
                            self._take(worker, results, again)
                        elif worker.late(passed):
                            self._end(worker, results, again)
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
            self._lose(worker, Died(worker.cause_of_death()), results, again)
            return
        task = worker.done()
        if outcome == _RAISED:
            raise value
        results[task.number] = value

    def _end(self, worker: _Worker, results: dict[int, Any], again: deque[_Sent]) -> None:
        """End a worker whose first task has taken too long."""
        seconds = worker.given[0].seconds
        self._lose(worker, Died(f"there was no answer after {seconds:.0f} s", timed_out=True), results, again)

    def _lose(self, worker: _Worker, died: Died, results: dict[int, Any], again: deque[_Sent]) -> None:
        culprit, *behind = worker.given
        results[culprit.number] = died
        again.extend(behind)
        self._drop([worker])

    def _drop(self, workers: Iterable[_Worker]) -> None:
        for worker in list(workers):
            worker.stop()
            self._workers.remove(worker)


@dataclass(frozen=True, slots=True)
class _Sent:
    number: int
    content: bytes
    seconds: float


class _Worker:
    """A process and the tasks that it was given, the first of which it works on."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self._alive, life = os.pipe()  # closed when this process ends, however it does
        os.set_inheritable(self._alive, False)
        self.given: deque[_Sent] = deque()
        self._worked = 0.0  # s on the first of them
        code = f"from nestcli.jobs.pool import serve; serve({theirs.fileno()}, {self._alive})"
        self._life = life
        self._process = subprocess.Popen(  # noqa: S603  (ourselves)
            interpreter.command(code),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what C libraries have to say about damaged files
            pass_fds=(theirs.fileno(), self._alive),
            start_new_session=True,  # so that it can be ended with the decoders that it has started
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

    def done(self) -> _Sent:
        """Take away the first task."""
        self._worked = 0.0
        return self.given.popleft()

    def late(self, passed: float) -> bool:
        """Add `passed` seconds to the first task's time, and return True if it exceeds the task's limit."""
        self._worked += passed
        return self._worked > self.given[0].seconds

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
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk ends when that answers
            self._process.wait(_ENDING)


def serve(connection_descriptor: int, alive_descriptor: int) -> None:
    """Run a worker: do tasks until there are none left, or until the caller is gone."""
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
    os.killpg(0, signal.SIGKILL)
