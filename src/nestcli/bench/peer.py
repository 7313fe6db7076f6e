"""Start the processes that are measured: ours, and NeMo's in the Python of another environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestcli import interpreter
from nestcli.bench import side
from nestcli.conversation import Conversation, nemo_python, nemo_unusable
from nestcli.errors import DataError, RunFailedError

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_RETURNED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


class Peer(Conversation):
    """A process that answers one request after another. The context manager ends it.

    `one_thread` keeps libraries from starting threads, as in loader processes. `returns_memory` makes the C library
    return freed memory to the system.
    """

    def __init__(
        self,
        command: list[str],
        name: str,
        environment: Mapping[str, str] = os.environ,
        *,
        one_thread: bool = True,
        returns_memory: bool = False,
    ) -> None:
        added = {**(_ONE_THREAD if one_thread else {}), **(_RETURNED if returns_memory else {})}
        super().__init__(command, name, {**environment, **added})

    def __enter__(self) -> Peer:
        return self

    def ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """Send a request and return the facts of the answer. Raises DataError, RunFailedError or DiedError."""
        reply = self.exchange({"operation": operation, "parameters": parameters})
        if "error" in reply:
            if reply["kind"] is None:
                raise RunFailedError(f"{self.name}: {reply['error']}")
            raise (RunFailedError if reply["kind"] == RunFailedError.__name__ else DataError)(reply["error"])
        facts: dict[str, Any] = reply["facts"]
        return facts


def our_peer(*, one_thread: bool = True, returns_memory: bool = False) -> Peer:
    """Start a process of this environment."""
    command, name = interpreter.command("from nestcli.bench.ours import serve; serve()"), "the measuring process"
    return Peer(command, name, interpreter.environment(), one_thread=one_thread, returns_memory=returns_memory)


def nemo_peer(python: str, *, one_thread: bool = True) -> Peer:
    """Start a process of the Python of an environment with NeMo."""
    command = [nemo_python(python), str(Path(side.__file__))]
    return Peer(command, f"the NeMo process ({python})", one_thread=one_thread)


def nemo_version(python: str) -> str:
    """Return the version of NeMo in another environment. Raises MissingDependencyError."""
    with nemo_peer(python) as peer:
        try:
            return str(peer.ask("hello")["version"])
        except RunFailedError as error:
            raise nemo_unusable(python, error) from None
