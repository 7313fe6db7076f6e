"""Checks of nest itself, Python, and every package that nest needs: version, allowed range, import."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

import nestcli
from nestcli.doctor.report import Check
from nestcli.doctor.requirements import Requirement, installed_version, is_in_range, requirements_of
from nestcli.doctor.trials import Answer

_check = partial(Check, "installation")
_CORE = (
    "numpy", "torch", "rich", "typer", "pyyaml", "omegaconf", "soundfile", "soxr", "sox", "fsspec", "urllib3",
    "safetensors", "tensorboard", "matplotlib", "lightning", "lhotse",
)  # fmt: skip  # packages that others import come first
_MODULES = {"lightning": "lightning.pytorch", "pyyaml": "yaml"}  # if it differs from the distribution's name
_MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
_WHY = {
    "lightning": "it runs code from checkpoints that it loads itself",
    "torch": "before 2.10, weights_only=True can be bypassed",
}
_TOO_NEW = "nest uses private names of this package and was not tested with this version"
_WITH_NEMO = {"lightning": "2.4", "omegaconf": "2.3"}  # NeMo 3.0.0 pins these; nest runs with them
_EXTRAS = {
    "demo": "nest demo's voices",
    "wandb": "Weights & Biases",
    "s3": "data on S3",
    "gcs": "data on Google Cloud Storage",
    "azure": "data on Azure",
    "ray": "prepare-data --ray",
    "onnx": "export --to onnx",
    "hdf5": "extract --format hdf5",
    "dev": "tests and checks",
}
_REPAIRS = {
    "soundfile": "Debian: apt-get install libsndfile1; or pip install --force-reinstall soundfile, which includes it.",
    "torch": "pip install --force-reinstall torch. If a library is missing (such as libgomp1), install it by your "
    "system's package manager.",
}


def requirements() -> list[Requirement]:
    """Return nest's requirements. A source tree that was never installed has no metadata: names without ranges."""
    found = requirements_of("nestcli")
    return [Requirement(name, "") for name in _CORE] if found is None else found


def trials() -> list[str]:
    """Return a trial that imports each package, ordered so that the first failure is the cause of later ones."""
    core = [each.name for each in requirements() if not each.extra]
    safe = [
        name for name in core if not any(malicious_check(name, installed_version(name)))
    ]  # importing a malicious release would run it
    return [f"import:{module_of(name)}" for name in sorted(safe, key=_place)]


def module_of(name: str) -> str:
    return _MODULES.get(name, name)


def _place(name: str) -> int:
    return _CORE.index(name) if name in _CORE else len(_CORE)


def installation_checks(answers: Mapping[str, Answer]) -> Iterator[Check]:
    """Yield all checks of the section."""
    yield nest_check(Path(nestcli.__file__).parent, installed_version("nestcli"), _editable_from())
    yield from copies_check(Path(nestcli.__file__).parent, sys.path)
    yield from script_check(shutil.which("nest"), Path(sys.executable).parent)
    yield python_check(sys.version_info[:3], sys.executable, os.name)
    yield from dependencies_checks(answers)
    yield presets_check(answers["presets"])


def dependencies_checks(answers: Mapping[str, Answer]) -> Iterator[Check]:
    """Yield a check for each package that nest needs, and for the extras."""
    needed, blamed = requirements(), dict[str, str]()
    has_nemo = installed_version("nemo_toolkit") is not None
    for each in sorted((each for each in needed if not each.extra), key=lambda each: _place(each.name)):
        answer = answers.get(f"import:{module_of(each.name)}", Answer())
        cause = blamed.setdefault(answer.error, each.name) if answer.error else each.name
        version, home = installed_version(each.name), _home(each.name)
        yield dependency_check(each, version, answer, has_nemo=has_nemo, home=home, cause=cause)
    yield from malicious_check("pytorch-lightning", installed_version("pytorch-lightning"))
    yield from extras_checks(needed, {each.name: installed_version(each.name) for each in needed})


def nest_check(package: Path, installed: str | None, editable: str | None) -> Check:
    """Check which nest runs, and that pip's record of it is correct."""
    source = (package.parents[1] / "pyproject.toml").is_file()
    where = f"source tree {package.parents[1]}" if source else f"installed in {package.parent}"
    found = f"{nestcli.__version__}, {where}"
    if installed is None:
        return _check(
            "nest", "note", f"{found}; unknown to pip, so that versions are not checked", "pip install -e . there."
        )
    if installed != nestcli.__version__:
        return _check("nest", "note", f"{found}; pip has installed {installed}", "Reinstall it: pip install .")
    if editable is not None and source and Path(editable).resolve() != package.parents[1].resolve():
        return _check(
            "nest", "note", f"{found}; pip has installed the source tree {editable}",
            "Unset PYTHONPATH if you want the installed one.",
        )  # fmt: skip
    return _check("nest", "ok", found)


def _editable_from() -> str | None:
    try:
        text = metadata.distribution("nestcli").read_text("direct_url.json")
        url: str = json.loads(text or "{}").get("url", "")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return unquote(url.removeprefix("file://")) if url.startswith("file://") else None


