"""The sdist and the wheel: what is in them, what is not, and that a stranger's installation works.

The wheel is built out of the unpacked sdist, as whoever has no repository does.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.metadata import Metadata

from nestcli import __version__

ROOT = Path(__file__).parents[2]
WHEEL, SDIST = f"nestcli-{__version__}-py3-none-any.whl", f"nestcli-{__version__}.tar.gz"
INFO = f"nestcli-{__version__}.dist-info"
LICENCES = ["LICENSE", "THIRD_PARTY.md"]


def build(source: Path, out: Path, what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this tree, `sdist/` unpacked, and the wheel that was built there."""
    folder = tmp_path_factory.mktemp("built")
    build(ROOT, folder, "sdist")
    with tarfile.open(folder / SDIST) as archive:
        archive.extractall(folder / "sdist", filter="data")
    build(folder / "sdist" / SDIST.removesuffix(".tar.gz"), folder, "wheel")
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def in_tree(*folders: str) -> set[str]:
    """The files below these folders of the tree, without what running leaves behind."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return {path.relative_to(ROOT).as_posix() for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(distributions: Path) -> None:
    found = contents(distributions / WHEEL)
    package = {name.removeprefix("src/") for name in in_tree("src/nestcli")}
    configs = {f"nestcli/{name}" for name in in_tree("configs")}
    about = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    notices = {f"{INFO}/licenses/{name}" for name in LICENCES}
    assert found.keys() == package | configs | about | notices
    for name in ("configs/nest_fast-conformer.yaml", "configs/small.yaml", "parity/page.css", "py.typed"):
        assert f"nestcli/{name}" in found
    assert {"answers.json", "answers.safetensors", "config.json", "presets.json", "subject.safetensors"} == {
        name.rpartition("/")[2] for name in found if name.startswith("nestcli/parity/facts/")
    }
    for name in ("encoder.safetensors", "README.md"):
        assert found[f"nestcli/reference/{name}"] == (ROOT / "src/nestcli/reference" / name).read_bytes()
    assert found[f"{INFO}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_out_of_the_sdist_is_that_of_the_tree(distributions: Path, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "wheel")
    assert contents(tmp_path / WHEEL) == contents(distributions / WHEEL)


def test_the_sdist_builds_and_tests_itself(distributions: Path) -> None:
    with tarfile.open(distributions / SDIST) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members), "a link or a folder"
    names = {member.name.partition("/")[2] for member in members}
    assert in_tree("src", "configs", "tests", "docs", ".ci") <= names
    assert names >= {"pyproject.toml", "Makefile", "constraints.txt", "README.md", "LICENSE", "THIRD_PARTY.md"}
    kept = {"src", "configs", "tests", "docs", ".ci"}
    top = {name for name in names if name.partition("/")[0] not in kept}
    assert all((ROOT / name).is_file() for name in top - {"PKG-INFO"})
    assert not [name for name in names if name.startswith((".venv", ".git/")) or "__pycache__" in name]


def test_metadata(distributions: Path) -> None:
    raw = contents(distributions / WHEEL)[f"{INFO}/METADATA"]
    known = Metadata.from_email(raw)  # every field is checked, as an index does
    message: Message = BytesParser().parsebytes(raw)
    assert (message["Metadata-Version"], message["Version"]) == ("2.4", __version__)
    assert known.license_expression == "Apache-2.0 AND CC-BY-SA-4.0"
    assert known.license_files == LICENCES
    assert message["Description-Content-Type"] == "text/markdown"
    assert message.get_payload().lstrip().startswith("# nest")
    assert str(known.requires_python) == ">=3.10"
    assert not any(each.url for each in known.requires_dist or []), "an index takes no addresses"


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in an environment of its own, in a folder with spaces and Chinese characters.

    Heavy packages are those of the environment that runs the tests.
    """
    folder = tmp_path_factory.mktemp("elsewhere") / "语音 数据 and spaces"
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*command, str(distributions / WHEEL)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not followed
    return folder


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    away = installed / "away from it"
    away.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    return subprocess.run(words, cwd=away, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_an_installation_outside_the_tree_works(installed: Path) -> None:
    nest, python = str(installed / "venv/bin/nest"), str(installed / "venv/bin/python")
    place = run(
        installed, python, "-c", "import nestcli, nestcli.config as c; print(nestcli.__file__); print(c.config_dir())"
    )
    assert all(line.startswith(str(installed)) for line in place.stdout.split("\n") if line), place
    assert run(installed, nest, "--version").stdout == f"nest {__version__}\n"
    count = run(installed, nest, "count-params", "small", "--json")
    assert json.loads(count.stdout)["total"] == 14_191_616, count.stderr
    loaded = "import nestcli; print(nestcli.load_encoder('reference').width)"
    assert run(installed, python, "-c", loaded).stdout == "240\n"
    compared = run(installed, nest, "compare", "--json")
    assert compared.returncode == 0, compared.stderr
    answer = json.loads(compared.stdout)
    assert answer["passed"]
    assert not answer["nemo"]["live"]
    module = run(installed, python, "-m", "nestcli", "--version")
    assert module.stdout == f"nest {__version__}\n"
