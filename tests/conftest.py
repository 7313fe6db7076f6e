"""What the tests share: golden recordings of NeMo, the real audio beside the project, small models."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open

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


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Equal to an absolute tolerance; a failure names the largest and the mean difference."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    difference = (ours.double() - theirs.double()).abs()
    assert difference.numel() == 0 or difference.max() <= tolerance, (
        f"{what}: largest difference {difference.max():.3g}, mean {difference.mean():.3g}, tolerance {tolerance:.3g}"
    )
