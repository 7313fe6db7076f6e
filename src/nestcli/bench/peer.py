"""Processes that are measured: ours, and NeMo's in the Python of another environment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nestcli import interpreter
from nestcli.bench import side
from nestcli.errors import DataError, MissingDependencyError, NestError, RunFailedError

INSTALL = 'pip install "nemo_toolkit[asr]==3.0.0" torch==2.13.0'
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

_RETURNED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


class PeerDiedError(RunFailedError):
    """The process ended, or was ended, before it answered."""


class Peer:
    """A process that answers one request after another; a context manager that ends it.

    `one_thread` keeps libraries from starting threads of their own, as loader processes are run. `returns_memory`
    has the C library give memory back when it is freed.
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
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="nest-bench-")  # noqa: SIM115  # closed in close()
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter, or the one that the user names
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **environment,
                "PYTHONWARNINGS": "ignore",
                "TOKENIZERS_PARALLELISM": "false",
                **(_ONE_THREAD if one_thread else {}),
                **(_RETURNED if returns_memory else {}),
            },
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        """The facts that answer a request. Raises DataError, RunFailedError or PeerDiedError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"operation": operation, "parameters": parameters}) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise PeerDiedError(self._last_words()) from None
        if "error" in reply:
            if reply["kind"] is None:
                raise RunFailedError(f"{self.name}: {reply['error']}")
            raise (RunFailedError if reply["kind"] == RunFailedError.__name__ else DataError)(reply["error"])
        facts: dict[str, Any] = reply["facts"]
        return facts

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        try:
            ended = f"ended with {self._process.wait(timeout=10)}"
        except subprocess.TimeoutExpired:
            ended = "sent something that is no answer"
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()[-5:]
        return f"{self.name} {ended}; its last words: {' / '.join(lines) or 'none'}"


def our_peer(*, one_thread: bool = True, returns_memory: bool = False) -> Peer:
    """A fresh process of this environment."""
    command, name = interpreter.command("from nestcli.bench.ours import serve; serve()"), "the measuring process"
    return Peer(command, name, interpreter.environment(), one_thread=one_thread, returns_memory=returns_memory)


def nemo_peer(python: str, *, one_thread: bool = True) -> Peer:
    """A fresh process of the Python of an environment with NeMo."""
    found = shutil.which(python)
    if found is None:
        raise NestError(f"--nemo-python {python}: there is no such program. Give the path of a Python that has NeMo.")
    return Peer([found, str(Path(side.__file__))], f"the NeMo process ({python})", one_thread=one_thread)


def nemo_version(python: str) -> str:
    """The version of NeMo in another environment. Raises MissingDependencyError."""
    with nemo_peer(python) as peer:
        try:
            return str(peer.ask("hello")["version"])
        except RunFailedError as error:
            raise MissingDependencyError(
                f"--nemo-python {python}: NeMo cannot be used there: {error}. Install it there: {INSTALL}"
            ) from None
