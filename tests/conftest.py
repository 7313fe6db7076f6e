"""Shared fixtures: golden recordings of NeMo, the real audio beside the project, small models."""

import io
import json
import os
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

from nestcli.config import load_config

GOLDEN = Path(__file__).parent / "golden"
SHARED_AUDIO = Path(__file__).parents[2] / "shared" / "audio"


class Golden:
    """The tensors and metadata of one safetensors recording."""

    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            self.metadata = {
                key: json.loads(value) if value[:1] in "[{" else value for key, value in file.metadata().items()
            }
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def config(self):
        return OmegaConf.create({"model": self.metadata["config"]})


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    if not SHARED_AUDIO.is_dir():
        pytest.skip("../shared/audio is not there")
    return SHARED_AUDIO


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the GPU; the processor where NEST_GPU_TESTS=cpu rehearses the tests of tests/gpu."""
    if os.environ.get("NEST_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU; NEST_GPU_TESTS=cpu rehearses the tests on a processor")
    return torch.device("cuda", 0)


def skip_without_parakeets_extractor() -> None:
    """Transformers up to 5.20, the last for Python 3.10, want librosa for its mel filters."""
    import transformers

    if not find_spec("librosa") and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21):
        pytest.skip("the feature extractor of this transformers needs librosa")


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Equal to an absolute tolerance; a failure names the largest and the mean difference."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    difference = (ours.double() - theirs.double()).abs()
    assert difference.numel() == 0 or difference.max() <= tolerance, (
        f"{what}: largest difference {difference.max():.3g}, mean {difference.mean():.3g}, tolerance {tolerance:.3g}"
    )


def write_noise_wav(path: Path, seconds: float, seed: int, *, rate: int = 16000) -> None:
    """A file of coloured noise with a syllable-like envelope: enough to train on, not speech."""
    rng = np.random.default_rng(seed)
    count = int(seconds * rate)
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * np.arange(count) / rate)
    samples = 0.1 * envelope * np.cumsum(rng.standard_normal(count)) / 30
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.clip(samples - samples.mean(), -0.9, 0.9).astype(np.float32), rate, subtype="PCM_16")


def write_archive(path: Path, config: dict, state: dict[str, torch.Tensor]) -> Path:
    """A .nemo file of any model."""
    weights = io.BytesIO()
    torch.save(state, weights)
    text = OmegaConf.to_yaml(OmegaConf.create(config)).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in (("./model_config.yaml", text), ("./model_weights.ckpt", weights.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve short utterances in train.json, three in val.json, three noises in noise.json."""
    folder = tmp_path_factory.mktemp("corpus")
    manifests = {}
    for name, count, first in (("train", 12, 0), ("val", 3, 100), ("noise", 3, 200)):
        rows = []
        for number in range(count):
            seconds = 1.2 + 0.1 * (number % 5)
            path = folder / name / f"{number}.wav"
            write_noise_wav(path, seconds, first + number)
            rows.append({"audio_filepath": str(path), "duration": seconds})
        manifests[name] = folder / f"{name}.json"
        manifests[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifests


TINY_RUN = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8", "model.masking.block_size=16", "model.masking.mask_prob=0.05",
    "model.train_ds.batch_size=4", "model.validation_ds.batch_size=2", "model.train_ds.num_workers=0",
    "model.validation_ds.num_workers=0", "model.optim.sched.warmup_steps=5", "model.optim.lr=0.1",
    "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
]  # fmt: skip


def tiny_config(corpus: dict[str, Path], *overrides: str):
    """A run of a tiny model on the corpus."""
    return load_config(
        "small",
        [
            *TINY_RUN,
            f"model.train_ds.manifest_filepath={corpus['train']}",
            f"model.validation_ds.manifest_filepath={corpus['val']}",
            f"model.train_ds.noise_manifest={corpus['noise']}",
            *overrides,
        ],
    )
