"""Training with NeMo's own encoder, where NeMo 3.0.0 is installed; `make parity` runs this in its environment."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY_RUN, tiny_config
from nestcli.checkpoint.lightning import AtomicCheckpointIO, load_lightning_checkpoint
from nestcli.checkpoint.load import load_checkpoint
from nestcli.errors import CheckpointError
from nestcli.model.module import CONFIG_KEY, NestModule


def is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.nemo,
    pytest.mark.filterwarnings("default"),  # NeMo's, and those of the versions that it pins
    pytest.mark.skipif(not is_installed("nemo_toolkit"), reason="NeMo is not installed in this environment"),
]

NEMO = "model.encoder.backend=nemo"
SETTINGS = [
    ["model.mask_position=pre_conv"],
    ["model.mask_position=post_conv", "model.masking.mask_prob=0.3"],
    ["model.encoder.n_layers=3", "model.encoder.stochastic_depth_drop_prob=0.4", "model.encoder.untie_biases=false"],
    ["model.encoder.subsampling_factor=4", "model.encoder.feat_out=24", "model.decoder.feat_in=24"],
    ["model.encoder.use_bias=false", "model.encoder.xscaling=false", "model.encoder.conv_norm_type=layer_norm"],
    ["model.encoder.use_pytorch_sdpa=true", "model.encoder.att_context_size=[8,8]", "trainer.precision=bf16-true"],
]


def pretrain(corpus: dict[str, Path], folder: Path, *words: str, nemo: bool) -> Path:
    """`nest pretrain` as it is typed, 20 steps of a tiny model unless words say otherwise; the run's folder."""
    command = [
        sys.executable, "-m", "nestcli", "pretrain", "small", *TINY_RUN, "trainer.max_steps=20",
        f"model.train_ds.manifest_filepath={corpus['train']}", f"model.train_ds.noise_manifest={corpus['noise']}",
        f"model.validation_ds.manifest_filepath={corpus['val']}", f"exp_manager.exp_dir={folder}",
        "exp_manager.name=run", "trainer.val_check_interval=5", *words,
    ]  # fmt: skip
    environment = {**os.environ, "USE_NEMO_CONFORMER": str(nemo).lower()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert ("encoder    NeMo's own ConformerEncoder" in done.stderr) == nemo
    return folder / "run"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*-last.ckpt"), key=lambda path: int(path.stem.split("=")[-1][:-5]))


# Their gradients are zero but for rounding, which Adam makes steps of full length of; validation sees them.
_ROUNDED = ("depthwise_conv.bias", "linear_k.bias", "batch_norm.running_mean")


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Losses of every step and validation, and the last weights, to what rounding does to a run."""
    pairs = list(zip(metrics(ours), metrics(theirs), strict=True))
    assert [row["step"] for row, _ in pairs] == list(range(1, len(pairs) + 1))
    for our_row, their_row in pairs:
        assert our_row.keys() == their_row.keys()
        for key, tolerance in (("train_loss", 1e-5), ("val_loss", 1e-3), ("lr", 0.0)):
            if key in our_row:
                assert our_row[key] == pytest.approx(their_row[key], rel=tolerance), (key, our_row["step"])
    our_state, their_state = (load_lightning_checkpoint(last(folder))["state_dict"] for folder in (ours, theirs))
    assert list(our_state) == list(their_state)
    for name, value in our_state.items():
        difference = (value.float() - their_state[name].float()).abs()
        assert difference.max() < 0.1, name
        assert difference.mean() < 1e-3 or name.endswith(_ROUNDED), name


def test_a_run_and_runs_that_change_the_encoder_half_way(corpus: dict[str, Path], tmp_path: Path) -> None:
    ours = pretrain(corpus, tmp_path / "ours", nemo=False)
    theirs = pretrain(corpus, tmp_path / "theirs", nemo=True)
    assert_same_run(ours, theirs)
    for name, nemo_first in (("to_nemo", False), ("from_nemo", True)):
        pretrain(corpus, tmp_path / name, "trainer.max_steps=10", nemo=nemo_first)
        assert_same_run(ours, pretrain(corpus, tmp_path / name, nemo=not nemo_first))
    stored = load_lightning_checkpoint(last(theirs))[CONFIG_KEY]
    assert stored["model"]["encoder"]["backend"] == "nemo"
    for path in (last(theirs), theirs / "checkpoints" / "run.nemo"):
        assert "backend" not in load_checkpoint(path).config.model.encoder


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda words: " ".join(words).replace("model.", ""))
def test_first_weights_losses_and_gradients(corpus: dict[str, Path], overrides: list[str]) -> None:
    audio = torch.randn(3, 32000, generator=torch.Generator().manual_seed(1)) * 0.1
    lengths = torch.tensor([32000, 25000, 19000])
    results = []
    for backend in ("model.encoder.backend=nest", NEMO):
        model = NestModule(tiny_config(corpus, *overrides, backend)).model.train()
        first = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(2)
        loss = model(audio, lengths, audio, lengths).loss
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        order = [name for name, _ in model.named_parameters()]
        results.append((first, order, loss.detach(), gradients, torch.rand(1), model.state_dict()))
    ours, theirs = results
    assert list(ours[0]) == list(theirs[0])
    assert all(torch.equal(value, theirs[0][name]) for name, value in ours[0].items())
    assert ours[1] == theirs[1]  # the optimiser's states are stored by this order
    assert ours[2] > 1
    assert torch.allclose(ours[2], theirs[2], rtol=1e-6)
    assert ours[3].keys() == theirs[3].keys()
    tolerance = 1e-2 if "trainer.precision=bf16-true" in overrides else 1e-5
    for name, gradient in ours[3].items():
        assert torch.allclose(gradient, theirs[3][name], rtol=tolerance, atol=tolerance), name
    assert torch.equal(ours[4], theirs[4])
    assert all(torch.allclose(value, theirs[5][name], atol=tolerance) for name, value in ours[5].items())


def test_no_code_of_a_checkpoint_runs_under_the_lightning_of_nemo(tmp_path: Path) -> None:
    class Touches:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": {}, "x": Touches()}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)
    assert not (tmp_path / "touched").exists()
