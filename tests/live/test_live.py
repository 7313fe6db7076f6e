"""`nest compare` against a live NeMo; NEST_NEMO_PYTHON names the Python of an environment with it (`make parity`)."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestcli.config import load_config
from nestcli.model import attention, loss
from nestcli.parity.compare import RECORDED_MODEL, Request, compare
from nestcli.parity.nemo import BridgedNemo
from nestcli.parity.report import SECTIONS, Report

pytestmark = [
    pytest.mark.nemo,
    pytest.mark.skipif("NEST_NEMO_PYTHON" not in os.environ, reason="NEST_NEMO_PYTHON names no NeMo"),
]


@pytest.fixture(scope="module")
def nemo() -> Iterator[BridgedNemo]:
    bridge = BridgedNemo(os.environ["NEST_NEMO_PYTHON"])
    yield bridge
    bridge.close()


def compared(nemo: BridgedNemo, *overrides: str, audio: list[Path] | None = None, only: tuple[str, ...] = ()) -> Report:
    config = load_config("small", [*RECORDED_MODEL, *overrides])
    return compare(Request("a small model", config, audio=audio or [], only=only), nemo)


def passed(report: Report) -> bool:
    assert report.live
    assert report.passed, report.first_divergence or report.known_differences
    return True


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.encoder.use_bias=false", "model.encoder.xscaling=false", "model.encoder.conv_kernel_size=5"],
        ["model.num_books=3", "model.masking.allow_overlap=false", "model.masking.mask_prob=0.4"],
        ["model.squeeze_single=true", "model.encoder.att_context_size=[8,8]", "model.encoder.use_pytorch_sdpa=true"],
        ["model.encoder.conv_norm_type=layer_norm", "model.encoder.untie_biases=false"],
        ["model.encoder.stochastic_depth_drop_prob=0.4", "model.encoder.dropout_emb=0.2"],
        ["model.encoder.subsampling_factor=4", "model.encoder.feat_out=24", "model.decoder.feat_in=24"],
        ["model.masking.mask_value=0.5", "model.encoder.att_context_style=chunked_limited",
         "model.encoder.att_context_size=[14,6]"],
        ["model.mask_position=post_conv"],
    ],
    ids=lambda overrides: " ".join(overrides).replace("model.", ""),
)  # fmt: skip
def test_other_settings(nemo: BridgedNemo, overrides: list[str]) -> None:
    only = tuple(section for section in SECTIONS if section not in ("config", "augmentation"))
    assert passed(compared(nemo, *overrides, only=only))


def test_real_speech(nemo: BridgedNemo, shared_audio: Path) -> None:
    files = sorted((shared_audio / "speech").rglob("*.flac"))
    long_enough = [path for path in files if path.stat().st_size > 100_000][:3]
    assert long_enough
    assert passed(compared(nemo, audio=long_enough))
    assert passed(compared(nemo, audio=long_enough[:1], only=("preprocessor", "quantizer", "encoder", "loss")))


def test_a_fault_shows_against_a_live_nemo(nemo: BridgedNemo, monkeypatch: pytest.MonkeyPatch) -> None:
    shift = attention.relative_shift
    monkeypatch.setattr(attention, "relative_shift", lambda scores: shift(scores.roll(1, -1)))
    report = compared(nemo, only=("preprocessor", "quantizer", "encoder"))
    assert report.first_divergence is not None
    section, check = report.first_divergence
    assert (section.name, check.name) == ("encoder", "evaluation: layers.0")
    monkeypatch.undo()
    monkeypatch.setattr(loss.MaskedTokenLoss, "select", lambda self, mask: mask[:, ::8])
    assert compared(nemo, only=("encoder",)).passed
    assert not compared(nemo, only=("loss",)).passed


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nestcli", "compare", "small", "model.encoder.n_layers=1", "--json"]
    page = tmp_path / "page.html"
    done = subprocess.run(
        [*command, "--nemo", "--only", "config", "--only", "parameters", "--html", str(page)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["passed"]
    assert document["nemo"] == {"version": "3.0.0", "live": True}
    assert [section["name"] for section in document["sections"]] == ["config", "parameters"]
    assert page.stat().st_size > 10_000
