"""Speech, noise and labelled speech for the parts that need data; options: `speech=DIR`, `noise=DIR`, `probe=DIR`.

Without folders, it makes synthetic speech and noise: the voices of `nest demo` where espeak-ng is installed, otherwise
sounds with the level and rhythm of speech. A rehearsal makes the latter, and labels for a probe.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from measure import ROOT, Facts, Task
from recipe import recipe

from nestcli.bench.corpus import make_bench_corpus
from nestcli.demo.corpus import make_corpus
from nestcli.errors import MissingDependencyError

_SPEAKERS, _WORDS = 8, ("one", "two")
_MINUTES = 12.0  # of the demo's speech


def prepared(task: Task) -> Facts:
    """Make or find audio, prepare it, and write `data.json` with the folders; return the seconds of speech."""
    given = dict(option.split("=", 1) for option in task.options)
    if "speech" in given:
        speech, noise, source = Path(given["speech"]), Path(given["noise"]), given["speech"]
    else:
        speech, noise, source = made(task)
    folders = recipe(ROOT).prepared(speech, noise, task.work, None)
    probe = given.get("probe")
    if task.rehearse and "speech" not in given:
        probe = probe or str(labelled(task.work / "probe", speech))
    seconds = {name: total(folders[0] / f"{name}_manifest.json") for name in ("train", "val")}
    found = {"speech": str(folders[0]), "noise": str(folders[1]), "probe": probe, "train_seconds": seconds["train"]}
    (task.work / "data.json").write_text(json.dumps(found), encoding="utf-8")
    return {"source": source, "train_seconds": seconds["train"], "validation_seconds": seconds["val"], "probe": probe}


def made(task: Task) -> tuple[Path, Path, str]:
    """Write synthetic speech and noise; return their folders and a description."""
    folder = task.work / "made"
    if not task.rehearse:
        try:
            corpus = make_corpus(folder, minutes=_MINUTES, seed=7)
        except MissingDependencyError:
            pass
        else:
            return corpus.speech, corpus.noise, "the voices of nest demo"
    count, seconds = (48, (2.0, 3.0)) if task.rehearse else (120, (5.0, 15.0))
    make_bench_corpus(folder, speech=count, noise=4, seconds=seconds)
    speakers = task.work / "made-speech"
    for number, path in enumerate(sorted((folder / "speech").iterdir())):
        speaker = speakers / f"speaker{number % _SPEAKERS}"
        speaker.mkdir(parents=True, exist_ok=True)
        path.rename(speaker / path.name)
    return speakers, folder / "noise", "noise with the rhythm of speech"


def labelled(folder: Path, speech: Path) -> Path:
    """Give files of the synthetic speech labels that mean nothing, as a table for a probe."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("path", "duration_s", "task", "speaker", "label", "text", "phones")
    with (folder / "manifest.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, delimiter="\t", restval="")
        table.writeheader()
        for number, path in enumerate(sorted(speech.glob("*/*.flac"))[:24]):
            label = _WORDS[number % len(_WORDS)]
            row = {"path": str(path), "duration_s": "2.0", "task": "word", "speaker": path.parent.name, "label": label}
            table.writerow(row)
    return folder


def total(manifest: Path) -> float:
    lines = manifest.read_text(encoding="utf-8").splitlines()
    return sum(float(json.loads(line)["duration"]) for line in lines)


if __name__ == "__main__":
    task = Task.given()
    task.measure("data", lambda: prepared(task))
