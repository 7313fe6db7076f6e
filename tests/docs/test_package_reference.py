"""docs/reference/package.py: weights and card out of the folders that docs/reference/run.py writes."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import assert_close
from docs.scripts import script
from nestcli import load_encoder
from nestcli.checkpoint.load import load_checkpoint
from nestcli.checkpoint.nemo import write_nemo
from nestcli.config import load_config
from nestcli.errors import NestError
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=2", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8", "model.train_ds.manifest_filepath=/secret/train.json",
    "model.train_ds.noise_manifest=[/secret/noise.json]",
]  # fmt: skip
NUMBERS = {
    "words-noise": ("accuracy", 5.0, {"pretrained": (0.4321, 0.5126), "untrained": (0.2,), "log-mel": (0.31, 0.3),
                                      "log-mel-normalised": (0.25,)}),
    "words-quiet": ("accuracy", None, {"pretrained": (0.7,), "untrained": (0.5,), "log-mel": (0.6,),
                                       "log-mel-normalised": (0.55,)}),
    "phones-quiet": ("phone error rate", None, {"pretrained": (0.6149, 0.7), "untrained": (0.8,), "log-mel": (0.75,),
                                                "log-mel-normalised": (0.74,)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def package() -> ModuleType:
    return script("package")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder OUT/reference of a run that was best at its second validation."""
    folder = tmp_path / "reference" / "NEST-reference"
    (folder / "checkpoints").mkdir(parents=True)
    config = load_config("reference", TINY)
    torch.manual_seed(3)
    model = NestModel(NestConfig.from_config(config))
    for norm in (each for each in model.modules() if isinstance(each, torch.nn.BatchNorm1d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(1e-9, 2.0)  # less than fp16 can hold
    write_nemo(folder / "checkpoints" / "NEST-reference.nemo", config, model.state_dict())
    lines = [
        line(10, train_loss=5.0),
        line(20, val_loss=5.25, val_unigram_loss=5.5, val_masked_accuracy=0.01, val_unigram_accuracy=0.02),
        line(40, val_loss=4.75, val_unigram_loss=5.375, val_masked_accuracy=0.125, val_unigram_accuracy=0.03),
        line(
            60, val_loss=5.0, val_unigram_loss=5.4, val_masked_accuracy=0.1, val_unigram_accuracy=0.03, collapsed=True
        ),
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder.parent


def line(step: int, **values: float) -> dict[str, float]:
    health = {"effective_rank": 9.4, "predicted_perplexity": 20.6, "target_perplexity": 27.3, "bad_steps": 2}
    return {"step": step, "audio_hours": step / 16, "collapsed": False, **health, **values}


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    for name, (measure, snr, means) in NUMBERS.items():
        systems = [
            {"name": system, "pool": str(pool), "mean": mean, "deviation": 0.0125 + 0.01 * pool}
            for system, found in means.items()
            for pool, mean in enumerate(found)
        ]
        noise = None if snr is None else {"manifest": "noise.json", "snr": snr}
        document = {"measure": measure, "noise": noise, "utterances": 1360, "systems": systems}
        (tmp_path / "probes" / name).mkdir(parents=True)
        (tmp_path / "probes" / name / "probe.json").write_text(json.dumps(document))
    return tmp_path / "probes"


def test_the_card_has_the_numbers_of_its_sources(package: ModuleType, run: Path, probes: Path, tmp_path: Path) -> None:
    package.package(run, probes, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for row in (
        "| training | 40 steps, 2.5 hours heard |",
        "| validation loss | 4.750 nats, 0.625 below guessing by frequency (5.375) |",
        "| masked tokens correct | 12.5% in validation; guessing by frequency: 3.0% |",
        "| health | no collapse in 3 logged steps; 2 steps skipped; effective rank 9 of 16; predictions use 21 codes "
        "(targets: 27) |",
        "| phones | quiet | phone error rate (lower is better) | 1,360 | 61.5 ± 1.2 | 80.0 ± 1.2 | 75.0 ± 1.2 "
        "| 74.0 ± 1.2 |\n"
        "| words | quiet | accuracy (higher is better) | 1,360 | 70.0 ± 1.2 | 50.0 ± 1.2 | 60.0 ± 1.2 | 55.0 ± 1.2 |\n"
        "| words | noise, 5 dB | accuracy (higher is better) | 1,360 | 51.3 ± 2.2 | 20.0 ± 1.2 | 31.0 ± 1.2 "
        "| 25.0 ± 1.2 |",
        "2 layers of width 16, frames of 40 ms",
    ):
        assert row in card
    package.package(run, probes, tmp_path / "out", step=60)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "collapse reported 1 times in 4 logged steps" in card


def test_the_weights_are_those_of_the_checkpoint(package: ModuleType, run: Path, probes: Path, tmp_path: Path) -> None:
    package.package(run / "NEST-reference", probes, tmp_path / "out")
    path, [checkpoint] = tmp_path / "out" / "encoder.safetensors", run.rglob("*.nemo")
    ours, theirs = load_checkpoint(path), load_checkpoint(checkpoint)
    assert list(ours.state_dict) == list(theirs.state_dict)
    for name, value in ours.state_dict.items():
        exact = theirs.state_dict[name]
        assert value.dtype == exact.dtype
        if exact.is_floating_point() and name.startswith(("encoder.", "decoder.")) and "running" not in name:
            exact = exact.half().float()
        assert torch.equal(value, exact), name
    audio_N = 0.1 * torch.randn(16_000)
    with torch.no_grad():
        assert_close(load_encoder(path)(audio_N).features, load_encoder(checkpoint)(audio_N).features, 0.02)
    assert b"secret" not in path.read_bytes()


def test_what_cannot_be_packaged_is_told(
    package: ModuleType, run: Path, probes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NestError, match=r"holds no \*/probe\.json"):
        package.package(run, tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(NestError, match="has no validation at step 10"):
        package.package(run, probes, tmp_path / "out", step=10)
    monkeypatch.setattr(package, "MOST_BYTES", 1000)
    with pytest.raises(NestError, match="bytes in half precision; the package takes 1,000"):
        package.package(run, probes, tmp_path / "out")
    assert not (tmp_path / "out" / "encoder.safetensors").exists()
    (run / "NEST-reference" / "checkpoints" / "NEST-reference.nemo").unlink()
    with pytest.raises(NestError, match=r"holds 0 files \*\.nemo, and must hold one"):
        package.package(run, probes, tmp_path / "out")
