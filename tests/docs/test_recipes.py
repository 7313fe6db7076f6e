"""Follow the recipes of CONTRIBUTING.md: one named test, a new preset, another masking, a new export format."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from docs.pages import ROOT
from nestcli.checkpoint import export as formats
from nestcli.checkpoint.load import load_checkpoint
from nestcli.cli import export as command
from nestcli.cli.app import main
from nestcli.config import load_config
from nestcli.model import masking
from nestcli.model.config import MaskingConfig, NestConfig
from nestcli.model.nest import NestModel

PAGE = "CONTRIBUTING.md"
TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1"]
PRESET = """\
base: nest_fast-conformer

model:
  encoder: {d_model: 32, n_heads: 4, n_layers: 2}
"""


def recipe(title: str) -> str:
    """The text of one recipe."""
    found = re.search(rf"^### {title}\n(.*?)^#", (ROOT / PAGE).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} has no recipe '{title}'"
    return " ".join(found.group(1).split())


def places(text: str) -> list[tuple[str, str]]:
    """The pairs of `NAME` in `src/FILE.py` that a recipe writes down."""
    return re.findall(r"`(\w+)` in `(src/[\w/]+\.py)`", text)


def edited(path: Path, pattern: str, replacement: str) -> None:
    """Change one place of a file."""
    text, times = re.subn(pattern, replacement, path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert times == 1, f"{path}: {times} places match {pattern!r}"
    path.write_text(text, encoding="utf-8")


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the source tree that may be changed."""
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("title", ["Add a preset", "Change the masking", "Add an export format"])
def test_the_names_of_a_recipe_are_in_the_files_that_it_gives(title: str) -> None:
    text = recipe(title)
    assert places(text)
    for name, file in places(text):
        defined = {
            getattr(node, "name", None) or ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.ClassDef | ast.FunctionDef)
        }
        assert name in defined, f"{file} does not define {name}"
    named = re.findall(r"`((?:configs|docs|src|tests)/[\w./-]+)`", text)
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_run_one_test() -> None:
    commands = re.findall(r"`(\.venv/bin/python -m pytest [^`]*)`", recipe("Run one test"))
    whole, one = [[sys.executable, *command.split()[1:], "-p", "no:cacheprovider"] for command in commands]
    listed = run([*whole, "--collect-only", "-q"], ROOT)
    assert listed.returncode == 0, listed.stdout
    assert listed.stdout.count("::") > 20
    done = run(one, ROOT)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b1 passed, \d+ deselected", done.stdout)


def test_add_a_preset(copy: Path) -> None:
    text = recipe("Add a preset")
    assert f"`{PRESET.splitlines()[0]}`" in text
    nest = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(copy / 'src')!r}); "]
    nest[-1] += "import nestcli.cli.app as a; print(a.__file__, file=sys.stderr); a.main()"
    unknown = run([*nest, "count-params", "tiny", "--json"], copy)
    assert unknown.returncode == 2
    assert "'tiny' is not a configuration" in unknown.stderr

    (copy / "configs" / "tiny.yaml").write_text(PRESET, encoding="utf-8")
    counted = run([*nest, "count-params", "tiny", "--json"], copy)
    assert counted.returncode == 0, counted.stderr
    assert str(copy) in counted.stderr
    assert 500_000 < json.loads(counted.stdout)["total"] < 2_000_000
    compared = run([*nest, "compare", "tiny", "--only", "config"], copy)
    assert compared.returncode == 0, compared.stdout + compared.stderr


def test_change_the_masking(monkeypatch: pytest.MonkeyPatch) -> None:
    config = NestConfig.from_config(load_config("small", TINY))
    torch.manual_seed(0)
    model = NestModel(config).eval()
    audio, length = torch.randn(1, 16000), torch.tensor([16000])
    before = model(audio, length, audio, length).mask_BT

    def first_half(lengths_B: Tensor, n_frames: int, _: MaskingConfig) -> Tensor:
        return torch.arange(n_frames) < lengths_B[:, None] // 2

    (changed, file), *_ = places(recipe("Change the masking"))
    assert (changed, ROOT / file) == ("draw_mask", Path(str(masking.__file__)))
    monkeypatch.setattr(masking, changed, first_half)
    output = model(audio, length, audio, length)
    half = int(output.mask_BT.sum())
    assert output.mask_BT[0, :half].all()
    assert not output.mask_BT.equal(before)
    assert int(output.selected) == half // config.encoder.subsampling_factor
    assert output.loss.isfinite()


