"""Other models of NeMo's: their encoders here, and ours in them."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import assert_close
from nestcli import load_audio, load_encoder
from nestcli.checkpoint.encoder import read_encoder
from nestcli.checkpoint.nemo import write_nemo
from nestcli.config import load_config
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

pytestmark = [
    pytest.mark.nemo,
    pytest.mark.skipif("NEST_NEMO_PYTHON" not in os.environ, reason="NEST_NEMO_PYTHON names no NeMo"),
]

MODELS = """
import json, sys
import numpy as np, torch
from omegaconf import OmegaConf
from nemo.collections.asr.models import EncDecCTCModel, EncDecRNNTModel
asr = "nemo.collections.asr.modules"
labels = list(" abcdefghijklmnopqrstuvwxyz'")
encoder = {"_target_": asr + ".ConformerEncoder", "feat_in": 80, "feat_out": -1, "n_layers": 2, "d_model": 32,
    "n_heads": 4, "use_bias": False, "subsampling": "dw_striding", "subsampling_factor": 8,
    "subsampling_conv_channels": 16, "self_attention_model": "rel_pos", "att_context_size": [-1, -1],
    "xscaling": False, "conv_kernel_size": 9, "dropout": 0.1, "dropout_pre_encoder": 0.1, "dropout_emb": 0.0}
features = {"_target_": asr + ".AudioToMelSpectrogramPreprocessor", "sample_rate": 16000,
    "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01, "window": "hann", "features": 80,
    "n_fft": 512, "log": True, "frame_splicing": 1, "dither": 1e-5, "pad_to": 0}
model = {"sample_rate": 16000, "labels": labels, "preprocessor": features, "encoder": encoder,
    "spec_augment": {"_target_": asr + ".SpectrogramAugmentation", "freq_masks": 2, "time_masks": 2}}
ctc = {"_target_": asr + ".ConvASRDecoder", "feat_in": 32, "num_classes": len(labels), "vocabulary": labels}
"""
MAKE = (
    MODELS
    + """
kind, out, audio, lengths = sys.argv[1], sys.argv[2], np.load(sys.argv[3]), torch.tensor(json.loads(sys.argv[4]))
torch.manual_seed(3)
if kind == "ctc":
    made = EncDecCTCModel(OmegaConf.create({**model, "decoder": ctc}))
else:
    made = EncDecRNNTModel(OmegaConf.create({**model,
        "model_defaults": {"enc_hidden": 32, "pred_hidden": 16, "joint_hidden": 16},
        "decoder": {"_target_": asr + ".RNNTDecoder", "normalization_mode": None, "vocab_size": len(labels),
            "prednet": {"pred_hidden": 16, "pred_rnn_layers": 1}},
        "joint": {"_target_": asr + ".RNNTJoint", "log_softmax": None, "num_classes": len(labels),
            "vocabulary": labels, "jointnet": {"joint_hidden": 16, "activation": "relu", "encoder_hidden": 32,
            "pred_hidden": 16}},
        "decoding": {"strategy": "greedy", "greedy": {"max_symbols": 5}},
        "loss": {"loss_name": "pytorch"}}))
for value in made.encoder.parameters():
    value.data += 0.05 * torch.randn_like(value)
made.eval().save_to(out)
with torch.no_grad():
    spectrum, frames = made.preprocessor(input_signal=torch.from_numpy(audio), length=lengths)
    encoded, frames = made.encoder(audio_signal=spectrum, length=frames)
np.savez(out + ".npz", encoded=encoded.numpy(), frames=frames.numpy())
"""
)
TAKE = (
    MODELS
    + """
out, nest = sys.argv[1:3]
made = EncDecCTCModel(OmegaConf.create({**model, "decoder": ctc}))
before = {name: value.clone() for name, value in made.state_dict().items()}
made.maybe_init_from_pretrained_checkpoint(
    OmegaConf.create({"init_from_nemo_model": {"nest": {"path": nest, "include": ["encoder"]}}}))
after = made.state_dict()
torch.save({name: value for name, value in after.items() if name.startswith("encoder.")}, out)
assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("decoder."))
"""
)


def nemo(script: str, *words: str) -> None:
    done = subprocess.run(
        [os.environ["NEST_NEMO_PYTHON"], "-c", script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("kind", "left"), [("ctc", ["decoder"]), ("rnnt", ["decoder", "joint"])])
def test_the_encoder_of_a_recogniser(shared_audio: Path, tmp_path: Path, kind: str, left: list[str]) -> None:
    paths = sorted((shared_audio / "speech" / "librispeech").glob("**/*.flac"))[:3]
    samples = [load_audio(path) for path in paths]
    audio_BN = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
    lengths_B = torch.tensor([len(each) for each in samples])
    np.save(tmp_path / "audio.npy", audio_BN.numpy())
    path = tmp_path / "asr.nemo"
    nemo(MAKE, kind, str(path), str(tmp_path / "audio.npy"), json.dumps(lengths_B.tolist()))
    theirs = np.load(f"{path}.npz")
    assert sorted(read_encoder(path).left) == left
    with torch.no_grad():
        ours, frames_B = load_encoder(path)(audio_BN, lengths_B)
    assert frames_B.tolist() == theirs["frames"].tolist()
    for item, count in enumerate(frames_B):
        expected = torch.from_numpy(theirs["encoded"][item].T[:count])
        assert_close(ours[item, :count], expected, 1e-4, f"{kind} {item}")


def test_a_recogniser_starts_from_ours(tmp_path: Path) -> None:
    words = [
        "n_layers=2", "d_model=32", "n_heads=4", "use_bias=false", "xscaling=false", "subsampling_conv_channels=16",
    ]  # fmt: skip
    config = load_config("small", [*(f"model.encoder.{word}" for word in words), "model.num_classes=32"])
    torch.manual_seed(1)
    state = NestModel(NestConfig.from_config(config)).state_dict()
    write_nemo(tmp_path / "nest.nemo", config, state)
    nemo(TAKE, str(tmp_path / "taken.pt"), str(tmp_path / "nest.nemo"))
    taken = torch.load(tmp_path / "taken.pt", weights_only=True)
    assert len(taken) == sum(name.startswith("encoder.") for name in state)
    assert all(torch.equal(value, state[name]) for name, value in taken.items())
