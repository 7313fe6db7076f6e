"""Training steps on a GPU: they run in every precision, wait for the GPU only where they must, and compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gpu.card import MARKS, REHEARSED, THIN, Steps, choose_gpu_variants, measures
from nestcli.config import load_config
from nestcli.model import masking
from nestcli.model.config import NestConfig
from nestcli.model.quantizer import RandomProjectionQuantizer

pytestmark = MARKS

MUST_WAIT = "nonzero()"  # in the one line at which a forward pass waits, for the number of predicted tokens
PLAIN = [(preset, precision, False) for preset in ("demo", "large") for precision in ("32", "bf16-mixed")]
COMPILED = [("large", "bf16-mixed", True), ("demo", "32", True)]  # the rehearsal compiles elsewhere
CASES = PLAIN if REHEARSED else [*PLAIN, *COMPILED]


@pytest.fixture
def exact() -> Iterator[None]:
    """Compute products and convolutions in fp32 without TF32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def losses_of(device: torch.device, count: int) -> list[float]:
    words = ["model.preprocessor.dither=0.0", "model.encoder.dropout=0.0", "model.encoder.dropout_att=0.0"]
    steps = Steps(device, "demo", [*words, "trainer.precision=32"])
    losses = []
    for seed in range(count):
        loss = steps.forward(seed)
        steps.update(loss)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.usefixtures("exact")
def test_twenty_losses_are_those_of_the_processor(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are drawn on the processor for both, because the two devices have different generators."""
    draw = masking.draw_mask
    monkeypatch.setattr(masking, "draw_mask", lambda lengths, *rest: draw(lengths.cpu(), *rest).to(lengths.device))
    expected = losses_of(torch.device("cpu"), 20)
    if REHEARSED:
        choose_gpu_variants(monkeypatch)
    losses = losses_of(device, 20)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=0, abs=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("words", [[], ["model.num_books=2"], ["model.num_classes=8192"]], ids=["one", "two", "large"])
def test_tokens_are_those_of_the_processor(
    device: torch.device, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    layer = RandomProjectionQuantizer(NestConfig.from_config(load_config("demo", words)).quantizer)
    features = torch.randn(4, 80, 8 * 200)
    expected = layer(features)
    if REHEARSED:
        choose_gpu_variants(monkeypatch)
    assert torch.equal(layer.to(device)(features.to(device)).cpu(), expected)


@contextmanager
def without_waits(device: torch.device) -> Iterator[None]:
    """Raise RuntimeError where the host waits for the GPU; nothing on a processor."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("preset", "precision", "compiled"),
    CASES,
    ids=[f"{preset}-{precision}-{'compiled' if compiled else 'plain'}" for preset, precision, compiled in CASES],
)
def test_three_steps_wait_only_where_they_must(
    device: torch.device, preset: str, precision: str, compiled: bool
) -> None:
    words = [f"trainer.precision={precision}", f"model.encoder.compile={str(compiled).lower()}"]
    words += ["model.encoder.n_layers=2"] if preset == "large" else []
    steps = Steps(device, preset, [*words, *(THIN if REHEARSED else [])])
    before = [value.detach().clone() for value in steps.model.encoder.parameters()]
    losses = [steps.forward(0)]  # the first step compiles, and allocates the optimizer's state
    steps.update(losses[0])
    for seed in (1, 2):
        with measures().noted_waits(device) as waits:
            losses.append(steps.forward(seed))
        with without_waits(device):
            steps.update(losses[-1])
        assert [line for line in waits if MUST_WAIT not in line] == []
        assert len(set(waits)) <= 1
    assert all(loss.isfinite() for loss in losses)
    after = steps.model.encoder.parameters()
    assert all(value.isfinite().all() for value in steps.model.encoder.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
