"""Estimated memory against a real training step, and arithmetic against PyTorch's counter."""

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_config
from nestcli.config import load_config
from nestcli.model import fast
from nestcli.model.config import NestConfig
from nestcli.model.cost import Work, batch_work, selected_share, tokens_of, training_memory, work_per_second
from nestcli.model.module import NestModule
from nestcli.model.nest import NestModel
from nestcli.model.optim import build_optimizer


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_books=2"],
        ["model.quantizer.freeze=false", "model.masking.freeze=false", "model.mask_position=post_conv"],
        ["model.encoder.untie_biases=false", "model.encoder.n_layers=3", "model.encoder.use_bias=false"],
    ],
)
def test_memory_is_what_a_step_holds(corpus: dict[str, Path], precision: str, overrides: list[str]) -> None:
    config = tiny_config(corpus, f"trainer.precision={precision}", "model.masking.mask_prob=0.3", *overrides)
    model = NestModule(config).model.train()
    optimizer = build_optimizer(model, config)
    audio, lengths = torch.randn(2, 32000) * 0.1, torch.tensor([32000, 32000])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
        model(audio, lengths, audio, lengths).loss.backward()
    optimizer.step()
    memory = training_memory(config)
    assert memory.weights == held([*model.parameters(), *model.buffers()])
    assert memory.gradients == held([value.grad for value in model.parameters() if value.grad is not None])
    assert memory.optimizer == held([value for state in optimizer.state.values() for value in state.values()])
    assert memory.total == memory.weights + memory.gradients + memory.optimizer


def held(tensors: list[torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


def convolution_backward(
    grad_out: list[int], x: list[int], weight: list[int], *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    """PyTorch's counter takes the weights' gradient of a depthwise convolution for that of a dense one."""
    wanted = rest[-1]  # for the input, the weights, the bias
    return sum(wanted[:2]) * 2 * prod(grad_out[:1] + grad_out[2:]) * prod(weight)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.num_books=4", "model.encoder.conv_kernel_size=31", "model.encoder.ff_expansion_factor=2"],
        ["model.mask_position=post_conv", "model.masking.mask_prob=0.1"],
        ["model.encoder.subsampling_factor=4", "model.encoder.feat_out=64", "model.decoder.feat_in=64"],
    ],
)
def test_work_is_what_pytorch_counts(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "convolved_by_pieces", fast.convolved_whole)  # pieces overlap, and leave out padding
    monkeypatch.setattr(fast, "nearest_by_blocks", fast.nearest_in_fp64)  # blocks look at some codes twice
    nest = NestConfig.from_config(load_config("small", ["model.encoder.n_layers=3", *overrides]))
    samples, batch = 16000 * 5 + 777, 2
    model, audio = NestModel(nest).train(), torch.randn(batch, samples) * 0.1
    lengths = torch.full((batch,), samples)
    mapping = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        output = model(audio, lengths, audio, lengths)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        output.loss.backward()
    tokens = int(output.selected) // nest.quantizer.num_books
    assert tokens
    work = sum(batch_work(nest, samples, batch, tokens).values(), Work(0, 0))
    assert work.forward == forward.get_total_flops()
    assert work.backward == backward.get_total_flops()


def test_the_share_of_selected_tokens() -> None:
    nest = NestConfig.from_config(load_config("small"))
    long = selected_share(nest, 16000 * 60)
    assert long == pytest.approx(0.29, abs=0.02)
    assert selected_share(nest, 16000 * 2) < 0.9 * long  # no block starts near the end of a clip
    assert selected_share(nest, 16000 * 60) == long
    assert tokens_of(nest, 16000 * 16) == 202


def test_longer_clips_cost_more_in_attention_alone() -> None:
    config = load_config("large")
    short, long = (work_per_second(config, seconds) for seconds in (10.0, 60.0))
    assert long["attention"].forward > 1.3 * short["attention"].forward
    assert long["feed_forward"].forward == pytest.approx(short["feed_forward"].forward, rel=0.02)
