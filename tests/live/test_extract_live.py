"""`nest extract` beside NeMo's own feature extractor, on real speech."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nestcli.checkpoint.nemo import write_nemo
from nestcli.config import load_config
from nestcli.evaluation.extract import ExtractOptions, extract
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

pytestmark = [
    pytest.mark.nemo,
    pytest.mark.skipif("NEST_NEMO_PYTHON" not in os.environ, reason="NEST_NEMO_PYTHON names no NeMo"),
]

SCRIPT = """
import json, sys
import numpy as np, soundfile, torch
from nemo.collections.asr.models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.modules import ConformerMultiLayerFeatureExtractor
model = EncDecDenoiseMaskedTokenPredModel.restore_from(sys.argv[1], map_location="cpu").eval()
extractor = ConformerMultiLayerFeatureExtractor(model.encoder, aggregator=None).eval()
found = {}
with torch.inference_mode():
    for number, path in enumerate(json.loads(sys.argv[2])):
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None]
        spectrum, frames = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
        layers, lengths = extractor(audio_signal=spectrum, length=frames)
        found[str(number)] = torch.stack([each[0, :, : lengths[0]] for each in layers]).numpy()
np.savez(sys.argv[3], **found)
"""


def test_features_are_nemos(shared_audio: Path, tmp_path: Path) -> None:
    words = ["model.encoder.n_layers=3", "model.num_classes=64"]
    config = load_config("small", words)
    torch.manual_seed(2)
    write_nemo(tmp_path / "nest.nemo", config, NestModel(NestConfig.from_config(config)).state_dict())
    paths = [str(path) for path in sorted((shared_audio / "speech" / "speechocean").glob("**/*.flac"))[:6]]
    (tmp_path / "m.json").write_text("".join(json.dumps({"audio_filepath": path}) + "\n" for path in paths))
    done = extract(str(tmp_path / "m.json"), str(tmp_path / "nest.nemo"), tmp_path / "out", ExtractOptions())
    command = [os.environ["NEST_NEMO_PYTHON"], "-c", SCRIPT, str(tmp_path / "nest.nemo"), json.dumps(paths)]
    ended = subprocess.run([*command, str(tmp_path / "theirs.npz")], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    theirs = np.load(tmp_path / "theirs.npz")
    rows = [json.loads(line) for line in done.manifest.read_text().splitlines()]
    largest = 0.0
    for number, row in enumerate(rows):
        ours, expected = np.load(row["feature_path"]), theirs[str(number)]
        assert ours.shape == (3, 176, expected.shape[2])
        assert np.array_equal(expected[-1], expected[-2])  # NeMo gives the last layer twice
        largest = max(largest, float(np.abs(ours - expected[:-1]).max()))
    print(f"largest difference {largest:.2g}")
    assert largest < 1e-4
