"""The sections `train_step`, `quantizer` and `precisions` on a model that takes no time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_config
from nestcli.bench import precisions, training
from nestcli.bench.context import BenchContext, Options
from nestcli.bench.precisions import precisions_section
from nestcli.bench.stepping import Stepper
from nestcli.bench.training import quantizer_section, train_step_section
from nestcli.config import resolved
from nestcli.errors import RunFailedError


def context_of(corpus: dict[str, Path], folder: Path, *overrides: str, **options: object) -> BenchContext:
    return BenchContext(tiny_config(corpus, *overrides), Options(rounds=1, **options), folder, lambda doing: None)


def stepper_of(corpus: dict[str, Path], folder: Path) -> Stepper:
    files = {name: str(folder / name) for name in ("weights", "batch")}
    parameters = {"config": resolved(tiny_config(corpus)), "clips": 2, "seconds": 1.5, "learning_rate": 1e-3}
    return Stepper({**parameters, **files, "device": "cpu"})


def test_both_sides_read_the_same_weights_and_batch(corpus: dict[str, Path], tmp_path: Path) -> None:
    first, second = stepper_of(corpus, tmp_path), stepper_of(corpus, tmp_path)
    assert load_file(tmp_path / "batch")["clean"].shape == (2, 24000)
    losses = [[stepper.step(seed) for seed in (3, 4)] for stepper in (first, second)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    assert torch.equal(first.tokens(first.batch["features"]), second.tokens(second.batch["features"]))


def test_where_the_time_of_a_step_goes(corpus: dict[str, Path], tmp_path: Path) -> None:
    stepper = stepper_of(corpus, tmp_path)
    stepper.step(0)
    account = stepper.profile()
    assert account["seconds_by_kind"]["matrix products"] > 0
    assert account["seconds_by_kind"]["optimiser"] > 0
    assert account["floating_point_operations"] > 1e6
    assert account["device_operations_a_second"] > 1e8


def test_a_loader_feeds_the_steps(corpus: dict[str, Path], tmp_path: Path) -> None:
    fed = stepper_of(corpus, tmp_path).fed(4)
    assert fed["seconds"] > 0
    assert 4 * 4 * 1.2 <= fed["audio_seconds"] <= 4 * 4 * 1.6


@pytest.mark.slow
def test_the_quantizer(corpus: dict[str, Path], tmp_path: Path) -> None:
    section = quantizer_section(context_of(corpus, tmp_path)).to_json()
    assert 0 < section["ours"]["min"] < 5
    assert section["nemo"] is None
    assert 0 <= section["peak_memory_bytes"]["ours"] < 1 << 28


@pytest.mark.slow
def test_the_training_step(corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SECONDS", 2.0), ("MEMORY_SECONDS", 2.0)):
        monkeypatch.setattr(training, name, value)
    section = train_step_section(context_of(corpus, tmp_path)).to_json()
    assert list(section["ways"]) == ["plain", "compiled"]
    for way in section["ways"].values():
        assert 0 < way["share_of_matrix_product_limit"] < 1
        assert way["peak_memory_bytes"] > 1 << 27
    assert section["ways"]["compiled"]["seconds_by_kind"]["compiled layers"] > 0


@pytest.mark.slow
def test_precisions(corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "PRECISIONS", ("32", "bf16-mixed"))
    rows = precisions_section(context_of(corpus, tmp_path, audio_seconds=(4.0,))).to_json()["rows"]
    assert [(row["precision"], row["compiled"]) for row in rows] == [
        ("32", False), ("32", True), ("bf16-mixed", False), ("bf16-mixed", True),
    ]  # fmt: skip
    assert all(row["fed_audio_per_second"] > 0 for row in rows)
    assert all(row["utilisation_of_data_sheet"] is None for row in rows)


def test_where_no_step_can_be_run(corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_peer(**_: object) -> None:
        raise RunFailedError("out of memory")

    monkeypatch.setattr(precisions, "our_peer", no_peer)
    with pytest.raises(RunFailedError, match=r"every step failed\. The first error: out of memory"):
        precisions_section(context_of(corpus, tmp_path, audio_seconds=(4.0,)))
