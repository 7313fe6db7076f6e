"""Checks for `model.encoder.compile=true`: a C++ compiler, Python's headers, and on a GPU Triton.

A library with one function is compiled and loaded, as torch.compile does on a CPU. torch.compile itself is not run: it
takes half a minute the first time.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from nestcli.doctor.report import Check
from nestcli.doctor.trials import run_trials

_check = partial(Check, "devices", "torch.compile")
_SOURCE = '#include <Python.h>\n#include <omp.h>\nextern "C" int nest() { return omp_get_max_threads(); }\n'
_REMEDY = (
    "Needed only for model.encoder.compile=true. Debian: apt-get install g++ python3-dev; $CXX names another compiler."
)
_LIMIT = 60.0  # s


def compiler_check(environ: Mapping[str, str], *, has_gpu: bool) -> Check:
    """Compile and load a library; return what is missing as a note."""
    if environ.get("TORCHDYNAMO_DISABLE") == "1":
        remedy = "Unset TORCHDYNAMO_DISABLE to let model.encoder.compile=true take effect."
        return _check("note", "switched off by TORCHDYNAMO_DISABLE=1", remedy)
    compiler = _compiler(environ)
    if compiler is None:
        return _check("note", f"no C++ compiler ({environ.get('CXX') or 'g++, clang++'})", _REMEDY)
    if has_gpu and find_spec("triton") is None:
        return _check(
            "note", "Triton is not installed", "pip install triton, or PyTorch's CUDA build, which includes it."
        )
    try:
        with tempfile.TemporaryDirectory(prefix="nest-doctor-") as folder:
            library = Path(folder) / "nest.so"
            wrong = _compile(compiler, library)
            refused = "" if wrong else run_trials([f"library:{library}"])[f"library:{library}"].error
    except OSError as error:
        wrong, refused = str(error), ""
    if wrong:
        return _check("note", f"{' '.join(compiler)} cannot compile a library: {wrong}", _REMEDY)
    if refused:
        remedy = "Set TMPDIR and TORCHINDUCTOR_CACHE_DIR to folders that allow programs to run (no noexec)."
        return _check("note", f"a library that {' '.join(compiler)} compiled does not load: {refused}", remedy)
    triton = ", Triton is installed" if has_gpu else ""
    return _check("ok", f"{' '.join(compiler)} compiled a library that loads{triton}; torch.compile itself was not run")


def _compiler(environ: Mapping[str, str]) -> list[str] | None:
    """Return the command of the compiler that PyTorch would use, or None."""
    wanted = [shlex.split(environ["CXX"])] if environ.get("CXX") else [["g++"], ["clang++"]]
    return next((words for words in wanted if words and shutil.which(words[0], path=environ.get("PATH"))), None)


def _compile(compiler: list[str], library: Path) -> str:
    """Compile the test library; return the error, or an empty string."""
    source = library.with_suffix(".cpp")
    source.write_text(_SOURCE, encoding="utf-8")
    headers = sysconfig.get_paths()["include"]
    command = [*compiler, "-shared", "-fPIC", "-fopenmp", f"-I{headers}", str(source), "-o", str(library)]
    try:
        done = subprocess.run(  # noqa: S603  # the compiler that torch.compile would start
            command, capture_output=True, stdin=subprocess.DEVNULL, errors="replace", timeout=_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not finished within {_LIMIT:g} s"
    if done.returncode == 0:
        return ""
    return next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")


def caches(environ: Mapping[str, str]) -> Path:
    """Return the cache folder of torch.compile."""
    named = environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return str(os.getuid())
