"""The pictures: valid PNG files that show their input, and a clear error without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from nestcli.demo.pictures import draw_batch, draw_loss_curve
from nestcli.errors import MissingDependencyError

matplotlib_image = pytest.importorskip("matplotlib.image")

STEPS = np.arange(0, 200, 5)
LOSS = 5 + 4 * np.exp(-STEPS / 50)
ACCURACY = 0.1 * (1 - np.exp(-STEPS / 80))
CLEAN_FT, MIXED_FT = np.random.default_rng(0).standard_normal((2, 80, 300)).astype(np.float32)


def pixels(path: Path) -> npt.NDArray[np.float32]:
    """The picture as (height, width, RGB), each 0 to 1."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image: npt.NDArray[np.float32] = matplotlib_image.imread(path)
    return image[:, :, :3]


def share_of(image: npt.NDArray[np.float32], colour: str) -> float:
    """The share of pixels that have exactly this colour, given as "#rrggbb"."""
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return float((np.abs(image - rgb) < 0.01).all(axis=2).mean())


def test_loss_curve_shows_training_validation_and_chance(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loss.png"
    draw_loss_curve(
        path, STEPS, LOSS, ACCURACY, STEPS[::10], LOSS[::10] + 0.1, even_loss=np.log(8192), frequency_loss=7.0
    )
    image = pixels(path)
    assert image.shape == (864, 1152, 3)
    for colour in ("#2f6db5", "#d9702b", "#8a9099"):
        assert share_of(image, colour) > 0.0005
    assert share_of(image, "#ffffff") < 0.99


def test_loss_curve_needs_no_validation(tmp_path: Path) -> None:
    draw_loss_curve(tmp_path / "loss.png", STEPS, LOSS, ACCURACY, [], [], even_loss=9.0, frequency_loss=7.0)
    assert share_of(pixels(tmp_path / "loss.png"), "#2f6db5") > 0.0005


@pytest.mark.parametrize("n_masked", [0, 120])
def test_batch_leaves_masked_frames_blank(tmp_path: Path, n_masked: int) -> None:
    masked_FT = MIXED_FT.copy()
    masked_FT[:, :n_masked] = 0.05
    draw_batch(tmp_path / "batch.png", CLEAN_FT, MIXED_FT, masked_FT, hop_seconds=0.01, title="one item")
    image = pixels(tmp_path / "batch.png")
    panels = 0.65 / 3  # of the picture, roughly, is the lowest of the three
    assert share_of(image, "#e3e6ea") == pytest.approx(panels * n_masked / 300, abs=0.03)
    assert len(np.unique(image[::8, ::8].reshape(-1, 3), axis=0)) > 100


def test_missing_matplotlib_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install --force-reinstall matplotlib"):
        draw_loss_curve(tmp_path / "loss.png", STEPS, LOSS, ACCURACY, [], [], even_loss=9.0, frequency_loss=7.0)
