"""The section `scale`: long manifests, new processes, and a resumed run."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_config
from nestcli.bench.context import BenchContext, Options
from nestcli.bench.scale import scale_section, write_long_manifest
from nestcli.data.manifest_scan import read_manifests


def test_a_long_manifest_is_sound(tmp_path: Path) -> None:
    audio = [tmp_path / "a.flac", tmp_path / "b.flac"]
    write_long_manifest(tmp_path / "long.json", audio, 25_001)
    manifest = read_manifests(str(tmp_path / "long.json"))
    assert len(manifest) == 25_001
    assert manifest.durations.min() >= 1
    assert (manifest.durations + manifest.offsets).max() <= 20
    assert {manifest.entry(line).audio_filepath for line in range(50)} == {str(path) for path in audio}
    assert manifest.entry(25_000).speaker == "speaker-00000"


@pytest.mark.slow
def test_the_section(corpus: dict[str, Path], tmp_path: Path) -> None:
    told: list[str] = []
    context = BenchContext(tiny_config(corpus), Options(rounds=1, lines=(2_000,)), tmp_path, told.append)
    section: Any = scale_section(context).to_json()
    assert [row["lines"] for row in section["rows"]] == [2_000]
    for row in [*section["rows"], section["resume"]]:
        assert row["seconds"] == pytest.approx(row["imports"] + row["manifest"] + row["first_batch"])
        assert row["memory"]["worker"]["resident"] > 50e6
    assert section["ours"]["median"] == section["rows"][-1]["seconds"]
    assert section["resume"]["consumed_batches"] == 3 * 500 + 450  # 2,000 lines in batches of 4
    assert section["nemo"] is None
    assert "2,000 lines" in section["unit"]
    json.dumps(section)
