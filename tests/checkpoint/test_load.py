"""Checkpoints of either kind through one door, those of NeMo's own training among them."""

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nestcli.checkpoint.load import checkpoint_config, checkpoint_weights, load_checkpoint
from nestcli.checkpoint.nemo_config import to_nemo
from nestcli.config import load_config, resolved
from nestcli.errors import CheckpointError, NestError
from nestcli.model.config import NestConfig
from nestcli.model.module import CONFIG_KEY
from nestcli.model.nest import NestModel

TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32"]
CONFIG = load_config("small", TINY)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(NestModel(NestConfig.from_config(CONFIG)).state_dict())


def test_the_folder_of_a_run_is_answered_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "run.nemo").touch()
    with pytest.raises(CheckpointError, match=r"Did you mean .*checkpoints/run\.nemo\?"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"must end with .*safetensors\.$"):
        load_checkpoint("a" * 5000)


def saved(path: Path, state: dict[str, torch.Tensor], **more: Any) -> Path:
    torch.save({"state_dict": OrderedDict(state), "global_step": 3, **more}, path)
    return path


def test_a_checkpoint_of_ours(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    loaded = load_checkpoint(saved(tmp_path / "a.ckpt", state, **{CONFIG_KEY: resolved(CONFIG)}))
    assert resolved(loaded.config) == resolved(CONFIG)
    assert list(loaded.state_dict) == list(state)
    config = checkpoint_config(tmp_path / "a.ckpt", ["model.encoder.n_layers=3"])
    assert config.model.encoder.n_layers == 3
    with pytest.raises(CheckpointError, match=r"a\.ckpt lacks encoder\.layers\.1\."):
        load_checkpoint(tmp_path / "a.ckpt", ["model.encoder.n_layers=3"])


def test_a_checkpoint_of_nemos_training(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for number, stored in enumerate((OmegaConf.create(to_nemo(CONFIG)), {"cfg": OmegaConf.create(to_nemo(CONFIG))})):
        path = saved(tmp_path / f"{number}.ckpt", state, hyper_parameters=stored, hparams_type=type(stored))
        loaded = load_checkpoint(path)
        assert resolved(loaded.config)["model"] == resolved(CONFIG)["model"]
        assert all(torch.equal(loaded.state_dict[name], state[name]) for name in state)


def test_weights_alone_need_no_configuration(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", {"x": torch.ones(3)})
    assert list(checkpoint_weights(path)) == ["x"]
    with pytest.raises(CheckpointError, match="has no readable configuration"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="y holds NaN"):
        checkpoint_weights(saved(path, {"y": torch.tensor(float("nan"))}))


class Runs:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch hacked",)


def circle() -> dict[str, Any]:
    content: dict[str, Any] = {}
    content["a"] = content
    return content


def bomb() -> list[Any]:
    content: list[Any] = ["x"]
    for _ in range(30):
        content = [content, content]
    return content


def circular_omegaconf() -> Any:
    config = OmegaConf.create({"encoder": {}})
    config.encoder.__dict__["_content"]["a"] = config
    return config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"more": Runs()}, "name code to call ('posix system')"),
        ({"more": bytearray(b"x" * 9)}, "name code to call ('__builtin__ bytearray')"),
        ({CONFIG_KEY: circle()}, "too large or nested too deeply"),
        ({CONFIG_KEY: {"a": bomb()}}, "too large or nested too deeply"),
        ({CONFIG_KEY: {"a": [["${oc.env:HOME}"]]}}, "calls a resolver at a.0.0"),
        ({CONFIG_KEY: {"a": [{"_target_": "os.system"}]}}, "names code to call, at a.0._target_"),
        ({CONFIG_KEY: {"a": torch.ones(2)}}, "holds a Tensor at a"),
        ({"hyper_parameters": circular_omegaconf()}, "too large or nested too deeply"),
        ({"hyper_parameters": OmegaConf.create({"encoder": "${oc.env:HOME}"})}, "calls a resolver at encoder"),
        ({"hyper_parameters": OmegaConf.create({"encoder": {}, "target": "os.system"})}, "not a NEST"),
        ({"hyper_parameters": {"lr": 1}}, "has no readable configuration"),
        ({"state_dict": [1]}, "its state_dict is not a table of tensors but a list"),
        ({"state_dict": {"a": "b"}}, "'a' among the weights is not an ordinary tensor"),
    ],
)
def test_odd_checkpoints_are_refused(
    content: dict[str, Any],
    message: str,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = {CONFIG_KEY: resolved(CONFIG)} if "hyper_parameters" not in content else {}
    torch.save({"state_dict": state, **defaults, **content}, "odd.ckpt")
    with pytest.raises(NestError) as raised:
        load_checkpoint("odd.ckpt")
    assert message in str(raised.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["odd.ckpt"]
