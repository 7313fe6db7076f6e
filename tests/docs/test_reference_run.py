"""docs/reference/run.py from folders of audio to stored results, with a tiny model and two steps."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import write_noise_wav
from docs.pages import ROOT

KEYS = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=4",
    "model.encoder.subsampling_conv_channels=8", "model.encoder.compile=false", "trainer.max_steps=2",
    "trainer.val_check_interval=2", "trainer.accelerator=cpu",
]  # fmt: skip
KEPT = ("words-noise", "phones-quiet", "speakers-quiet", "speakers-noise", "abx-quiet", "abx-noise")  # asked before
WORDS, PHONES = ("one", "two"), ("W AH N", "T UW")


def table(folder: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    with (folder / "manifest.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def audio(folder: Path, name: str, seconds: float, seed: int) -> dict[str, str]:
    write_noise_wav(folder / name, seconds, seed=seed)
    return {"path": name, "duration_s": str(seconds)}


@pytest.mark.slow
def test_the_recipe_runs_from_folders_to_results_and_keeps_what_is_done(tmp_path: Path) -> None:
    speech, noise, labelled, out = (tmp_path / name for name in ("speech", "noise", "probe", "out"))
    for folder in (speech, noise, labelled):
        folder.mkdir()
    audio(noise, "noise.wav", 5.0, 0)
    rows = [
        {**audio(speech, f"{n}.wav", 2.0, n), "speaker": f"s{n // 2}", "licence": "CC0" if n < 16 else "GPL"}
        for n in range(18)
    ]
    table(speech, ["path", "duration_s", "speaker", "licence"], rows)
    asked = [
        {
            **audio(labelled, f"{task}{n}.wav", 0.5, 100 + n), "task": task, "speaker": f"p{n // 4}",
            "label": WORDS[n % 2] if task == "word" else "", "text": WORDS[n % 2], "phones": PHONES[n % 2],
        }
        for task in ("word", "sentence")
        for n in range(24)
    ]  # fmt: skip
    table(labelled, ["path", "duration_s", "task", "speaker", "label", "text", "phones"], asked)
    command = [
        sys.executable, str(ROOT / "docs" / "reference" / "run.py"), str(speech), str(noise), str(out),
        "--without", "GPL", "--probe", str(labelled), *KEYS,
    ]  # fmt: skip
    kept = [out / "probes" / "reference" / name / "probe.json" for name in KEPT]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((out / "speech.json").read_text().splitlines()) == 16
    probes = sorted((out / "probes" / "reference").glob("*/probe.json"))
    assert {path.parent.name for path in probes} == {
        f"{question}-{place}" for question in ("words", "phones", "speakers", "abx") for place in ("quiet", "noise")
    }
    assert all(path.read_text() == "{}" for path in kept)
    snr = {path.parent.name: json.loads(path.read_text())["noise"] for path in probes if path not in kept}
    assert snr.pop("words-quiet") is None
    assert {name: noise["snr"] for name, noise in snr.items()} == {"phones-noise": 5}
    before = [path.stat().st_mtime_ns for path in probes]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [path.stat().st_mtime_ns for path in probes] == before
