"""NEST in one safetensors file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestcli.checkpoint.safetensors_file import CONFIG_KEY, read_safetensors, safetensors_config, write_safetensors
from nestcli.config import load_config, resolved
from nestcli.errors import CheckpointError, NestError
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=2", "model.num_classes=32"]


INCOMPLETE: list[dict[str, object]] = [
    {},
    {"model": 3},
    {"model": []},
    {"model": None},
    {"model": {"mask_position": "pre_conv"}},
    {"model": {"mask_position": "pre_conv", "preprocessor": 3}},
    {"model": {"encoder": {"n_layers": 3}}},
]


def state_of(*words: str) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return NestModel(NestConfig.from_config(load_config("small", [*TINY, *words]))).state_dict()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "nest.safetensors"
    write_safetensors(path, load_config("small", TINY), state_of())
    return path


def with_metadata(path: Path, metadata: dict[str, str]) -> None:
    save_file(load_file(path), path, metadata)


def test_what_was_written_is_read(written: Path) -> None:
    config, state = read_safetensors(written)
    ours = state_of()
    assert list(state) == list(ours)
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    assert resolved(config) == resolved(load_config("small", TINY))
    with safe_open(written, framework="pt") as file:
        assert file.metadata()["format"] == "pt"  # what other readers look for


def test_overrides_are_applied(written: Path) -> None:
    assert safetensors_config(written, ["model.encoder.dropout=0.25"]).model.encoder.dropout == 0.25
    with pytest.raises(CheckpointError, match=r"lacks encoder\.layers\.2\."):
        read_safetensors(written, ["model.encoder.n_layers=3"])


def test_tied_and_strided_weights_are_written_out(tmp_path: Path) -> None:
    words = ["model.encoder.untie_biases=false"]
    state = state_of(*words)
    first, second = (f"encoder.layers.{layer}.self_attn.pos_bias_u" for layer in (0, 1))
    assert state[first].data_ptr() == state[second].data_ptr()  # safetensors itself refuses these
    linear = "encoder.layers.0.feed_forward1.linear1.weight"
    state[linear] = state[linear].t().contiguous().t()
    state[first].copy_(torch.randn_like(state[first]))
    path = tmp_path / "nest.safetensors"
    write_safetensors(path, load_config("small", [*TINY, *words]), state)
    _, again = read_safetensors(path)
    assert torch.equal(again[second], state[first])
    assert torch.equal(again[linear], state[linear])


def test_weights_of_another_model_are_not_written(tmp_path: Path) -> None:
    state = state_of()
    del state["encoder.layers.1.norm_out.bias"]
    with pytest.raises(CheckpointError, match=r"lacks encoder\.layers\.1\.norm_out\.bias"):
        write_safetensors(tmp_path / "nest.safetensors", load_config("small", TINY), state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "has no NEST configuration"),
        ({CONFIG_KEY: "{"}, "its configuration must be valid JSON"),
        ({CONFIG_KEY: "[" * 100_000}, "its configuration must be valid JSON"),
        ({CONFIG_KEY: "[1]"}, "its configuration must be a mapping of keys, not a list"),
        ({CONFIG_KEY: " " * (1 << 18) + "{}"}, "its configuration has 262,146 bytes, more than 262,144"),
        *(({CONFIG_KEY: json.dumps(content)}, "configuration") for content in INCOMPLETE),
        ({CONFIG_KEY: json.dumps({"name": "${oc.env:HOME}"})}, "${oc.env:HOME}"),
    ],
)
def test_odd_configurations_are_refused(written: Path, metadata: dict[str, str], message: str) -> None:
    with_metadata(written, metadata)
    with pytest.raises(NestError) as raised:
        read_safetensors(written)
    assert message in str(raised.value)
    assert str(written) in str(raised.value)


@pytest.mark.parametrize("cut", [0, 4, 100, 5000])
def test_damaged_files_are_refused(written: Path, cut: int) -> None:
    written.write_bytes(written.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="is not a safetensors file, or it is damaged"):
        read_safetensors(written)


def test_weights_that_are_not_numbers_are_refused(written: Path) -> None:
    state = load_file(written)
    state["encoder.layers.0.norm_out.bias"][3] = float("nan")
    config = json.dumps(resolved(load_config("small", TINY)))
    save_file(state, written, {CONFIG_KEY: config})
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.norm_out\.bias holds NaN or infinite values"):
        read_safetensors(written)


def test_no_file() -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        read_safetensors("nothing.safetensors")
