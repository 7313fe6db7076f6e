"""Every command and every piece of Python in the pages is run, or says by a mark why it is not (CONTRIBUTING.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.checks import faults
from docs.pages import ROOT, Page, page, page_names, read_page
from docs.rig import Rig, Zygote, is_run, is_slow, make_seeds

PAGES = [name for name in page_names() if not page(name).exempt]
RUN = [name for name in PAGES if any(is_run(block) and not is_slow(block) for block in page(name).blocks)]
WITH_SLOW = [name for name in PAGES if any(is_run(block) and is_slow(block) for block in page(name).blocks)]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="module")
def seeds(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeds(tmp_path_factory.mktemp("seeds"), zygote)


def faults_of(shown: Page, folder: Path, seeds: Path, zygote: Zygote, *, slow: bool = False) -> list[str]:
    rig = Rig(folder, seeds, shown, zygote)
    blocks = [block for block in shown.blocks if is_run(block) and (slow or not is_slow(block))]
    return [fault for block in blocks if (fault := rig.run(block))]


@pytest.mark.parametrize("name", RUN)
def test_commands_run(name: str, seeds: Path, zygote: Zygote, tmp_path: Path) -> None:
    faults = faults_of(page(name), tmp_path / "here", seeds, zygote)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SLOW)
def test_all_commands_run(name: str, seeds: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Slow blocks run too, after all blocks before them."""
    faults = faults_of(page(name), tmp_path / "here", seeds, zygote, slow=True)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_blocks_are_marked_and_commands_known(name: str) -> None:
    found = faults(page(name), (ROOT / name).read_text())
    assert not found, "\n".join(found)


def test_there_is_something_to_run() -> None:
    assert {"docs/prepare-data.md", "docs/export.md"} <= set(RUN)
    assert "docs/bench.md" in WITH_SLOW


WRONG = {
    "an option": ("```sh\nnest prepare-data my_speech --out data/speech --speker-pattern x\n```", "--speker-pattern"),
    "an option of what is not run": (
        "<!-- not run: needs a GPU -->\n```sh\nsrun nest bench large --onely loader\n```", "--onely"),
    "a key of what is not run": (
        "<!-- not run: needs a GPU -->\n```sh\nnest pretrain large model.encoder.n_layer=3\n```", "n_layer"),
    "an option in the text": ("Add `nest extract INPUT --layer last`.", "--layer"),
    "a command in the text": ("Try `nest prepare INPUT`.", "prepare"),
    "a mark": ("<!-- not run: I am lazy -->\n```sh\nnest demo\n```", "lazy"),
    "a mark without a block": ("<!-- not run: needs NeMo -->\n\nText.\n\n```sh\nnest demo\n```", "mark"),
    "an indented block": ("Text:\n\n    nest demo --out there\n", "indented"),
    "a block without a language": ("```\nnest demo\n```", "language"),
    "a command as text": ("```text\nnest demo\n```", "command"),
    "an extra": ("<!-- not run: installs -->\n```sh\npip install '.[demos]'\n```", "demos"),
    "a target": ("<!-- not run: installs -->\n```sh\nmake demos\n```", "demos"),
    "yaml": ("```yaml\na: [1\n```", "yaml"),
    "what a shell is needed for": ("```sh\nnest demo --out $HOME\n```", "HOME"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_in_a_page_is_found_by_looking(what: str) -> None:
    text, named = WRONG[what]
    found = faults(read_page("docs/wrong.md", text), text)
    assert len(found) == 1
    assert "docs/wrong.md" in found[0]
    assert named in found[0]


FAILING = {
    "a wrong option": ("sh", "nest prepare-data my_speech --out data --speker-pattern x", "No such option"),
    "a wrong key": ("sh", "nest pretrain small model.encoder.n_layer=3", "Did you mean model.encoder.n_layers?"),
    "a file that is not there": ("sh", "nest extract gone.json --checkpoint nest.nemo --out x", "does not exist"),
    "what the page makes only later": (
        "sh", "cat data/speech/train_manifest.json\nnest prepare-data my_speech --out data/speech", "No such file"),
    "the first of two": ("sh", "cat gone; nest --version", "No such file"),
    "an unknown program": ("sh", "frobnicate --all", "not a program that the tests run"),
    "a python error": ("python", "from nestcli import load_encoders", "ImportError"),
    "a success that should be none": ("sh", "nest --version", "ended with 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILING)
def test_what_is_wrong_in_a_page_is_found_by_running(what: str, seeds: Path, zygote: Zygote, tmp_path: Path) -> None:
    language, command, told = FAILING[what]
    mark = "<!-- test: ends with 2 -->\n" if "should be none" in what else ""
    wrong = read_page("docs/wrong.md", f"# Title\n\n{mark}```{language}\n{command}\n```\n")
    (fault,) = faults_of(wrong, tmp_path / "here", seeds, zygote)
    assert fault.startswith("docs/wrong.md:")
    assert told in fault


def test_a_page_makes_what_it_uses(seeds: Path, zygote: Zygote, tmp_path: Path) -> None:
    """Continued lines, variables, signs and a pipe; what the page writes is not there before."""
    text = """
```sh
ls data  # only what is not made below
NEST_JAIL=my_speech nest prepare-data 'my_speech/**/*.wav' \\
  --out data/speech --json > summary.json 2> log.txt && head -c 3 summary.json | wc -c > count.txt
```

<!-- test: ends with 2 -->
```sh
nest count-params gone.ckpt
```
"""
    shown = read_page("docs/right.md", text)
    assert faults_of(shown, tmp_path / "here", seeds, zygote) == []
    assert (tmp_path / "here" / ".outputs" / "1.out").read_text() == "noise\n"
    assert (tmp_path / "here" / "count.txt").read_text().strip() == "3"
    assert '"accepted": 18' in (tmp_path / "here" / "summary.json").read_text()
