"""Asking NeMo: what a user is told when it is not there, refuses, talks out of turn or dies."""

import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from nestcli.errors import MissingDependencyError, NestError, RunFailedError
from nestcli.parity import nemo
from nestcli.parity.nemo import BridgedNemo, NemoRaisedError, NotRecordedError, RecordedNemo, find_nemo

HELLO = '{"facts": {"nemo": "3.0.0"}, "tensors": null}'


def program(folder: Path, body: str) -> str:
    """A stand-in for NeMo's Python: answers the first request, then does what `body` says."""
    path = folder / "python"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys\ninput()\nprint('{HELLO}', flush=True)\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_no_nemo_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEST_NEMO_PYTHON", raising=False)
    monkeypatch.setattr(nemo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--nemo-python PATH") as raised:
        find_nemo(None)
    assert raised.value.exit_code == 2


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(NestError, match="program not found"):
        find_nemo("/nowhere/python")


def test_an_environment_without_nemo() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"NeMo does not work there: .*No module named 'nemo'.*nemo_toolkit"
    ):
        BridgedNemo(sys.executable)


def test_an_environment_with_nothing_in_it(tmp_path: Path) -> None:
    """Its answer is a line, and no traceback of ours: `-S` leaves out all that is installed."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    with pytest.raises(MissingDependencyError, match=r"there: ModuleNotFoundError: No module named '\w+'\. Install it"):
        BridgedNemo(str(path))


def test_a_program_that_is_no_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEST_NEMO_PYTHON", "true")
    monkeypatch.setattr(nemo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="ended with 0"):
        find_nemo(None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "print('out of memory', file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)",
            r"ended with -9.*out of memory",
        ),
        ("input(); print('a banner', flush=True)", "ended with 0|sent an invalid answer"),
    ],
)
def test_nemo_dies_or_talks_out_of_turn(tmp_path: Path, body: str, message: str) -> None:
    bridge = BridgedNemo(program(tmp_path, body))
    try:
        with pytest.raises(RunFailedError, match=message) as raised:
            bridge.ask("structure", {})
        assert raised.value.exit_code == 1
    finally:
        bridge.close()


def test_nemo_refuses_and_goes_on(tmp_path: Path) -> None:
    refusal = json.dumps({"error": "ValueError: no"})
    body = f"input(); print({refusal!r}, flush=True); input(); print({HELLO!r}, flush=True)"
    bridge = BridgedNemo(program(tmp_path, body))
    try:
        with pytest.raises(NemoRaisedError, match="ValueError: no"):
            bridge.ask("structure", {}, {"features": torch.zeros(3)})
        assert bridge.ask("hello").facts["nemo"] == "3.0.0"
        folder = bridge._folder
        assert not list(folder.glob("*.safetensors")), "tensors are left behind"
    finally:
        bridge.close()
    assert not folder.exists()


def test_a_recording_knows_what_it_was_asked() -> None:
    recorded = RecordedNemo()
    assert (recorded.version, recorded.live) == ("3.0.0", False)
    with pytest.raises(NotRecordedError):
        recorded.ask("structure", {"model": {}})