def test_estimates_and_checks_follow_a_changed_choice_of_frames(copy: Path) -> None:
    """The function that the recipe names, at its place in a copy, masks every frame."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import json, numpy, torch\n"
        "from nestcli.config import load_config\n"
        "from nestcli.model.config import NestConfig\n"
        "from nestcli.model.cost import selected_share\n"
        "from nestcli.model.loss import MaskedTokenLoss\n"
        "from nestcli.model.target_statistics import hidden_distances\n"
        "from nestcli.training.config_checks import check_masks\n"
        "for overlap in ('true', 'false'):\n"
        "    words, notes = [f'model.masking.allow_overlap={overlap}'], []\n"
        "    nest = NestConfig.from_config(load_config('small', words))\n"
        "    left, _ = hidden_distances(torch.tensor([400]), nest.masking, MaskedTokenLoss(nest.loss))\n"
        "    none = load_config('small', [*words, 'model.masking.mask_prob=0'])\n"
        "    check_masks(none, 'model.validation_ds', numpy.array([2.0]), notes.append)\n"
        "    print(json.dumps([selected_share(nest, 160000), left.isinf().double().mean().item(), len(notes)]))\n"
    )

    def found(source: Path) -> list[list[float]]:
        done = run([sys.executable, "-c", program, str(source)], copy)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    before = found(ROOT / "src")
    (name, file), *_ = places(recipe("Change the masking"))
    body = "\\g<0>    return torch.arange(n_frames).expand(len(lengths_B), -1) < lengths_B[:, None]\n"
    edited(copy / file, rf'^def {name}\(.*\n    """(?:(?!""").|\n)*"""\n', body)
    for was, now in zip(before, found(copy / "src"), strict=True):
        assert was[0] < 0.6 < 0.99 < now[0]  # the share of tokens that is predicted
        assert was[1] < 0.5 < 0.99 < now[1]  # hidden tokens without a visible frame on their left
        assert (was[2], now[2]) == (1, 0)  # notes that nothing is masked
    assert len(before) == 2


def test_add_a_key_of_the_masking(copy: Path) -> None:
    assert "a field of `MaskingConfig`" in recipe("Change the masking")
    (holder,) = [
        path for path in (copy / "src/nestcli/model").glob("*.py") if "class MaskingConfig" in path.read_text()
    ]
    edited(holder, r"^    max_mask_ratio: .*\n", r"\g<0>    first_frames: int = 0\n")
    edited(
        copy / "src/nestcli/keys.py",
        r'^ *"model.masking.mask_value",\n',
        r'\g<0>        "model.masking.first_frames",\n',
    )
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from nestcli.config import load_config\n"
        "from nestcli.model.config import NestConfig\n"
        "for words in ([], ['model.masking.first_frames=3']):\n"
        "    print(NestConfig.from_config(load_config('small', words)).masking.first_frames)\n"
    )
    done = run([sys.executable, "-c", program, str(copy / "src")], copy)
    assert done.stdout.split() == ["0", "3"], done.stderr


def test_add_an_export_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (writers, _), (suffixes, _) = places(recipe("Add an export format"))
    assert set(getattr(formats, writers)) == set(getattr(command, suffixes))
    config = load_config("small", TINY)
    source = tmp_path / "nest.safetensors"
    formats.write_safetensors(source, config, NestModel(NestConfig.from_config(config)).state_dict())

    def write_names(checkpoint: str, out: Path, _part: str, _force: bool) -> tuple[int, formats.Look]:
        names = list(load_checkpoint(checkpoint).state_dict)
        out.write_text("\n".join(names))
        return len(names), lambda: ("names read again", float(out.read_text().split("\n") != names))

    words = ["nest", "export", str(source), "--to", "names", "--out", str(tmp_path / "nest.txt"), "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    capsys.readouterr()

    monkeypatch.setitem(getattr(formats, writers), "names", write_names)
    monkeypatch.setitem(getattr(command, suffixes), "names", ".txt")
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] == "names read again"
    assert told["tensors"] == len((tmp_path / "nest.txt").read_text().split("\n")) > 20
