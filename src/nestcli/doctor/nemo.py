"""Checks of NeMo, which is optional: for comparisons, and for training with NeMo's own encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from nestcli.doctor.report import Check
from nestcli.doctor.trials import run_trials

_check = partial(Check, "nemo")
NEMO_VARIABLE = "USE_NEMO_CONFORMER"  # not imported from nestcli.config: that needs omegaconf, which may be broken
VERSION = "3.0.0"
_PYTHON_VARIABLE = "NEST_NEMO_PYTHON"
_PACKAGES = f'"nemo_toolkit[asr]=={VERSION}" torch==2.13.0'
_INSTALL = f"python3 -m venv nemo && nemo/bin/pip install {_PACKAGES}"
_TRUE, _FALSE = ("true", "1"), ("false", "0", "")


def nemo_checks(environ: Mapping[str, str], python: str | None) -> Iterator[Check]:
    """Yield all checks of the section; `python` is the interpreter from --nemo-python."""
    wanted = environ.get(NEMO_VARIABLE, "").strip().lower()
    yield here_check(wanted)
    named = python or environ.get(_PYTHON_VARIABLE)
    if named:
        yield elsewhere_check(named, "--nemo-python" if python else f"${_PYTHON_VARIABLE}")


def here_check(wanted: str) -> Check:
    """Check NeMo in this environment; its encoder is imported only if USE_NEMO_CONFORMER asks for it."""
    if wanted not in (*_TRUE, *_FALSE):
        return _check(
            "NeMo here", "problem", f"{NEMO_VARIABLE} is {wanted!r}, which nest pretrain refuses",
            f"Set {NEMO_VARIABLE} to true or false, or unset it.",
        )  # fmt: skip
    name, trial = "NeMo here", f"nemo:{'import' if wanted in _TRUE else ''}"
    answer = run_trials([trial])[trial]
    absent = "PackageNotFoundError" in answer.error
    if wanted in _TRUE and answer.error:
        why = "not installed" if absent else answer.error
        return _check(
            name, "problem", f"{NEMO_VARIABLE} asks for NeMo's encoder, but NeMo does not work here: {why}",
            f"Unset {NEMO_VARIABLE} (nest's encoder is the same model), or run nest where NeMo is installed: "
            f"{_INSTALL}, then nemo/bin/pip install --no-deps . sox in nest's folder.",
        )  # fmt: skip
    if absent:
        return _check(name, "ok", f"not installed; optional. To compare with it: {_INSTALL}")
    if answer.error:
        return _check(name, "note", f"it is damaged: {answer.error}", f"pip install --force-reinstall {_PACKAGES}")
    tried = "its encoder was imported" if wanted in _TRUE else "not imported"
    return _version(name, answer.facts["version"], f"{answer.facts['version']}, {tried}")


def elsewhere_check(python: str, source: str) -> Check:
    """Check NeMo in the environment of another interpreter, without importing it."""
    name = source
    try:
        answer = run_trials(["nemo:"], python=python, limit=60)["nemo:"]
    except OSError as error:
        remedy = f"Give the path of a Python that has NeMo. To create one: {_INSTALL}"
        return _check(name, "problem", f"{python} cannot be started: {error.strerror}", remedy)
    if answer.error:
        if "PackageNotFoundError" in answer.error:
            remedy = f"{python} -m pip install {_PACKAGES}"
            return _check(name, "problem", f"{python}: NeMo is not installed there", remedy)
        remedy = f"Give the path of a Python that has NeMo. To create one: {_INSTALL}"
        return _check(name, "problem", f"{python}: {answer.error}", remedy)
    found = f"{python}: {answer.facts['version']} under Python {answer.facts['python']}, not imported"
    return _version(name, answer.facts["version"], found)


def _version(name: str, version: str, found: str) -> Check:
    if version == VERSION:
        return _check(name, "ok", found)
    remedy = f"nest matches NeMo {VERSION}; other versions may differ. pip install {_PACKAGES}"
    return _check(name, "note", found, remedy)
