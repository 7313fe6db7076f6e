"""A tiny model whose weights are random, in a file."""

from pathlib import Path

import torch

from nestcli.checkpoint.nemo import write_nemo
from nestcli.config import load_config
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8",
]  # fmt: skip


def tiny_checkpoint(folder: Path, n_layers: int = 2) -> str:
    torch.manual_seed(4)
    config = load_config("small", [*TINY, f"model.encoder.n_layers={n_layers}"])
    path = folder / "nest.nemo"
    write_nemo(path, config, NestModel(NestConfig.from_config(config)).state_dict())
    return str(path)
