"""The side of NeMo, with a stand-in for NeMo and for a GPU."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nestcli.bench import side


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU that writes down what it is asked."""
    asked: list[str] = []
    for name, value in (
        ("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100),
        ("max_memory_allocated", 700),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: (asked.append(name), value)[1])
    monkeypatch.setitem(side.STATE, "device", "cuda")
    return asked


def test_a_time_begins_and_ends_with_an_idle_gpu(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(side.STATE, "step", lambda seed: gpu.append(f"step {seed}") or 1.0)
    side.step_round({"steps": 2, "seed": 7})
    assert gpu == ["synchronize", "step 7", "synchronize", "synchronize", "step 8", "synchronize"]
    gpu.clear()
    monkeypatch.setitem(side.STATE, "features", None)
    monkeypatch.setitem(side.STATE, "tokens", lambda features: gpu.append("tokens") or torch.tensor([[[3, 4]]]))
    facts = side.quantizer_round({"times": 1})
    assert gpu == ["synchronize", "tokens", "synchronize"]
    assert facts["tokens"] == [3, 4]


def test_the_memory_of_a_step_is_that_of_its_device(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(side.STATE, "step", lambda seed: gpu.append("step") or 1.0)
    parameters = {"measured": "step_round", "steps": 1, "seed": 0}
    assert side.peak_of(parameters) == {"before": 100, "peak": 700}
    assert gpu.index("reset_peak_memory_stats") < gpu.index("memory_allocated") < gpu.index("step")
    assert gpu.index("step") < gpu.index("max_memory_allocated")
    monkeypatch.setitem(side.STATE, "device", "cpu")
    gpu.clear()
    assert side.peak_of(parameters)["peak"] > 1 << 20
    assert gpu == ["step"]


class Model(torch.nn.Module):
    """Takes what NeMo's model takes, and learns one weight."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def setup_optimization(self, optim: Any) -> list[Any]:
        return [torch.optim.SGD(self.parameters(), lr=optim.lr)]

    def forward(self, input_signal: torch.Tensor, apply_mask: bool, **lengths: torch.Tensor) -> Any:
        made = self.layer(input_signal)
        self.seen.append(made.dtype)
        return made, None, None, None

    def loss(self, masks: Any, decoder_outputs: torch.Tensor, **others: Any) -> torch.Tensor:
        return decoder_outputs.float().square().mean()


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A module in the place of NeMo's; returns the parameters of a training."""
    made: list[Model] = []

    class Kept(Model):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            made.append(self)

    models = ModuleType("nemo.collections.asr.models")
    models.EncDecDenoiseMaskedTokenPredModel = Kept  # type: ignore[attr-defined]
    for name in ("nemo", "nemo.collections", "nemo.collections.asr"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "nemo.collections.asr.models", models)
    for key in ("step", "features", "device", "tokens"):
        monkeypatch.setitem(side.STATE, key, None)
    save_file(Model(None).state_dict(), tmp_path / "weights")
    names = ("clean", "noisy", "features", "clean_len", "noisy_len")
    save_file({name: torch.ones(2, 4) for name in names}, tmp_path / "batch")
    files = {name: str(tmp_path / name) for name in ("weights", "batch")}
    options = {"device": "cpu", "precision": "32", "matmul_precision": None}
    return {"model": {}, "optim": {"lr": 0.1, "sched": {}}, **files, **options, "made": made}


@pytest.mark.parametrize(("precision", "dtype"), [("32", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_nemo_trains_in_the_precision_of_the_configuration(
    nemo: dict[str, Any], precision: str, dtype: torch.dtype
) -> None:
    side._open_training({**nemo, "precision": precision})
    first, second = (side.step_round({"steps": 1, "seed": 0})["losses"][0] for _ in range(2))
    assert second < first
    (model,) = nemo["made"]
    assert set(model.seen) == {dtype}
    assert side.STATE["device"] == "cpu"


def test_nemo_rounds_products_as_the_configuration_says(nemo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    side._open_training({**nemo, "matmul_precision": "high"})
    assert chosen == ["high"]
    assert torch.backends.cudnn.allow_tf32


def test_an_environment_of_nemo_without_a_gpu_is_told(nemo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="of this environment finds no GPU"):
        side._open_training({**nemo, "device": "cuda"})


def test_nemos_loader_delivers_where_ours_does(nemo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []

    class Moving:
        def to(self, device: str, *, non_blocking: bool) -> torch.Tensor:
            moved.append(device)
            assert non_blocking
            return torch.tensor([32_000, 16_000])

    batch = SimpleNamespace(audio=Moving(), audio_len=Moving(), sample_ids=None)
    models = sys.modules["nemo.collections.asr.models"].EncDecDenoiseMaskedTokenPredModel  # type: ignore[attr-defined]
    monkeypatch.setattr(models, "_setup_dataloader_from_config", lambda model, block: [batch] * 3, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(side.STATE, "batches", None)
    side._open_loader({"train_ds": {"sample_rate": 16_000}, "device": "cuda"})
    assert next(side.STATE["batches"]) == 3.0
    assert moved == ["cuda"] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_stand_in_of_nemo_trains_on_a_gpu(nemo: dict[str, Any]) -> None:
    side._open_training({**nemo, "device": "cuda", "precision": "bf16-mixed"})
    facts = side.peak_of({"measured": "step_round", "steps": 2, "seed": 0})
    assert 0 < facts["before"] < facts["peak"]
    assert next(nemo["made"][0].parameters()).is_cuda
