"""Waits of the host for a GPU in a step, counted on a processor with the variants that a GPU takes."""

from __future__ import annotations

import pytest
import torch

from nestcli.config import load_config
from nestcli.model import fast, quantizer
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel
from waiting import Waits


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.mask_position=post_conv"],
        ["model.encoder.dropout_draws=hash", "model.encoder.dropout=0.1"],
        ["model.masking.max_mask_ratio=0.2"],
    ],
    ids=["standard", "masks after sub-sampling", "hashed dropout", "limited masks"],
)
def test_a_forward_and_backward_pass_waits_once(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The host learns how many tokens are selected."""
    for module in (fast, quantizer):
        monkeypatch.setattr(module, "on_a_gpu", lambda _: True)
    torch.manual_seed(1)
    model = NestModel(NestConfig.from_config(load_config("demo", words))).train()
    audio, lengths = 0.1 * torch.randn(3, 32_000), torch.tensor([32_000, 30_000, 20_000])
    with Waits() as waits:
        model(audio, lengths, audio, lengths).loss.backward()
    assert waits.found == ["nonzero"]


def test_what_is_counted() -> None:
    numbers = torch.arange(4.0)
    with Waits() as waits:
        numbers[numbers > 2].sum().item()
        torch.tensor([1.0])
    assert waits.found == ["index", "_local_scalar_dense", "lift_fresh"]


def test_a_gpu_finds_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    config = NestConfig.from_config(load_config("demo", ["model.num_books=2"])).quantizer
    layer = quantizer.RandomProjectionQuantizer(config)
    features = torch.randn(2, 80, 8 * 300)
    expected = layer(features)
    for module in (fast, quantizer):
        monkeypatch.setattr(module, "on_a_gpu", lambda _: True)
    monkeypatch.setattr(fast, "_SCORES_ON_A_GPU", 256 * 100)  # several products
    assert torch.equal(layer(features), expected)
