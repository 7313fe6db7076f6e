"""Pool of worker processes. A worker that crashes, such as in a decoder, costs one file and not the whole run.

Each worker is a new Python process that communicates over a socket. Nothing is forked, so threads of the caller do no
harm, and a worker imports only the modules that its tasks need.
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

_AHEAD = 8  # finished tasks per worker that may wait because an earlier task is not finished
_LOOK = 1.0  # s between checks of the time limits
_ENDING = 5.0  # s to wait for a killed process to end
_SMALL = 1 << 15  # bytes; a smaller task may be sent to a busy worker, where it waits in the socket
_DONE, _RAISED = 0, 1


@dataclass(frozen=True, slots=True)
class Died:
    """Result of a task whose process died, for example by a crash in a decoder, a kill, or a lack of memory.

    `timed_out` is True if the pool killed the process because the task exceeded its time limit.
    """

    detail: str
    timed_out: bool = False


class Pool(Protocol):
    """Runs tasks in processes of this machine or of a cluster. Use it as a context manager."""

    jobs: int

    def in_order(
        self, work: Callable[[Task], Result], tasks: Iterable[Task], limit: Limit[Task] = None
    ) -> Iterator[Result | Died]:
        """Yield the results in the order of the tasks, whichever finishes first; only a few wait in memory.

        `work` must be a module-level function; its exceptions are raised here. `limit` returns the time limit of a
        task in seconds, after which its process is killed; without `limit`, a task may take any time.
        """

    def __enter__(self) -> Pool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def local_pool(jobs: int) -> Pool:
    """Return a pool of up to `jobs` processes on this machine. A process starts when there is a task for it."""
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
        again: deque[_Sent] = deque()  # tasks to send again: they waited behind the one that killed their worker
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
                            seconds = math.inf if limit is None else limit(content)  # type: ignore[arg-type]  # a task of this call
                            task = _Sent(number, pickle.dumps((work, content)), seconds)
                    if task is None:
                        break
                    worker.give(task)
                busy = {worker.connection: worker for worker in self._workers if worker.given}
                if busy:
                    began = time.monotonic()
                    ready = wait(list(busy), None if limit is None else _LOOK)
                    passed = min(time.monotonic() - began, 2 * _LOOK)  # it is longer only if processes were suspended
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
        """Yield the workers that can take a task: idle ones first, then new ones, then ones with room for one more."""
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
        """Receive a result, or find out that the worker's first task has killed it."""
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
        """Kill a worker whose first task has exceeded its time limit."""
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
    """A process and the tasks that were sent to it; it works on the first one."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self._alive, life = os.pipe()  # the kernel closes it when this process ends in any way; the worker notices
        os.set_inheritable(self._alive, False)
        self.given: deque[_Sent] = deque()
        self._worked = 0.0  # s spent on the first task
        code = f"from nestcli.jobs.pool import serve; serve({theirs.fileno()}, {self._alive})"
        self._life = life
        self._process = subprocess.Popen(  # noqa: S603  (ourselves)
            interpreter.command(code),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # C libraries print warnings about damaged files
            pass_fds=(theirs.fileno(), self._alive),
            start_new_session=True,  # so that `stop` also kills the decoders that it has started
            env=interpreter.environment(),
        )
        theirs.close()
        os.close(self._alive)

    @property
    def has_room(self) -> bool:
        return len(self.given) == 1 and len(self.given[0].content) < _SMALL

    def give(self, task: _Sent) -> None:
        self.given.append(task)
        with contextlib.suppress(OSError):  # the worker is dead; `_take` will notice
            self.connection.send_bytes(task.content)

    def done(self) -> _Sent:
        """Remove and return the first task, which is finished."""
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a dead disk cannot end yet
            self._process.wait(_ENDING)


def serve(connection_descriptor: int, alive_descriptor: int) -> None:
    """Run a worker: process tasks until the caller closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C and then kills its workers
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
        except Exception as error:  # of any kind: the caller raises it
            reply = _raised(error)
        connection.send_bytes(reply)


def _raised(error: Exception) -> bytes:
    try:
        reply = pickle.dumps((_RAISED, error))
        pickle.loads(reply)  # noqa: S301  (an exception whose constructor needs arguments may not unpickle)
    except Exception:
        return pickle.dumps((_RAISED, RuntimeError(f"{type(error).__name__}: {error}")))
    return reply


def _end_with_the_caller(alive_descriptor: int) -> None:
    os.read(alive_descriptor, 1)
    os.killpg(0, signal.SIGKILL)
