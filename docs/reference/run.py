"""Run the reference recipe: prepare speech and noise, pretrain, and probe; each step continues where it was stopped.

python docs/reference/run.py SPEECH NOISE OUT [--without PATTERN] [--probe DIR] [--control] [key=value ...]

SPEECH and NOISE are folders of audio. A `manifest.tsv` in SPEECH (columns path, duration_s, speaker, language, text)
names the speakers; without one, the folder of a file is its speaker. `--without` leaves out the rows of the table whose
licence matches a regular expression. `--probe` names a folder with labelled speech and
such a table (columns task, label, phones); `--control` also trains NeMo's settings on as much audio. Keys change the
recipe.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

NEST = [str(Path(sys.executable).with_name("nest"))]
# NeMo's targets, masks, noise and schedule, in an encoder of the same size and on the same batches.
CONTROL = (
    "name=NEST-control", "model.num_classes=8192", "model.num_books=1", "model.quantizer.init=random",
    "model.masking.block_size=40", "model.masking.mask_prob=0.01", "model.encoder.subsampling_factor=8",
    "model.train_ds.batch_augmentor.prob=0.5", "model.validation_ds.batch_augmentor.prob=0.5", "model.optim.lr=5.0",
    "model.optim.sched.warmup_steps=25000", "trainer.gradient_clip_val=0.0",
)  # fmt: skip
NOISE_DB = 5
# name of the result, words that select files of the probe's table, options of nest probe
PROBES = (
    ("words", "words", ("--task", "classify", "--label", "word")),
    ("phones", "sentences", ("--task", "ctc", "--label", "phones")),
    ("speakers", "sentences", ("--task", "verify")),
    ("abx", "words", ("--task", "abx", "--label", "word")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path)
    parser.add_argument("noise", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--without", type=re.compile, metavar="PATTERN")
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--control", action="store_true")
    parser.add_argument("keys", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    given.out.mkdir(parents=True, exist_ok=True)
    speech, noise = prepared(given.speech, given.noise, given.out, given.without)
    runs = {"reference": given.keys, **({"control": [*CONTROL, *given.keys]} if given.control else {})}
    for name, keys in runs.items():
        pretrained(name, speech, noise, given.out, keys)
        if given.probe:
            probed(name, given.probe, noise, given.out)


def prepared(speech: Path, noise: Path, out: Path, without: re.Pattern[str] | None) -> tuple[Path, Path]:
    """Write the manifests of speech and noise; return their folders. No speaker is in training and validation."""
    table = speech / "manifest.tsv"
    source, pattern = str(speech), ["--speaker-pattern", r"([^/]+)/[^/]+$"]
    if table.is_file():
        kept = (row for row in read_table(table) if not (without and without.search(row.get("licence") or "")))
        rows = (line(speech, row) for row in kept)
        source, pattern = str(written(out / "speech.json", rows)), []
    nest("prepare-data", source, "--out", out / "speech", "--split-by", "speaker", "--val-fraction", "0.04",
         "--segment", "10", "--convert", *pattern)  # fmt: skip
    nest("prepare-data", noise, "--kind", "noise", "--out", out / "noise", "--convert")
    return out / "speech", out / "noise"


def pretrained(name: str, speech: Path, noise: Path, out: Path, keys: Iterable[str]) -> None:
    """Train, or continue a run that was stopped."""
    config = Path(__file__).parents[2] / "configs" / "reference.yaml"
    nest(
        "pretrain", config, f"model.train_ds.manifest_filepath={speech / 'train_manifest.json'}",
        f"model.validation_ds.manifest_filepath={speech / 'val_manifest.json'}",
        *(f"model.{part}_ds.noise_manifest={noise / 'train_manifest.json'}" for part in ("train", "validation")),
        f"exp_manager.exp_dir={out / name}", "model.encoder.compile=true", *keys,
    )  # fmt: skip


def probed(name: str, labelled: Path, noise: Path, out: Path, *, in_noise: bool = True) -> None:
    """Ask the encoder's features all questions, in quiet and in noise; a result that exists is kept."""
    places: dict[str, tuple[object, ...]] = {"quiet": ()}
    if in_noise:
        places["noise"] = ("--noise", noise / "train_manifest.json", "--snr", NOISE_DB)
    (checkpoint,) = (out / name).glob("*/checkpoints/*.nemo")
    rows = [(row, line(labelled, row)) for row in read_table(labelled / "manifest.tsv")]
    for kind in ("words", "sentences"):
        chosen = (each for row, each in rows if (row["task"] == "sentence") == (kind == "sentences"))
        written(out / f"{kind}.json", chosen)
    for question, kind, options in PROBES:
        for where, added in places.items():
            folder = out / "probes" / name / f"{question}-{where}"
            if not (folder / "probe.json").is_file():
                nest("probe", out / f"{kind}.json", "--checkpoint", checkpoint, *options, *added, "--out", folder)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def line(folder: Path, row: dict[str, str]) -> dict[str, object]:
    """Return a line of a manifest for a row of the table; empty columns are left out."""
    fields = {"speaker": "speaker", "lang": "language", "text": "text", "phones": "phones", "word": "label"}
    known = {name: row[column] for name, column in fields.items() if row.get(column)}
    return {"audio_filepath": str((folder / row["path"]).resolve()), "duration": float(row["duration_s"]), **known}


def written(path: Path, rows: Iterable[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def nest(*words: object) -> None:
    """Run a command of nest, and end with its exit code if it fails."""
    command = [*NEST, *map(str, words)]
    print("+", *command, flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