def copies_check(running: Path, path: Sequence[str]) -> Iterator[Check]:
    """Check for other packages named nestcli on sys.path."""
    there = (Path(entry or ".") / "nestcli" for entry in path)
    others = {each.resolve() for each in there if (each / "__init__.py").is_file()} - {running.resolve()}
    if others:
        yield _check(
            "other copies", "note", f"sys.path also has {', '.join(map(str, sorted(others)))}; {running} runs",
            "Uninstall the unwanted copy (pip uninstall nestcli), or unset PYTHONPATH.",
        )  # fmt: skip


def script_check(on_path: str | None, ours: Path) -> Iterator[Check]:
    """Check for a `nest` of another environment that comes first on PATH."""
    if on_path is not None and (ours / "nest").is_file() and not Path(on_path).samefile(ours / "nest"):
        yield _check(
            "nest on PATH", "note", f"{on_path} belongs to another environment than {ours}",
            "Activate the right environment, or call its nest by path.",
        )  # fmt: skip


def python_check(version: Sequence[int], executable: str, system: str) -> Check:
    found = f"{'.'.join(map(str, version))}, {executable}"
    if tuple(version[:2]) < (3, 10):
        return _check("Python", "problem", found, "nest needs Python 3.10 or later.")
    if system != "posix":
        return _check("Python", "problem", f"{found}; not on Linux or macOS", "Use Linux, WSL or macOS.")
    return _check("Python", "ok", found)


def dependency_check(
    needed: Requirement,
    version: str | None,
    answer: Answer,
    *,
    has_nemo: bool,
    home: Path | None = None,
    cause: str = "",
) -> Check:
    """Check that a package is installed, safe, in range, importable, and imported from its own folder (`home`).

    `cause` is the first package whose import failed in the same way.
    """
    name, install = needed.name, f'pip install "{needed.words}"'
    if version is None:
        return _check(name, "problem", "not installed", install)
    for bad in malicious_check(name, version):
        return bad
    if answer.error:
        remedy = _REPAIRS.get(name, f'pip install --force-reinstall "{needed.words}"')
        if cause not in ("", name):
            remedy = f"Fix {cause} first: its import fails in the same way."
        return _check(name, "problem", f"{version}, but its import fails: {answer.error}", remedy)
    if not is_in_range(version, needed.range):
        is_old = not is_in_range(version, ",".join(part for part in needed.range.split(",") if ">" in part))
        found = f"{version} is not {needed.range}{f': {_WHY[name] if is_old else _TOO_NEW}' if name in _WHY else ''}"
        if has_nemo and name in _WITH_NEMO and is_in_range(version, f">={_WITH_NEMO[name]}"):
            remedy = "Nothing to do: NeMo pins it, and nest runs with it and runs no code from checkpoints."
            return _check(name, "note", found, remedy)
        return _check(name, "problem", found, install)
    file = answer.facts.get("file")
    if file and home is not None and home.resolve() not in Path(file).resolve().parents:
        return _check(
            name, "note", f"{version} is installed in {home}, but {file} is imported",
            "Another copy hides the installed one: check PYTHONPATH, and look for a folder of that name.",
        )  # fmt: skip
    return _check(name, "ok", version)


def _home(name: str) -> Path | None:
    """Return the folder of a distribution's modules; None if pip has no record of it or it is an editable install."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if "editable" in (distribution.read_text("direct_url.json") or ""):
        return None
    return Path(str(distribution.locate_file("")))


def malicious_check(name: str, version: str | None) -> Iterator[Check]:
    if version in _MALICIOUS.get(name, ()):
        yield _check(
            name, "problem", f"{version} is a malicious release",
            f'Replace it at once: pip install "{name}>=2.6.6". Change every password and key stored on this machine.',
        )  # fmt: skip


def extras_checks(needed: Sequence[Requirement], versions: Mapping[str, str | None]) -> Iterator[Check]:
    """List installed and missing extras; a package out of range gets its own check."""
    there: list[str] = []
    missing: list[str] = []
    for extra in dict.fromkeys(each.extra for each in needed if each.extra):
        parts = [each for each in needed if each.extra == extra]
        (there if all(versions.get(each.name) for each in parts) else missing).append(extra)
        for each in parts:
            version = versions.get(each.name)
            if version and not is_in_range(version, each.range):
                found = f"{each.name} {version} is not {each.range}"
                yield _check(f"extra {extra}", "note", found, f'pip install "nestcli[{extra}]"')
    yield _check("extras", "ok", _listed(there) or "none")
    if missing:
        one = missing[0] if len(missing) == 1 else "NAME"
        found = f'{_listed(missing)}. To add one: pip install "nestcli[{one}]", in the source tree ".[{one}]"'
        yield _check("extras not here", "ok", found)


def _listed(extras: Sequence[str]) -> str:
    return ", ".join(f"{extra} ({_EXTRAS[extra]})" if extra in _EXTRAS else extra for extra in extras)


def presets_check(answer: Answer) -> Check:
    if answer.error:
        return _check("presets", "problem", f"they cannot be read: {answer.error}", "Reinstall nest: pip install .")
    return _check("presets", "ok", f"{len(answer.facts['presets'])} read, in {answer.facts['folder']}")
