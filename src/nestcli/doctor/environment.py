"""Checks of environment variables and the locale: one row for each setting with an unexpected effect."""

from __future__ import annotations

import locale
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from nestcli.doctor.report import Check
from nestcli.jobs.cores import available_cores

_check = partial(Check, "environment")
_PLAIN = {  # (variable, value) that slows or changes a run: its effect
    ("CUDA_LAUNCH_BLOCKING", "1"): "PyTorch waits for every GPU operation: training is much slower",
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"): "GPU memory is not cached: training is much slower",
    ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1"): "fp32 is computed in TF32 on GPUs: comparisons with NeMo will differ",
    ("NVIDIA_TF32_OVERRIDE", "1"): "fp32 is computed in TF32 on GPUs: comparisons with NeMo will differ",
    ("PYTHONOPTIMIZE", "1"): "Python skips assertions, nest's too",
}
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK")
_INTERACTIVE = ("bash", "interactive")  # names of Slurm jobs that Lightning treats as a shell


def environment_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Yield all checks of the section."""
    found = [
        *threads_check(environ, available_cores()),
        *plain_checks(environ),
        *pythonpath_check(environ),
        *other_environment_check(environ, sys.prefix),
        *torchrun_check(environ),
        *slurm_check(environ),
        *jail_check(environ),
        *cache_check(environ),
        *temporary_check(environ),
    ]
    yield from found
    if not found:
        yield _check("variables", "ok", "none with an unexpected effect")
    yield encoding_check(
        {
            "file names": sys.getfilesystemencoding(),
            "text files": locale.getpreferredencoding(False),
            "output": getattr(sys.__stdout__, "encoding", None) or "utf-8",
        }
    )


def threads_check(environ: Mapping[str, str], cores: int) -> Iterator[Check]:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        value = environ.get(name)
        if value is None:
            continue
        first = value.split(",")[0].strip()
        if not first.isdecimal() or int(first) < 1:
            yield _check(name, "note", f"{value!r} is not a number of threads", f"Unset it, or set it to {cores}.")
        elif int(first) > cores:
            words = f"{first} threads on {cores} cores: they wait for each other"
            yield _check(name, "note", words, f"Unset it, or set it to {cores} or less.")
        elif int(first) == 1 < cores:
            words = f"1 of {cores} cores: training on the CPU uses only one"
            yield _check(name, "note", words, "Unset it for training on the CPU. On GPUs it does not matter.")


def plain_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    for (name, value), effect in _PLAIN.items():
        if environ.get(name) == value:
            yield _check(name, "note", f"{value}: {effect}", f"Unset {name} unless this is intended.")


def pythonpath_check(environ: Mapping[str, str]) -> Iterator[Check]:
    """Check for folders in PYTHONPATH that hide modules of Python or nest's dependencies."""
    names = {*sys.stdlib_module_names, "torch", "lightning", "lhotse", "numpy", "omegaconf", "soundfile", "soxr", "sox"}
    for folder in filter(None, environ.get("PYTHONPATH", "").split(os.pathsep)):
        path = Path(folder)
        if not path.is_dir():
            continue
        hides = sorted(each.stem for each in path.iterdir() if each.stem in names and _is_module(each))
        if hides:
            yield _check(
                "PYTHONPATH", "note", f"{folder} comes before the installed {', '.join(hides)}",
                "Unset PYTHONPATH unless this is intended: Python may import another version than the installed one.",
            )  # fmt: skip


def _is_module(path: Path) -> bool:
    return path.suffix == ".py" or (not path.suffix and (path / "__init__.py").is_file())


def other_environment_check(environ: Mapping[str, str], prefix: str) -> Iterator[Check]:
    active = environ.get("VIRTUAL_ENV")
    if active and Path(active).resolve() != Path(prefix).resolve():
        yield _check(
            "VIRTUAL_ENV", "note", f"{active} is active, but nest runs in {prefix}",
            "pip may install into the first, while nest runs in the second: deactivate, then activate the right one.",
        )  # fmt: skip


