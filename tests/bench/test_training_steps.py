"""The sections `train_step`, `quantizer` and `precisions` on a model that takes no time."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from conftest import tiny_config
from nestcli.bench import precisions, training
from nestcli.bench.context import BenchContext, Options
from nestcli.bench.precisions import precisions_section
from nestcli.bench.stepping import Stepper
from nestcli.bench.training import quantizer_section, train_step_section
from nestcli.config import resolved
from nestcli.errors import RunFailedError
from nestcli.training.config_checks import check_settings


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
    kept = {name: precisions.PRECISIONS[name] for name in ("32", "tf32", "bf16-mixed")}
    monkeypatch.setattr(precisions, "PRECISIONS", kept)
    rows = precisions_section(context_of(corpus, tmp_path, audio_seconds=(4.0,))).to_json()["rows"]
    assert [(row["precision"], row["compiled"]) for row in rows] == [
        ("32", False), ("32", True), ("bf16-mixed", False), ("bf16-mixed", True),
    ]  # fmt: skip
    assert all(row["fed_audio_per_second"] > 0 for row in rows)
    assert all(row["utilisation_of_data_sheet"] is None for row in rows)


@pytest.mark.parametrize("name", list(precisions.PRECISIONS))
def test_every_row_can_be_chosen_for_training(corpus: dict[str, Path], tmp_path: Path, name: str) -> None:
    words = [f"{key}={value}" for key, value in precisions.PRECISIONS[name].items()]
    check_settings(tiny_config(corpus, *words))
    row = precisions._config(context_of(corpus, tmp_path), name, 8, compiled=False)
    check_settings(row)
    assert {key: OmegaConf.select(row, key) for key in precisions.PRECISIONS[name]} == precisions.PRECISIONS[name]


@pytest.mark.parametrize(
    ("device", "compiler", "rows"),
    [
        ("cpu", True, [("32", False), ("32", True), ("bf16-mixed", False), ("bf16-mixed", True),
                       ("bf16-true", False), ("bf16-true", True)]),
        ("cuda", False, [("32", False), ("tf32", False), ("bf16-mixed", False), ("bf16-true", False)]),
    ],
)  # fmt: skip
def test_rows_that_training_refuses_do_not_appear(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    device: str, compiler: bool, rows: list[tuple[str, bool]],
) -> None:  # fmt: skip
    def row(context: BenchContext, precision: str, seconds: float, compiled: bool) -> dict[str, Any]:
        taken = {"audio_per_second": 1.0, "peak_memory_bytes": 1, "device": device}
        return {"precision": precision, "compiled": compiled, **taken}

    monkeypatch.setattr(precisions, "_row", row)
    monkeypatch.setattr(BenchContext, "device", device)
    monkeypatch.setattr(BenchContext, "why_not_compiled", lambda self: None if compiler else "no compiler")
    section = precisions_section(context_of(corpus, tmp_path, audio_seconds=(4.0,))).to_json()
    assert [(row["precision"], row["compiled"]) for row in section["rows"]] == rows
    assert list(section["keys"]) == list(dict.fromkeys(name for name, _ in rows))
    assert section["not_compiled"] == (None if compiler else "no compiler")


# ---- beside NeMo -------------------------------------------------------------------------------------------------


class Peer:
    """Answers as a side would, with given losses and tokens, and keeps what it was asked."""

    def __init__(self, opened: list[dict[str, Any]], tokens: list[int], loss: float) -> None:
        self.opened, self.tokens, self.loss = opened, tokens, loss

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self, operation: str, **parameters: Any) -> dict[str, Any]:
        if operation == "open_training":
            self.opened.append(parameters)
        return {
            "open_training": {},
            "step_round": {"seconds": [0.5], "losses": [self.loss]},
            "quantizer_round": {"seconds": [0.5], "tokens": self.tokens},
            "profile_step": {"floating_point_operations": 1.0, "device_operations_a_second": 10.0},
            "peak_of": {"before": 3, "peak": 10},
        }[operation]


def beside_nemo(
    corpus: dict[str, Path], folder: Path, patch: pytest.MonkeyPatch, device: str, *words: str,
    ours: tuple[list[int], float] = ([1, 2], 5.0), nemos: tuple[list[int], float] = ([1, 2], 5.0),
) -> tuple[BenchContext, list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    asked: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    patch.setattr(training, "our_peer", lambda **options: Peer(asked[0], *ours))
    patch.setattr(training, "nemo_peer", lambda python, **options: Peer(asked[1], *nemos))
    patch.setattr(BenchContext, "device", device)
    context = context_of(corpus, folder, *words, nemo_python="python")
    context._nemo = "3.0.0"
    return context, *asked


def test_both_sides_run_on_the_same_device_and_in_the_same_precision(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("trainer.precision=bf16", "nest.matmul_precision=high")
    context, ours, nemos = beside_nemo(corpus, tmp_path, monkeypatch, "cuda", *words, nemos=([1, 2], 5.1))
    section = train_step_section(context).to_json()
    assert {each["device"] for each in [*ours, *nemos]} == {"cuda"}
    assert {(each["precision"], each["matmul_precision"]) for each in nemos} == {("bf16-mixed", "high")}
    assert (section["device"], section["nemo_precision"]) == ("cuda", "bf16-mixed")
    assert section["losses_differ_by"] == pytest.approx(1 - 5.0 / 5.1)
    assert section["peak_memory_bytes"] == {"ours": 10, "nemo": 10}


@pytest.mark.parametrize(
    ("device", "words", "loss", "fails"),
    [
        ("cpu", (), 5.0001, False),
        ("cpu", (), 5.01, True),
        ("cpu", ("trainer.precision=bf16-mixed",), 5.01, False),
        ("cuda", (), 5.01, False),
        ("cuda", (), 6.0, True),
        ("cuda", (), math.nan, True),
    ],
)
def test_losses_are_those_of_nemo(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    device: str, words: tuple[str, ...], loss: float, fails: bool,
) -> None:  # fmt: skip
    context, *_ = beside_nemo(corpus, tmp_path, monkeypatch, device, *words, nemos=([], loss))
    with pytest.raises(RunFailedError, match="losses differ") if fails else nullcontext():
        train_step_section(context)


@pytest.mark.parametrize(
    ("device", "share", "fails"), [("cpu", 0.01, True), ("cuda", 0.01, False), ("cuda", 0.2, True)]
)
def test_tokens_are_those_of_nemo(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, share: float, fails: bool
) -> None:
    other = [1] * int(100 * share) + [0] * int(100 * (1 - share))
    context, *_ = beside_nemo(corpus, tmp_path, monkeypatch, device, ours=([0] * 100, 1.0), nemos=(other, 1.0))
    with pytest.raises(RunFailedError, match="of the tokens differ") if fails else nullcontext():
        section = quantizer_section(context).to_json()
        assert section["tokens_that_differ"] == share
        assert section["peak_memory_bytes"] == {"ours": 7, "nemo": 7}


def test_where_nothing_can_be_compiled_plain_steps_count(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, *_ = beside_nemo(corpus, tmp_path, monkeypatch, "cpu")
    monkeypatch.setenv("CXX", "/none")
    monkeypatch.setattr("shutil.which", lambda name: None)
    section = train_step_section(context).to_json()
    assert list(section["ways"]) == ["plain"]
    assert "a C++ compiler" in section["not_compiled"]


def test_where_no_step_can_be_run(corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_peer(**_: object) -> None:
        raise RunFailedError("out of memory")

    monkeypatch.setattr(precisions, "our_peer", no_peer)
    with pytest.raises(RunFailedError, match=r"every step failed\. The first error: out of memory"):
        precisions_section(context_of(corpus, tmp_path, audio_seconds=(4.0,)))
