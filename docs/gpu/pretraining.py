"""`nest pretrain` of the reference recipe in bf16-mixed with large batches, then `nest probe` of its encoder."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

from measure import ROOT, Facts, Task
from recipe import recipe

from nestcli.config import load_config
from nestcli.errors import MissingDependencyError
from nestcli.training.settings import check_compiler

_LONGEST, _LEAST = 240.0, 20.0  # seconds of training
_AROUND, _PROBING = 35.0, 30.0  # seconds for the start and the end of the run, and for the probe
_LARGEST_BATCH = 480.0  # seconds of audio
NAME = "gpu"
THIN = (
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=16",
    "model.encoder.subsampling_conv_channels=8", "trainer.max_steps=4", "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1", "nest.peak_flops=1e11",
    "model.encoder.compile=false",  # compiling takes long, and steps.py does it
)  # fmt: skip


def pretrained(task: Task, found: Facts, seconds: float) -> Facts:
    """Train for about so many seconds; return loss, guess, speed, utilisation and the wait for data."""
    batch = min(_LARGEST_BATCH, found["train_seconds"] / 6)
    keys = [
        "trainer.precision=bf16-mixed", f"model.train_ds.batch_duration={batch:g}", "model.train_ds.num_buckets=2",
        "model.train_ds.num_workers=14", "model.validation_ds.num_workers=2", "trainer.max_steps=1000000",
        "trainer.val_check_interval=500", f"trainer.max_time={clock(seconds)}", *task.accelerator,
        *(() if can_compile(task) else ("model.encoder.compile=false",)), *(THIN if task.rehearse else ()),
    ]  # fmt: skip
    began = time.perf_counter()
    run = recipe(ROOT, seconds + _AROUND - 10)
    run.pretrained(NAME, Path(found["speech"]), Path(found["noise"]), task.work, keys)
    paths = list((task.work / NAME).glob("*/metrics.jsonl"))
    if not paths:
        raise RuntimeError(f"the run logged no step in {time.perf_counter() - began:.0f} s")
    rows = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
    taken = time.perf_counter() - began
    known = {"compiled": can_compile(task) and not task.rehearse, "batch_seconds": batch, "wall_seconds": taken}
    return {**summary(rows), **known, "curve": curve(rows)}


def can_compile(task: Task) -> bool:
    """Return False, and print the reason, if this machine lacks a compiler or Python's headers."""
    try:
        check_compiler(load_config("large", ["model.encoder.compile=true", *task.accelerator]))
    except MissingDependencyError as error:
        print(error, flush=True)
        return False
    return True


def clock(seconds: float) -> str:
    """Return a time as Lightning writes it: days:hours:minutes:seconds."""
    whole = max(1, round(seconds))
    return f"00:{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def summary(rows: list[Facts]) -> Facts:
    """Return the last loss and the medians of the second half of the lines. Raises ValueError without a finite loss."""
    last, later = rows[-1], rows[len(rows) // 2 :]
    losses = [row["train_loss"] for row in later]
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"the loss is not finite: {losses[-1]}")

    def median(key: str) -> float | None:
        values = [row[key] for row in later if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
        return statistics.median(values) if values else None

    guess = median("unigram_loss")
    validated = [row["val_loss"] for row in rows if "val_loss" in row]
    return {
        "steps": last["step"],
        "train_loss": statistics.median(losses),
        "guessing_loss": guess,
        "below_guessing": guess is not None and statistics.median(losses) < guess,
        "val_loss": validated[-1] if validated else None,
        "audio_hours": last["audio_hours"],
        "audio_per_second": median("audio_per_second"),
        "mfu": median("mfu"),
        "data_wait_share": median("data_wait_share"),
        "bad_steps": last["bad_steps"],
    }


def curve(rows: list[Facts], points: int = 200) -> list[list[float | None]]:
    """Return steps with loss and guess, thinned."""
    kept = rows[:: max(1, len(rows) // points)]
    return [[row["step"], row["train_loss"], row.get("unigram_loss")] for row in kept]


def learned(facts: Facts) -> Facts:
    """Check that the loss is below that of guessing by code frequency. Raises ValueError if it is not."""
    if not facts["below_guessing"]:
        raise ValueError(f"the loss {facts['train_loss']:.3f} is not below guessing, {facts['guessing_loss']}")
    return {key: facts[key] for key in ("train_loss", "guessing_loss")}


def probed(task: Task, found: Facts, seconds: float) -> Facts:
    """Ask which word is said, in quiet; return the accuracy of each system."""
    run = recipe(ROOT, seconds)
    name, kind, options = run.PROBES[0]
    run.PROBES = ((name, kind, (*options, *(("--seeds", "1") if task.rehearse else ()))),)
    run.probed(NAME, Path(found["probe"]), Path(found["noise"]), task.work, in_noise=False)
    result = json.loads((task.work / "probes" / NAME / f"{name}-quiet" / "probe.json").read_text(encoding="utf-8"))
    return {"chance": result["chance"], **{each["name"]: each["mean"] for each in result["systems"]}}


def main() -> None:
    task = Task.given()
    end = time.perf_counter() + task.seconds
    found = json.loads((task.work / "data.json").read_text(encoding="utf-8"))
    around = _AROUND + (_PROBING if found["probe"] else 0.0)
    seconds = max(_LEAST, min(_LONGEST, task.seconds - around))
    facts = task.measure("pretrain reference", lambda: pretrained(task, found, seconds))
    if facts is not None and not task.rehearse:
        task.measure("loss below guessing", lambda: learned(facts))
    if facts is not None and found["probe"]:
        task.measure("probe words", lambda: probed(task, found, max(10.0, end - time.perf_counter())))


if __name__ == "__main__":
    main()
