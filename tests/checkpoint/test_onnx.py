"""ONNX graphs, run by onnxruntime."""

from pathlib import Path

import pytest
import torch

from conftest import assert_close
from nestcli import SpeechEncoder, load_audio
from nestcli.checkpoint.encoder import fresh_encoder
from nestcli.checkpoint.onnx import onnx_difference, write_onnx
from nestcli.config import load_config
from nestcli.errors import CheckpointError, MissingDependencyError
from nestcli.model import fast

onnxruntime = pytest.importorskip("onnxruntime")

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1",
    "model.encoder.subsampling_conv_channels=8",
]  # fmt: skip


def encoder_of(*words: str) -> SpeechEncoder:
    torch.manual_seed(2)
    encoder = fresh_encoder(load_config("small", [*TINY, *words])).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
    for layer in encoder.encoder.layers:
        torch.nn.init.normal_(layer.self_attn.pos_bias_v)
    return encoder


@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(
            ("model.encoder.att_context_size=[4,2]", "model.encoder.conv_norm_type=layer_norm"), marks=pytest.mark.slow
        ),
        pytest.param(("model.preprocessor.normalize=all_features",), marks=pytest.mark.slow),
        pytest.param(
            ("model.encoder.conv_context_size=causal", "model.encoder.feat_out=8", "model.decoder.feat_in=8"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_graph_from_audio_of_any_shape(tmp_path: Path, words: tuple[str, ...]) -> None:
    encoder = encoder_of(*words)
    write_onnx(tmp_path / "a.onnx", encoder)
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    for lengths in ([160], [1280, 400], [16_000], [480_000, 3_000, 100_001], [20_480] * 5):
        audio_BN = 0.1 * torch.randn(len(lengths), max(lengths))
        lengths_B = torch.tensor(lengths)
        theirs_BSM, frames_B = session.run(None, {"audio": audio_BN.numpy(), "lengths": lengths_B.numpy()})
        with torch.no_grad():
            ours = encoder(audio_BN, lengths_B)
        assert frames_B.tolist() == ours.lengths.tolist()
        for item, count in enumerate(frames_B):
            assert_close(torch.from_numpy(theirs_BSM[item, :count]), ours.features[item, :count], 1e-4, str(lengths))
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["nest.sample_rate"] == "16000"
    assert float(facts["nest.frame_seconds"]) == pytest.approx(0.08)
    assert onnx_difference(tmp_path / "a.onnx", encoder) < 1e-4


@pytest.mark.slow
def test_a_graph_from_features_on_real_speech(shared_audio: Path, tmp_path: Path) -> None:
    encoder = encoder_of()
    write_onnx(tmp_path / "a.onnx", encoder, "encoder")
    session = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    paths = sorted((shared_audio / "speech" / "speechocean").glob("**/*.flac"))[:2]
    for samples in map(load_audio, paths):
        features_BDT, frames_B = encoder.preprocessor(samples[None], torch.tensor([len(samples)]))
        theirs_BSM, count_B = session.run(None, {"features": features_BDT.numpy(), "lengths": frames_B.numpy()})
        with torch.no_grad():
            ours = encoder(samples)
        assert_close(torch.from_numpy(theirs_BSM[0, : count_B[0]]), ours.features[0], 1e-4)


@pytest.mark.slow
def test_a_difference_is_seen(tmp_path: Path) -> None:
    encoder = encoder_of()
    write_onnx(tmp_path / "a.onnx", encoder)
    torch.nn.init.normal_(encoder.encoder.layers[0].norm_out.bias)
    difference = onnx_difference(tmp_path / "a.onnx", encoder)
    assert difference is not None
    assert difference > 0.1


def test_the_shift_of_graphs_is_the_plain_one() -> None:
    for frames in (1, 2, 7):
        scores = torch.randn(2, 3, frames, 2 * frames - 1)
        plain = scores if frames == 1 else fast.relative_shift_by_strides(scores)
        assert torch.equal(fast.relative_shift_by_padding(scores), plain)


def test_too_many_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestcli.checkpoint.onnx._LARGEST", 1000)
    with pytest.raises(CheckpointError, match="do not fit into one ONNX file"):
        write_onnx(tmp_path / "a.onnx", encoder_of())
    assert list(tmp_path.iterdir()) == []


def test_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match="needs onnx and onnxscript"):
        write_onnx(tmp_path / "a.onnx", encoder_of())
    assert list(tmp_path.iterdir()) == []
