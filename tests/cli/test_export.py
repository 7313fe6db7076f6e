"""`nest export` and `nest count-params` on checkpoints, as they are typed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from conftest import skip_without_parakeets_extractor
from nestcli.checkpoint import export
from nestcli.checkpoint.load import load_checkpoint
from nestcli.cli.app import main
from nestcli.config import load_config, resolved
from nestcli.model.config import NestConfig
from nestcli.model.module import CONFIG_KEY
from nestcli.model.nest import NestModel

TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32"]


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


Nest = Callable[..., Done]


@pytest.fixture
def nest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nest:
    """Runs a command in this process."""

    def run(*words: str, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["nest", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `NAME--val_loss=3.4-step=7.ckpt` in it."""
    folder = tmp_path_factory.mktemp("export")
    config = load_config("small", TINY)
    state = NestModel(NestConfig.from_config(config)).state_dict()
    content = {"state_dict": dict(state), CONFIG_KEY: resolved(config), "global_step": 7}
    torch.save(content, folder / "NAME--val_loss=3.4-step=7.ckpt")
    return folder


def test_a_checkpoint_becomes_a_nemo_file(nest: Nest, folder: Path) -> None:
    name = "NAME--val_loss=3.4-step=7.ckpt"
    done = nest("export", name, "--to", "nemo", "--out", "out/a.nemo", "--json", cwd=folder)
    assert done.code == 0, done.stderr
    size = (folder / "out" / "a.nemo").stat().st_size
    assert json.loads(done.stdout) == {
        "checkpoint": name, "format": "nemo", "path": "out/a.nemo", "bytes": size, "tensors": 59,
        "verified": "read again, all weights the same", "difference": 0.0,
    }  # fmt: skip
    ours, theirs = load_checkpoint(folder / name), load_checkpoint(folder / "out" / "a.nemo")
    assert all(torch.equal(ours.state_dict[key], theirs.state_dict[key]) for key in ours.state_dict)
    assert resolved(ours.config)["model"] == resolved(theirs.config)["model"]

    again = nest("export", "out/a.nemo", "--to", "nemo", "--out", "out/a.nemo", cwd=folder)
    assert again.code == 2
    assert "out/a.nemo already exists. Add --force" in again.stderr
    before = (folder / "out" / "a.nemo").read_bytes()
    forced = nest("export", "out/a.nemo", "--to", "nemo", "--out", "out/a.nemo", "--force", cwd=folder)
    assert forced.stdout.startswith(f"out/a.nemo: 59 tensors, {size:,} bytes\n")
    assert (folder / "out" / "a.nemo").read_bytes() == before

    counted = nest("count-params", "out/a.nemo", "model.encoder.n_layers=2", "--json", cwd=folder)
    assert json.loads(counted.stdout)["nemo"]["difference"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.ckpt", "--to", "onnx", "--out", "x"], "the file name must end with .onnx"),
        (["x.ckpt", "--to", "onnx", "--out", "x.onnx", "--part", "half"], "only --to onnx has parts: all and encoder"),
        (["x.ckpt", "--to", "nemo", "--out", "x.nemo", "--part", "encoder"], "only --to onnx has parts"),
        (
            ["x.ckpt", "--to", "transformers", "--out", "bad.nemo"],
            "--out bad.nemo is a file. transformers needs a folder",
        ),
        (
            ["x.ckpt", "--to", "docx", "--out", "x"],
            "--to docx: unknown format. Known: nemo, safetensors, transformers, onnx.",
        ),
        (["x.ckpt", "--to", "nemo", "--out", "x.tar"], "the file name must end with .nemo"),
        (["x.ckpt", "--to", "nemo", "--out", "x.nemo"], "x.ckpt: no such checkpoint."),
        (["small", "--to", "nemo", "--out", "x.nemo"], "small is not a checkpoint"),
        (["bad.nemo", "--to", "nemo", "--out", "x.nemo"], "bad.nemo is not a tar file"),
        (["x.ckpt", "--to", "nemo"], "Missing option '--out'"),
    ],
)
def test_calls_that_are_wrong(nest: Nest, words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.nemo").write_bytes(b"<html>")
    done = nest("export", *words, cwd=tmp_path)
    assert done.code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.nemo"]


@pytest.mark.parametrize(
    ("to", "out", "verified"),
    [
        ("safetensors", "a.safetensors", "read again, all weights the same"),
        ("transformers", "a", "loaded by transformers, features and output compared"),
        pytest.param("onnx", "a.onnx", "run by onnxruntime with other batch sizes and lengths", marks=pytest.mark.slow),
    ],
)
def test_every_format_is_verified(
    nest: Nest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, out: str, verified: str
) -> None:
    if to == "transformers":
        skip_without_parakeets_extractor()
    checkpoint = str(folder / "NAME--val_loss=3.4-step=7.ckpt")
    done = nest("export", checkpoint, "--to", to, "--out", out, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verified"] == verified
    assert document["difference"] <= 1e-4
    assert document["bytes"] > 1000
    before = _contents(tmp_path)

    if to == "onnx":
        monkeypatch.setattr(export, "onnx_difference", lambda *_: 0.5)
    else:
        monkeypatch.setattr(export, f"write_{to}", _writing_others(getattr(export, f"write_{to}")))
    failed = nest("export", checkpoint, "--to", to, "--out", out, "--force", cwd=tmp_path)
    assert failed.code == 1
    assert f"{out}: the export differs from" in failed.stderr
    assert _contents(tmp_path) == before


def test_a_transformers_that_lacks_something_is_no_bug_of_ours(
    nest: Nest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> float:
        raise ImportError("\nParakeetFeatureExtractor requires the librosa library. But that was not found.")

    monkeypatch.setattr(export, "_difference_in_transformers", lacking)
    checkpoint = str(folder / "NAME--val_loss=3.4-step=7.ckpt")
    done = nest("export", checkpoint, "--to", "transformers", "--out", "a", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    verified = json.loads(done.stdout)["verified"]
    assert verified.endswith("no output was compared: ParakeetFeatureExtractor requires the librosa library")


@pytest.mark.parametrize(("to", "out"), [("nemo", "a.nemo"), ("transformers", "a"), ("onnx", "a.onnx")])
def test_what_cannot_be_read_again_is_removed(
    nest: Nest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, out: str
) -> None:
    def writing_rubbish(path: Path, *_: object, **__: object) -> None:
        if to == "transformers":
            path.mkdir()
            path = path / "config.json"
        path.write_bytes(b"<html>")

    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, f"write_{to}", writing_rubbish)
    checkpoint = str(folder / "NAME--val_loss=3.4-step=7.ckpt")
    done = nest("export", checkpoint, "--to", to, "--out", out, cwd=tmp_path)
    assert done.code == 1
    assert f"{out}: the export cannot be used" in done.stderr
    assert "It was removed." in done.stderr
    assert list(tmp_path.iterdir()) == []


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _writing_others(write: Callable[..., None]) -> Callable[..., None]:
    """A writer that gets one bias wrong."""

    def written(out: Path, config: object, state: dict[str, torch.Tensor], **options: object) -> None:
        wrong = {key: value - 1 if key.endswith("norm_out.bias") else value for key, value in state.items()}
        write(out, config, wrong, **options)

    return written


@pytest.mark.parametrize(
    ("to", "out", "said"),
    [
        ("nemo", "file/b.nemo", "file is a file, not a folder"),
        ("onnx", "file/deeper/b.onnx", "file is a file, not a folder"),
        ("transformers", "file/b", "file is a file, not a folder"),
        ("transformers", ".", "name a new folder in it"),
        ("transformers", "..", "name a new folder in it"),
        ("nemo", "x" * 300 + ".nemo", "File name too long"),
        ("transformers", "mine", "mine contains notes.txt, which is not part of an export"),
    ],
)
def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_read(
    nest: Nest, tmp_path: Path, to: str, out: str, said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "notes.txt"):
        (tmp_path / "mine" / name).write_text("mine")
    done = nest("export", "gone.ckpt", "--to", to, "--out", out, "--force", cwd=tmp_path)
    assert (done.code, done.stdout) == (2, "")
    assert said in done.stderr
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
