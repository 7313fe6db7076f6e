"""bf16-true and shorter types: weights in bf16, and running statistics that keep moving."""

from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import tiny_config
from nestcli.checkpoint.load import load_checkpoint
from nestcli.model.config import NestConfig
from nestcli.model.module import NestModule
from nestcli.model.speech_encoder import SpeechEncoder
from nestcli.training.run import Pretraining

STATISTICS = ("running_mean", "running_var")


@pytest.mark.slow
def test_running_statistics_move_to_where_those_of_fp32_do(corpus: dict[str, Path]) -> None:
    model = NestModule(tiny_config(corpus, "trainer.precision=bf16-true")).model
    conv = model.encoder.layers[0].conv
    norm = conv.batch_norm
    assert conv.depthwise_conv.weight.dtype == torch.bfloat16
    assert {value.dtype for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var)} == {torch.float32}
    mean = torch.zeros_like(norm.running_mean, dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    generator = torch.Generator().manual_seed(3)
    audio = 0.1 * torch.randn(2, 16000, generator=generator)
    lengths = torch.tensor([16000, 16000])
    model.train()
    norm.running_mean.fill_(1.01 * 8)  # far away: the last tenths of it are what bf16 would never take
    mean.fill_(float(norm.running_mean[0]))
    for _ in range(120):
        model(audio, lengths, audio, lengths)
        mean = 0.9 * mean + 0.1 * inputs.pop().double().mean(0)
    assert float((norm.running_mean - mean).abs().max()) < 1e-3


def test_a_checkpoint_holds_them_in_fp32_and_every_reader_takes_it(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = (f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run", "trainer.max_steps=2")
    run = Pretraining(
        tiny_config(corpus, *words, "trainer.precision=bf16-true", "trainer.val_check_interval=2"), Quiet()
    )
    result = run.fit()
    assert result.last is not None
    assert result.nemo is not None
    state = run.module.model.state_dict()
    for path in (result.last, result.nemo):
        stored = load_checkpoint(path).state_dict
        assert all(value.dtype != torch.bfloat16 for value in stored.values())
        for name, value in state.items():
            assert torch.equal(stored[name], value.to(stored[name].dtype)), name
    moved = [name for name in state if name.endswith(STATISTICS)]
    assert moved
    assert all(not torch.equal(state[name], state[name].bfloat16().float()) for name in moved)  # finer than bf16


@pytest.mark.parametrize("precision", ["32", "bf16-true"])
def test_the_rate_is_that_of_the_plain_optimiser(corpus: dict[str, Path], precision: str) -> None:
    """Lightning's wrapper of an optimiser need not be an instance of a PyTorch class."""
    from types import SimpleNamespace

    module = NestModule(tiny_config(corpus, f"trainer.precision={precision}"))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.25)
    wrapper = SimpleNamespace(param_groups=[{"lr": 7.0}])
    strategy = SimpleNamespace(optimizers=[optimizer], _lightning_optimizers=[wrapper])
    module._trainer = SimpleNamespace(strategy=strategy, optimizers=[optimizer])  # type: ignore[assignment]
    assert module.learning_rate == 0.25


class Quiet:
    """Reporter that prints nothing."""

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        return lambda *_: None


@pytest.fixture
def encoder(corpus: dict[str, Path]) -> SpeechEncoder:
    nest = NestConfig.from_config(tiny_config(corpus))
    return SpeechEncoder(nest.preprocessor, nest.encoder).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_encoder_in_a_shorter_type_has_its_features_in_fp32(encoder: SpeechEncoder, dtype: torch.dtype) -> None:
    audio, lengths = 0.1 * torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)), torch.tensor([16000] * 2)
    features, expected = encoder.preprocessor(audio, lengths)[0], encoder(audio).features
    short = nn.Sequential(encoder).to(dtype)[0]
    assert torch.equal(short.preprocessor(audio, lengths)[0], features)
    assert {buffer.dtype for buffer in short.preprocessor.buffers()} == {torch.float32}
    encoded = short(audio.to(dtype)).features
    assert encoded.dtype == dtype
    assert float((encoded.float() - expected).detach().abs().max()) < 0.1
    short.train()
    short(audio).features.float().square().mean().backward()
    assert short.encoder.layers[0].norm_out.weight.grad.dtype == dtype


def test_shapes_are_known_without_weights(encoder: SpeechEncoder) -> None:
    """Build the model on `meta`, moved or created there."""
    with torch.device("meta"):
        made = SpeechEncoder(encoder.preprocessor.config, encoder.encoder.config)
    for each in (made, encoder.to("meta")):
        features, lengths = each(torch.empty(2, 16000, device="meta"))
        assert features.is_meta
        assert features.shape == (2, 13, 16)
        assert lengths.shape == (2,)
