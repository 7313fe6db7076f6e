"""Checks of the folders that nest writes to: free space, and file system features that checkpoints need, by trial."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from nestcli.doctor import compiler
from nestcli.doctor.machine import mount_of
from nestcli.doctor.report import Check, size
from nestcli.errors import NestError
from nestcli.files import atomic_file

_check = partial(Check, "disk")
_MIB, _GIB = 1 << 20, 1 << 30
_LARGE = 7 * _GIB  # a run of `large` keeps three checkpoints of 1.4 GB while it writes a fourth and a .nemo
Usage = Callable[[Path], "tuple[int, int, int]"]


def disk_checks(out: Path, environ: Mapping[str, str], usage: Usage = shutil.disk_usage) -> Iterator[Check]:
    """Yield all checks of the section, for results in `out`, which need not exist yet."""
    folder = existing(out)
    yield from folder_checks("results", folder, f"{out}", usage, problem_below=_GIB, note_below=_LARGE)
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        remedy = "Set TMPDIR to a writable folder: decoding, export and bench need one."
        yield _check("temporary files", "problem", str(error), remedy)
        return
    yield from folder_checks(
        "temporary files", temporary, f"{temporary}", usage, problem_below=64 * _MIB, note_below=_GIB
    )
    cache = compiler.caches(environ)
    yield cache_check(cache, existing(cache))


def existing(path: Path) -> Path:
    """Return the path itself or its nearest parent that exists."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def folder_checks(
    name: str, folder: Path, shown: str, usage: Usage, *, problem_below: int, note_below: int
) -> Iterator[Check]:
    """Check an existing folder: is it writable, its free space, and for results the file system."""
    try:
        with tempfile.TemporaryDirectory(prefix=".nest-doctor-", dir=folder) as trial:
            refused, folded = _what_fails(Path(trial)), _folds_case(Path(trial))
    except OSError as error:
        remedy = _remedy_for(name, "Fix its permissions or mount it for writing")
        yield _check(name, "problem", f"{shown} cannot be written to: {error.strerror}", remedy)
        return
    yield _room(name, folder, shown, usage(folder)[2], problem_below, note_below)
    if name == "results":
        yield from _checkpoints(refused, folded, folder)


def _room(name: str, folder: Path, shown: str, free: int, problem_below: int, note_below: int) -> Check:
    mount = mount_of(folder.resolve())
    words = f"{shown}: {size(free)} free{f' on {mount.kind}' if mount else ''}"
    if os.statvfs(folder).f_files and not os.statvfs(folder).f_favail:
        return _check(name, "problem", f"{words}, but no free inodes", "Remove files: all inodes are in use.")
    if free < problem_below:
        return _check(name, "problem", words, _remedy_for(name, "Free some space"))
    if free < note_below:
        needed = (
            "A run of `large` needs 7 GiB for its checkpoints"
            if name == "results"
            else "Decoding and compiling may need more"
        )
        return _check(name, "note", words, f"{needed}. {_remedy_for(name, 'Free some space')}")
    return _check(name, "ok", words)


def _remedy_for(name: str, first: str) -> str:
    elsewhere = "exp_manager.exp_dir or --out" if name == "results" else "TMPDIR"
    return f"{first}, or choose another folder with {elsewhere}."


def _checkpoints(refused: str, folded: bool, folder: Path) -> Iterator[Check]:
    name = "file system"
    if refused:
        remedy = "Checkpoints would fail or be truncated there. Use a local disk, NFS 4 or Lustre mounted with flock."
        yield _check(name, "problem", f"{folder}'s file system fails at {refused}", remedy)
    else:
        yield _check(name, "ok", "sync, renaming over a file, locks and mapped reads work, tried on a file")
    if folded:
        remedy = "Make sure that no two files or speakers differ only in upper and lower case."
        yield _check("capitals", "note", f"{folder} does not distinguish A from a in names", remedy)


def _what_fails(folder: Path) -> str:
    """Write and rewrite a file like a checkpoint, lock it like the cache, map it like resuming; return what fails."""
    target = folder / "checkpoint"
    step = "writing, syncing and renaming"
    try:
        for content in (b"first", b"second"):
            with atomic_file(target) as file:
                file.write(content)
        step = "reading the renamed file"
        if target.read_bytes() != b"second":
            return step
        with target.open("r+b") as file:
            step = "locking"
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            step = "mapping into memory"
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return "" if mapped[:] == b"second" else step
    except (OSError, NestError) as error:
        return f"{step}: {error}"


def _folds_case(folder: Path) -> bool:
    (folder / "capital").touch()
    return (folder / "CAPITAL").exists()


def cache_check(cache: Path, folder: Path) -> Check:
    """Check that torch.compile can write libraries to its cache folder and load them from there."""
    name, remedy = (
        "compiled code",
        "Needed only for model.encoder.compile=true: set TORCHINDUCTOR_CACHE_DIR to another folder.",
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".nest-doctor-", dir=folder):
            pass
    except OSError as error:
        return _check(name, "note", f"{cache} cannot be written to: {error.strerror}", remedy)
    mount = mount_of(folder.resolve())
    if mount is not None and "noexec" in mount.options:
        return _check(name, "note", f"{cache} is on a file system mounted with noexec", remedy)
    return _check(name, "ok", f"{cache}")
