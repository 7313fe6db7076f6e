"""NeMo's encoder in place of ours, with a stand-in for NeMo; tests/live/test_nemo_encoder.py uses the real one."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_config
from nestcli.config import config_from_dict, load_config, load_training_config, resolved
from nestcli.errors import ConfigError, MissingDependencyError
from nestcli.model.config import EncoderConfig, NestConfig
from nestcli.model.conformer import ConformerEncoder
from nestcli.model.count import count_parameters
from nestcli.model.module import NestModule
from nestcli.model.nemo_encoder import NemoEncoder
from nestcli.model.nest import NestModel

MODULE = "nemo.collections.asr.modules.conformer_encoder"
BACKEND = "model.encoder.backend"


class StandIn(nn.Module):
    """NeMo's keywords and layout around our encoder, which is kept where neither names nor modes reach it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        self.ours = (ConformerEncoder(EncoderConfig(**settings)),)
        self.out_proj = None
        for name, part in self.ours[0].named_children():
            self.add_module(name, part)

    def forward(self, *, audio_signal: Tensor, length: Tensor, bypass_pre_encode: bool = False) -> tuple[Tensor, ...]:
        assert length.dtype == torch.int64
        [ours] = self.ours
        ours.training = self.training  # the flag of its own that NeMo's encoder asks about stochastic depth
        encoded_BSM, length = (ours.encode if bypass_pre_encode else ours)(audio_signal, length)
        return encoded_BSM.transpose(1, 2), length


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = MODULE.split(".")
    for number in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:number]), types.ModuleType(parts[number - 1]))
    monkeypatch.setattr(sys.modules[MODULE], "ConformerEncoder", StandIn, raising=False)


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_the_adapter_keeps_names_weights_and_losses(stand_in: None, corpus: dict[str, Path], position: str) -> None:
    words = [f"model.mask_position={position}", "model.masking.mask_prob=0.3"]
    depth = ["model.encoder.n_layers=2", "model.encoder.stochastic_depth_drop_prob=0.5"]
    config = NestConfig.from_config(tiny_config(corpus, *words, *depth))
    audio, lengths = torch.randn(2, 24000) * 0.1, torch.tensor([24000, 17000])
    losses: list[float] = []
    models = []
    for encoder_class in (ConformerEncoder, NemoEncoder):
        torch.manual_seed(4)
        model = NestModel(config, encoder_class)  # type: ignore[arg-type]  # the same interface
        for training in (True, False):
            torch.manual_seed(5)
            losses.append(float(model.train(training)(audio, lengths, audio, lengths).loss.detach()))
        models.append(model)
    ours, theirs = (dict(model.state_dict()) for model in models)
    assert list(ours) == list(theirs)
    assert [name for name, _ in models[0].named_parameters()] == [name for name, _ in models[1].named_parameters()]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)


def test_without_nemo_the_error_says_what_to_do(corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    config = tiny_config(corpus, f"{BACKEND}=nemo")
    with pytest.raises(MissingDependencyError, match=r"NeMo cannot be imported here.*model\.encoder\.backend=nest"):
        NestModule(config)
    assert count_parameters(config).total > 0  # what only looks at the model needs no NeMo


@pytest.mark.parametrize(
    ("value", "words", "backend"),
    [
        ("true", [], "nemo"),
        ("1", [], "nemo"),
        ("True", [], "nemo"),
        ("false", [], "nest"),
        ("0", [], "nest"),
        ("", [], None),
        ("true", [f"{BACKEND}=nest"], "nest"),
        ("false", [f"{BACKEND}=nemo"], "nemo"),
    ],
)
def test_the_variable_chooses_unless_a_word_does(
    monkeypatch: pytest.MonkeyPatch, value: str, words: list[str], backend: str | None
) -> None:
    monkeypatch.setenv("USE_NEMO_CONFORMER", value)
    assert load_training_config("small", words).model.encoder.get("backend") == backend
    assert "backend" not in load_config("small").model.encoder


def test_the_variable_beats_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: small\nmodel:\n  encoder:\n    backend: nemo\n")
    assert load_training_config(str(path)).model.encoder.backend == "nemo"
    monkeypatch.setenv("USE_NEMO_CONFORMER", "false")
    assert load_training_config(str(path)).model.encoder.backend == "nest"


def test_other_values_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, message in (
        ([f"{BACKEND}=NeMo"], "model.encoder.backend: 'NeMo' is not supported, use nest or nemo"),
        ([f"{BACKEND}=nemo", "model.encoder.conv_norm_ignore_padding=true"], "NeMo's encoder cannot do that"),
    ):
        with pytest.raises(ConfigError, match=message):
            NestConfig.from_config(load_config("small", words))
    monkeypatch.setenv("USE_NEMO_CONFORMER", "yes")
    with pytest.raises(ConfigError, match=r"USE_NEMO_CONFORMER is .yes.\. Set it to true"):
        load_training_config("small")


def test_a_checkpoint_binds_nobody_to_nemo() -> None:
    stored = resolved(load_config("small", [f"{BACKEND}=nemo"]))
    assert "backend" not in config_from_dict(stored, "x.ckpt").model.encoder
    assert config_from_dict(stored, "x.ckpt", [f"{BACKEND}=nemo"]).model.encoder.backend == "nemo"
    assert stored["model"]["encoder"]["backend"] == "nemo"
