"""Model FLOPs utilisation: the work of batches over the device's peak."""

from __future__ import annotations

import pytest

from nestcli.config import load_config
from nestcli.model.config import NestConfig
from nestcli.model.cost import Utilisation, peak_of, work_per_second


def test_full_batches_have_the_work_that_count_params_tells() -> None:
    config = load_config("small", ["model.train_ds.batch_size=4"])
    found = Utilisation(NestConfig.from_config(config), 1e12)
    found.add(4, 160_000)
    found.add(4, 160_000)
    expected = 80 * sum(work.step for work in work_per_second(config, 10.0).values())
    assert found.take(2.0) == pytest.approx(expected / 2e12)
    assert found.take(2.0) == 0.0


def test_without_a_peak_nothing_is_told() -> None:
    unknown = Utilisation(NestConfig.from_config(load_config("small")), None)
    unknown.add(4, 160_000)
    assert unknown.take(1.0) is None


@pytest.mark.parametrize(
    ("device", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989e12),
        ("NVIDIA H100 80GB HBM3", "16-mixed", True, 989e12),
        ("NVIDIA H200", "32", False, 67e12),
        ("NVIDIA A100-SXM4-40GB", "32-true", True, 156e12),
        ("cpu", "32", False, None),
    ],
)
def test_peaks_of_data_sheets(device: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert peak_of(device, precision, tf32=tf32) == peak
