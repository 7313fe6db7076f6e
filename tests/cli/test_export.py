"""`nest export` and `nest count-params` on checkpoints, as they are typed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nestcli.checkpoint.load import load_checkpoint
from nestcli.cli.app import main
from nestcli.config import load_config, resolved
from nestcli.model.module import CONFIG_KEY
from nestcli.model.nest import NestConfig, NestModel

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
    }  # fmt: skip
    ours, theirs = load_checkpoint(folder / name), load_checkpoint(folder / "out" / "a.nemo")
    assert all(torch.equal(ours.state_dict[key], theirs.state_dict[key]) for key in ours.state_dict)
    assert resolved(ours.config)["model"] == resolved(theirs.config)["model"]

    again = nest("export", "out/a.nemo", "--to", "nemo", "--out", "out/a.nemo", cwd=folder)
    assert again.code == 2
    assert "out/a.nemo is there already. Add --force" in again.stderr
    before = (folder / "out" / "a.nemo").read_bytes()
    forced = nest("export", "out/a.nemo", "--to", "nemo", "--out", "out/a.nemo", "--force", cwd=folder)
    assert forced.stdout == f"out/a.nemo: 59 tensors, {size:,} bytes\n"
    assert (folder / "out" / "a.nemo").read_bytes() == before

    counted = nest("count-params", "out/a.nemo", "model.encoder.n_layers=2", "--json", cwd=folder)
    assert json.loads(counted.stdout)["nemo"]["difference"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.ckpt", "--to", "onnx", "--out", "x"], "--to onnx is not there yet: only --to nemo is."),
        (["x.ckpt", "--to", "docx", "--out", "x"], "--to docx: there is no such format. Known: nemo."),
        (["x.ckpt", "--to", "nemo", "--out", "x.tar"], "the name of a .nemo file ends with .nemo"),
        (["x.ckpt", "--to", "nemo", "--out", "x.nemo"], "x.ckpt: no such checkpoint."),
        (["small", "--to", "nemo", "--out", "x.nemo"], "small is not a checkpoint"),
        (["bad.nemo", "--to", "nemo", "--out", "x.nemo"], "bad.nemo is no tar file"),
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
