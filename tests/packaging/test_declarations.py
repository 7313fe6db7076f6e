"""Facts that the project states once: its version, its dependencies, their licences and pins."""

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nestcli import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTICES = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
GROUPS = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
NEEDED = sorted({name for group in GROUPS.values() for text in group if (name := Requirement(text).name) != "nestcli"})
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# What is imported under another name than it is installed.
PACKAGES = {"yaml": "pyyaml"}
UNDECLARED = {
    "PIL": "matplotlib needs it and brings it",
    "aiohttp": "fsspec's reader of http needs it itself; lightning brings it",
    "nemo": "an environment of its own, or the user's",
    "transformers": "a look at the version only, where it is installed",
}


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", __version__)
    pattern = re.compile(
        rf"nest(?:cli)?\W{{1,4}}v?{re.escape(__version__)}|__version__ *= *[\"']|version: {re.escape(__version__)}"
    )
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    texts += [*(ROOT / "src").rglob("*.py"), *(ROOT / "configs").glob("*.yaml")]
    found = [path.relative_to(ROOT).as_posix() for path in texts if pattern.search(path.read_text(encoding="utf-8"))]
    assert [name for name in found if name != "CHANGELOG.md"] == ["src/nestcli/__init__.py"]


@pytest.mark.parametrize("name", NEEDED)
def test_every_dependency_is_in_the_notices(name: str) -> None:
    """The notice names the licence that the installed package declares as an SPDX expression, if it does."""
    row = re.search(rf"^\| {re.escape(name)} \|.*$|(?<![\w-]){re.escape(name)} \([A-Z][^)]+\)", NOTICES, re.MULTILINE)
    assert row, f"{name} is in pyproject.toml and not in THIRD_PARTY.md"
    try:
        licence = distribution(name).metadata.get("License-Expression")  # [] warns from 3.12 on
    except PackageNotFoundError:
        return
    if licence and " AND " not in licence:
        assert licence in row[0]


def test_no_notice_of_what_is_not_needed() -> None:
    named = set(re.findall(r"^\| (\w[\w-]+) \|", NOTICES, re.MULTILINE)) - {"package", "what"}
    assert {canonicalize_name(name) for name in named} <= {canonicalize_name(name) for name in NEEDED}


def test_what_is_imported_is_declared() -> None:
    declared = {canonicalize_name(name) for name in NEEDED}
    for path in (ROOT / "src").rglob("*.py"):
        for name in _imports(ast.parse(path.read_text(encoding="utf-8"))) - sys.stdlib_module_names - {"nestcli"}:
            if name not in UNDECLARED:
                assert canonicalize_name(PACKAGES.get(name, name)) in declared, f"{path} imports {name}"


def _imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_one_a_python_and_within_the_ranges(python: str) -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker and not pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.1"}):
            continue
        assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice for Python {python}"
        pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    for text in GROUPS[""] + GROUPS["demo"] + GROUPS["dev"] + GROUPS["s3"] + GROUPS["onnx"] + GROUPS["hdf5"]:
        needed = Requirement(text)
        if needed.name != "nestcli":
            version = pins.get(canonicalize_name(needed.name))
            assert version, f"{needed.name} is not pinned for Python {python}"
            assert needed.specifier.contains(version), f"{needed} and the pin {version}"


@pytest.mark.parametrize("name", ["torch", "lightning"])
def test_packages_whose_private_names_are_used_are_capped(name: str) -> None:
    """The next minor version may lack a name of training/lightning_internals.py."""
    [needed] = [each for text in GROUPS[""] if (each := Requirement(text)).name == name]
    [pin] = re.findall(rf"^{name}==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    major, minor = map(int, pin)
    assert needed.specifier.contains(f"{major}.{minor}.99")
    assert not needed.specifier.contains(f"{major}.{minor + 1}.0")


def test_the_pythons_are_named_alike() -> None:
    classifiers = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if ":: Python :: 3." in text}
    assert classifiers == set(PYTHONS)
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
