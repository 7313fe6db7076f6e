"""Pool of processes on a Ray cluster, for preparing corpora that are too large for one machine.

nestcli must be installed on the workers. The audio and the output folder must have the same paths on every machine, for
example on a shared file system.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any

from nestcli.errors import DataError, MissingDependencyError
from nestcli.jobs.pool import Died, Limit, Pool, Result, Task, local_pool

_RETRIES = 3  # for a task whose process or machine was lost
_AHEAD = 4  # tasks per processor that are submitted before the oldest one has finished
_PATIENCE = 10.0  # s to wait for a connection to the cluster's address


def ray_pool(address: str) -> Pool:
    """Return a pool on the cluster at `address`: HOST:PORT, ray://HOST:PORT, auto (this machine's) or local (new).

    Entering the pool (`with`) raises MissingDependencyError without Ray, and DataError if the connection fails.
    """
    return _RayPool(address)


class _RayPool:
    def __init__(self, address: str) -> None:
        self.address = address
        self.jobs = 1
        self._ray: Any = None

    def __enter__(self) -> _RayPool:
        try:
            ray: Any = import_module("ray")
        except ImportError:
            raise MissingDependencyError(
                '--ray needs Ray, which is not installed. Run pip install "nestcli[ray]".'
            ) from None
        _check_reachable(self.address)
        try:
            ray.init(
                address=None if self.address == "local" else self.address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                ignore_reinit_error=True,
            )
        except Exception as error:  # connection errors of several kinds
            raise DataError(
                f"--ray {self.address}: cannot connect to a cluster: {' '.join(str(error).split())[:200]}"
            ) from None
        self._ray = ray
        self.jobs = max(1, int(ray.cluster_resources().get("CPU", 1)))
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def in_order(
        self, work: Callable[[Task], Result], tasks: Iterable[Task], limit: Limit[Task] = None
    ) -> Iterator[Result | Died]:
        ray = self._ray
        run = ray.remote(num_cpus=1, max_retries=_RETRIES)(_within)
        waiting: deque[Any] = deque()
        try:
            for task in tasks:
                waiting.append(run.remote(work, task, 0.0 if limit is None else limit(task)))
                if len(waiting) > _AHEAD * self.jobs:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any) -> Any:
        ray = self._ray
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:  # the task's process died in every attempt
            return Died(f"its process was lost {1 + _RETRIES} times on the cluster ({type(error).__name__})")


def _within(work: Callable[[Task], Result], task: Task, seconds: float) -> Result | Died:
    """Run a task on a machine of the cluster.

    With a limit (`seconds` above 0), a child process of the Ray worker runs the task and is killed after that time.
    The child stays for further tasks, and ends together with the Ray worker.
    """
    if not seconds:
        return work(task)
    return next(_own_process().in_order(work, [task], lambda _: seconds))


@lru_cache(maxsize=1)
def _own_process() -> Pool:
    return local_pool(1)


def _check_reachable(address: str) -> None:
    """Raise DataError if nothing listens at the address: Ray itself would retry for minutes."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if address in ("local", "auto"):
        return
    if not found or not port.isdigit():
        raise DataError(f"--ray {address}: give HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()
    except OSError as error:
        raise DataError(
            f"--ray {address}: nothing responds there ({error}). Is the cluster running (`ray status`)?"
        ) from None
