"""Shards in NeMo's layout, read by NeMo's own loaders: the samples are those that we read."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.data.tarred import read_tarred
from nestcli.data.utterance_audio import read_audio
from nestcli.prepare.pipeline import PrepareOptions, prepare

pytestmark = [
    pytest.mark.nemo,
    pytest.mark.skipif("NEST_NEMO_PYTHON" not in os.environ, reason="NEST_NEMO_PYTHON names no NeMo"),
]

SCRIPT = """
import json, sys
import numpy as np
from omegaconf import OmegaConf
keys, out, lhotse = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "lhotse"
config = OmegaConf.create({**keys, "sample_rate": 16000, "batch_size": 1, "shuffle": False, "shuffle_n": 0,
    "max_duration": None, "min_duration": None, "num_workers": 0, "labels": None, "noise_manifest": None})
found = []
if lhotse:
    from nemo.collections.asr.data.ssl_dataset import LhotseAudioNoiseDataset
    from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config
    config.use_lhotse, config.force_finite, config.use_bucketing = True, True, False
    config.pop("is_tarred"), config.pop("labels"), config.pop("shuffle_n"), config.pop("noise_manifest")
    config.min_duration, config.max_duration = 0, 1000
    loader = get_lhotse_dataloader_from_config(config, 0, 1, dataset=LhotseAudioNoiseDataset())
    found = [batch.audio[0, : int(batch.audio_len[0])].numpy() for batch in loader]
else:
    import torch  # NeMo shards manifests for process groups alone
    torch.distributed.init_process_group("gloo", init_method="file://" + out + ".group", rank=0, world_size=1)
    torch.Tensor.cuda = lambda tensor: tensor  # and counts them on a GPU
    from nemo.collections.asr.data.ssl_dataset import get_audio_noise_dataset_from_config
    dataset = get_audio_noise_dataset_from_config(config, global_rank=0, world_size=1)
    found = [item.audio.numpy() for item in dataset]
np.savez(out, *found)
"""


@pytest.mark.parametrize("kind", ["nemo", "lhotse"])
@pytest.mark.parametrize("sharded", [False, True])
def test_nemo_reads_our_shards(tmp_path: Path, kind: str, sharded: bool) -> None:
    for number in range(9):
        rng = np.random.default_rng(number)
        path = tmp_path / "in" / f"{number % 2}" / f"a.b-sub{number} é.wav"  # a name that NeMo would misread
        path.parent.mkdir(parents=True, exist_ok=True)
        channels, rate = (2, 44100) if number == 4 else (1, 16000)
        sf.write(path, 0.1 * rng.standard_normal((int((1.1 + 0.1 * number) * rate), channels)), rate)
    summary = prepare([tmp_path / "in"], tmp_path / "out", PrepareOptions(val_fraction=0, shards=3))
    keys = dict(summary.shards["train"])
    if sharded:
        folder = Path(keys["manifest_filepath"]).parent
        keys["manifest_filepath"] = str(folder / "sharded_manifests" / "manifest__OP_0..2_CL_.json")
    words = [json.dumps(keys), str(tmp_path / "found.npz"), kind]
    done = subprocess.run(
        [os.environ["NEST_NEMO_PYTHON"], "-c", SCRIPT, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = [array for _, array in sorted(np.load(tmp_path / "found.npz").items(), key=lambda each: int(each[0][4:]))]
    manifest = read_tarred(keys["manifest_filepath"], keys["tarred_audio_filepaths"])
    ours = [read_audio(manifest.entry(line), sample_rate=16000) for line in range(len(manifest))]
    assert len(ours) == len(theirs) == 9
    for sound in ours:
        assert any(len(sound) == len(other) and np.array_equal(sound, other) for other in theirs)
