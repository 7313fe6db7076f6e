"""Runs on a GPU: an exact resume, and what is done with the trained encoder."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import write_noise_wav
from evaluation.tiny_encoder import tiny_checkpoint
from gpu.card import MARKS, REHEARSED, keys_of
from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.evaluation.extract import ExtractOptions, extract
from nestcli.evaluation.loading import load_encoder
from nestcli.evaluation.probes.options import ProbeOptions
from nestcli.evaluation.probes.results import PRETRAINED
from nestcli.evaluation.probes.run import probe
from training.runs import rows, train

pytestmark = MARKS


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the key that makes a GPU compute the same each time, and undo what it sets for the process.

    `trainer.deterministic=true` selects deterministic kernels and sets CUBLAS_WORKSPACE_CONFIG, which cuBLAS reads when
    it is first used; an earlier test may have used it, so the variable is set here too.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield "trainer.deterministic=true"
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_resumed_run_is_the_same_to_the_last_bit(
    corpus: dict[str, Path], tmp_path: Path, device: torch.device, deterministic: str, precision: str
) -> None:
    words = [*keys_of(device), deterministic, f"trainer.precision={precision}", "trainer.val_check_interval=2"]
    whole = train(corpus, tmp_path / "whole", "trainer.max_steps=6", *words)
    for steps in (3, 6):
        parts = train(corpus, tmp_path / "parts", f"trainer.max_steps={steps}", *words)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    ours, theirs = (load_lightning_checkpoint(result.last)["state_dict"] for result in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """Twelve utterances by four speakers, in a manifest."""
    lines = []
    for number in range(12):
        path = tmp_path / "audio" / f"{number}.wav"
        write_noise_wav(path, 1.0 + 0.1 * number, number)
        row = {"audio_filepath": str(path), "duration": 1.0 + 0.1 * number, "speaker": f"s{number % 4}"}
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "speech.json").write_text("".join(lines))
    return tmp_path / "speech.json"


def test_extracted_features_are_those_of_the_processor(speech: Path, tmp_path: Path, device: torch.device) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    found = []
    for name in ("cpu", device.type):
        done = extract(str(speech), checkpoint, tmp_path / f"features-{len(found)}", ExtractOptions(device=name))
        lines = [json.loads(line) for line in done.manifest.read_text().splitlines()]
        found.append([np.load(line["feature_path"]) for line in lines])
    assert len(found[1]) == 12
    for theirs, ours in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 0.01  # convolutions of a GPU may round to TF32


def test_a_probe_gives_an_accuracy(speech: Path, tmp_path: Path, device: torch.device) -> None:
    options = ProbeOptions("speaker", seeds=1, device=device.type)
    result = probe(str(speech), tiny_checkpoint(tmp_path), tmp_path, options)
    assert 0 <= result.best(PRETRAINED).mean <= 1


@pytest.mark.skipif(REHEARSED, reason="tests/checkpoint/test_onnx.py exports on a processor")
def test_an_encoder_trained_here_is_exported_to_onnx(
    corpus: dict[str, Path], tmp_path: Path, device: torch.device
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from nestcli.checkpoint.onnx import onnx_difference, write_onnx

    steps = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    result = train(corpus, tmp_path, *steps, *keys_of(device))
    encoder = load_encoder(result.nemo)
    write_onnx(tmp_path / "a.onnx", encoder)
    difference = onnx_difference(tmp_path / "a.onnx", encoder)
    assert difference is None or difference < 1e-3