def torchrun_check(environ: Mapping[str, str]) -> Iterator[Check]:
    """Check for variables that torchrun left behind in a shell: a run would wait for other processes."""
    there = [name for name in _RANKS if name in environ]
    if there and "TORCHELASTIC_RUN_ID" not in environ:
        words = ", ".join(f"{name}={environ[name]}" for name in there)
        yield _check(
            "torchrun", "note", f"{words}, but no torchrun: a run may be refused, or wait for other processes",
            f"Run: unset {' '.join(there)}",
        )  # fmt: skip


def slurm_check(environ: Mapping[str, str]) -> Iterator[Check]:
    """Check for a shell inside a Slurm allocation: Lightning takes it for a step of srun, except by the job's name."""
    if "SLURM_NTASKS" not in environ or environ.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return
    tasks = environ["SLURM_NTASKS"]
    if tasks == "1" or ("SLURM_STEP_ID" in environ and "SLURM_NTASKS_PER_NODE" in environ):
        return
    words = f"job {environ.get('SLURM_JOB_ID', '?')} with SLURM_NTASKS={tasks}: nest would run as one of its tasks"
    remedy = (
        "Start training with srun and --ntasks-per-node (docs/clusters.md). For one process in this shell: "
        "SLURM_JOB_NAME=bash nest pretrain ..."
    )
    yield _check("Slurm", "note", words, remedy)


def jail_check(environ: Mapping[str, str]) -> Iterator[Check]:
    folders = environ.get("NEST_JAIL")
    if not folders:
        return
    gone = [each for each in folders.split(os.pathsep) if each and not Path(each).is_dir()]
    if gone:
        remedy = "Audio outside these folders is refused: correct the path, or unset NEST_JAIL."
        yield _check("NEST_JAIL", "problem", f"folder not found: {', '.join(gone)}", remedy)
    else:
        yield _check("NEST_JAIL", "note", f"audio is read only in {folders}", "To read any audio, unset NEST_JAIL.")


def cache_check(environ: Mapping[str, str]) -> Iterator[Check]:
    """Check that the cache folder for remote files is writable and that its size limit is a number."""
    from nestcli.errors import NestError
    from nestcli.storage import cache

    if environ.get(cache.SIZE_VARIABLE):
        try:
            cache.limit()
        except NestError as error:
            remedy = f"Set {cache.SIZE_VARIABLE} to a number of gigabytes, or unset it."
            yield _check(cache.SIZE_VARIABLE, "problem", str(error), remedy)
    folder = Path(environ.get(cache.CACHE_VARIABLE) or "~/.cache/nest")
    try:
        there = next(each for each in (folder.expanduser().absolute(), *folder.expanduser().parents) if each.exists())
        writable = os.access(there, os.W_OK | os.X_OK)
    except RuntimeError:  # `~` without a home folder
        writable = False
    if not writable:
        remedy = f"Needed only for data on S3 and other servers: set {cache.CACHE_VARIABLE} to a writable folder."
        yield _check(cache.CACHE_VARIABLE, "note", f"{folder} is not writable", remedy)


def temporary_check(environ: Mapping[str, str]) -> Iterator[Check]:
    """Check TMPDIR: Python ignores a folder that does not exist and uses another one."""
    named = environ.get("TMPDIR")
    if named and not (Path(named).is_dir() and os.access(named, os.W_OK | os.X_OK)):
        words = f"{named} is not a writable folder; {tempfile.gettempdir()} is used"
        yield _check("TMPDIR", "note", words, "Create that folder, or set TMPDIR to another.")


def encoding_check(encodings: Mapping[str, str]) -> Check:
    other = [f"{what} in {name}" for what, name in encodings.items() if name.lower().replace("-", "") != "utf8"]
    if other:
        remedy = "Names and texts outside ASCII may fail: export LC_ALL=C.UTF-8 (or PYTHONUTF8=1)."
        return _check("locale", "note", f"not UTF-8: {', '.join(other)}", remedy)
    return _check("locale", "ok", "UTF-8")
