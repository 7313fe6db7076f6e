"""Clients of NeMo: in this process, in another environment's process, or in a recording.

Each supports the operations of `worker.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestcli.conversation import INSTALL_NEMO, Conversation, nemo_python, nemo_unusable
from nestcli.errors import MissingDependencyError, NestError
from nestcli.parity import worker

FACTS = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Answer:
    """NeMo's answer to one request."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


class NemoRaisedError(Exception):
    """NeMo raised an error for a request."""


class NotRecordedError(Exception):
    """The recording has no answer to a request; a live NeMo would have one."""


class Nemo(Protocol):
    """Interface to NeMo, wherever it runs."""

    version: str
    live: bool

    def ask(
        self, operation: str, parameters: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Answer: ...

    def close(self) -> None: ...


def find_nemo(python: str | None) -> Nemo:
    """Return a live NeMo: in the environment of `python` if given, else in this process. Raises NestError."""
    if python is None and importlib.util.find_spec("nemo") is None:
        python = os.environ.get("NEST_NEMO_PYTHON") or None
    if python is not None:
        return BridgedNemo(python)
    if importlib.util.find_spec("nemo") is None:
        raise MissingDependencyError(
            "--nemo: NeMo is not installed in this environment. Give the Python of one that has it: "
            "--nemo-python PATH or NEST_NEMO_PYTHON=PATH. "
            f"To create one: python3 -m venv nemo && nemo/bin/{INSTALL_NEMO}"
        )
    return ImportedNemo()


class ImportedNemo:
    """NeMo in this process."""

    live = True

    def __init__(self) -> None:
        self.version = str(self.ask("hello").facts["nemo"])

    def ask(
        self, operation: str, parameters: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Answer:
        with contextlib.redirect_stdout(sys.stderr):
            try:
                return Answer(*worker.answer(operation, dict(parameters or {}), dict(tensors or {})))
            except Exception as error:
                raise NemoRaisedError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        worker.forget()


class BridgedNemo:
    """NeMo in a process of another environment's Python; tensors are exchanged in safetensors files."""

    live = True

    def __init__(self, python: str) -> None:
        self.python = nemo_python(python)
        self._folder = Path(tempfile.mkdtemp(prefix="nest-compare-"))
        self._requests = 0
        command = [self.python, worker.__file__, str(self._folder)]
        self._process = Conversation(command, f"the NeMo process ({self.python})", os.environ)
        try:
            self.version = str(self.ask("hello").facts["nemo"])
        except (NemoRaisedError, NestError) as error:
            self.close()
            raise nemo_unusable(python, error) from None

    def ask(
        self, operation: str, parameters: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Answer:
        self._requests += 1
        given = self._folder / f"request-{self._requests}.safetensors"
        if tensors:
            save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, given)
        request = {"operation": operation, "parameters": parameters or {}, "tensors": str(given) if tensors else None}
        reply = self._process.exchange(request)
        given.unlink(missing_ok=True)
        if "error" in reply:
            raise NemoRaisedError(reply["error"])
        found: dict[str, Tensor] = {}
        if reply["tensors"]:
            found = load_file(reply["tensors"])
            Path(reply["tensors"]).unlink()
        return Answer(reply["facts"], found)

    def close(self) -> None:
        self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)


# ---- recordings --------------------------------------------------------------------------------------------------


class RecordedNemo:
    """NeMo's recorded answers (see `record.py`) to the requests for one fixed small model."""

    live = False

    def __init__(self, folder: Path = FACTS) -> None:
        with safe_open(folder / "answers.safetensors", framework="pt") as file:
            self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        self._facts: dict[str, dict[str, Any]] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
        self.version = str(self.ask("hello").facts["nemo"])

    def ask(
        self, operation: str, parameters: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Answer:
        key = request_key(operation, parameters or {})
        if key not in self._facts:
            raise NotRecordedError(operation)
        prefix = f"{key}/"
        found = {name.removeprefix(prefix): value for name, value in self._tensors.items() if name.startswith(prefix)}
        return Answer(self._facts[key], found)

    def close(self) -> None:
        pass


class RecordingNemo:
    """Forwards requests to a live NeMo and keeps its answers."""

    live = False  # so that sections send only the requests that they send to a recording

    def __init__(self, nemo: Nemo) -> None:
        self.nemo, self.version = nemo, nemo.version
        self.facts: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.ask("hello")

    def ask(
        self, operation: str, parameters: Mapping[str, Any] | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Answer:
        answer = self.nemo.ask(operation, parameters, tensors)
        key = request_key(operation, parameters or {})
        self.facts[key] = answer.facts
        self.tensors |= {f"{key}/{name}": value for name, value in answer.tensors.items()}
        return answer

    def close(self) -> None:
        self.nemo.close()


def request_key(operation: str, parameters: Mapping[str, Any]) -> str:
    """Return a request's name in a recording; its tensors need no name, as they follow from the recorded subject."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return f"{operation}-{digest}"
