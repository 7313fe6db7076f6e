"""Talk to a child process that answers requests, one line of JSON each. It runs nest's code or NeMo's."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from nestcli.errors import MissingDependencyError, NestError, RunFailedError

INSTALL_NEMO = 'pip install "nemo_toolkit[asr]==3.0.0" torch==2.13.0'
_QUIET = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
_LAST_LINES = 5  # lines of stderr that the error message quotes when the process dies
_PATIENCE = 10.0  # s between asking a process to end and killing it


class DiedError(RunFailedError):
    """The process ended or was killed before it answered; `status` is its exit status, `lines` its last output.

    `late` is True if nest killed it because the answer took too long.
    """

    def __init__(
        self, message: str, status: int | None = None, lines: Sequence[str] = (), *, late: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.lines, self.late = status, lines, late


class Conversation:
    """A process that reads a request from stdin and writes its answer to stdout. The context manager ends it.

    `name` is its name in messages. Raises OSError if `command` cannot be started.
    """

    def __init__(self, command: list[str], name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="nest-")  # noqa: SIM115  # closed in close()
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter, or the one that the user names
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**environment, **_QUIET},
            )
        except OSError:
            self._log.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def exchange(self, request: Mapping[str, Any], limit: float = threading.TIMEOUT_MAX) -> dict[str, Any]:
        """Return the answer to a request. Kill the process if it takes more than `limit` s. Raises DiedError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit, end)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise self._death(late.is_set()) from None
        finally:
            timer.cancel()
        return reply

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _death(self, late: bool) -> DiedError:
        try:
            status = self._process.wait(timeout=_PATIENCE)
            ended = f"ended with {status}"
        except subprocess.TimeoutExpired:
            status, ended = None, "sent an invalid answer"
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        message = f"{self.name} {ended}; its last words: {' / '.join(lines) or 'none'}"
        return DiedError(message, status, lines, late=late)


def nemo_python(python: str) -> str:
    """Return the full path of the program that `--nemo-python` names. Raises NestError."""
    found = shutil.which(python)
    if found is None:
        raise NestError(f"--nemo-python {python}: program not found. Give the path of a Python that has NeMo.")
    return found


def nemo_unusable(python: str, why: object) -> MissingDependencyError:
    """Return the error for a Python in which NeMo does not work."""
    return MissingDependencyError(
        f"--nemo-python {python}: NeMo does not work there: {why}. Install it there: {INSTALL_NEMO}"
    )
