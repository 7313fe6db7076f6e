"""The training loader alone: seconds of audio a second, with augmentation, into page-locked memory and to the GPU."""

from __future__ import annotations

import json
import time
from itertools import islice

from lightning.pytorch import Trainer
from measure import Facts, Task, wait_for

from nestcli.config import load_config
from nestcli.data.datamodule import NestDataModule
from nestcli.data.loader.loader import slots
from nestcli.jobs.cores import available_cores
from nestcli.training.settings import Length, trainer_options

PROCESSES = 16


def loaded(task: Task, workers: int, batch_seconds: float, seconds: float) -> Facts:
    """Load batches for some seconds, after those that the processes had made in advance."""
    found = json.loads((task.work / "data.json").read_text(encoding="utf-8"))
    batch_seconds = min(batch_seconds, found["train_seconds"] / 4)
    noise = f"model.train_ds.noise_manifest={found['noise']}/train_manifest.json"
    words = [
        f"model.train_ds.manifest_filepath={found['speech']}/train_manifest.json", noise,
        "model.validation_ds.manifest_filepath=null", "model.train_ds.use_lhotse=true",
        "model.train_ds.batch_size=null", f"model.train_ds.batch_duration={batch_seconds:g}",
        "model.train_ds.num_buckets=2", f"model.train_ds.num_workers={workers}", *task.accelerator,
    ]  # fmt: skip
    config = load_config("large", words)
    data = NestDataModule(config)
    options = trainer_options(config, Length(None, 1, 1, 1), validates=False)
    data.trainer = Trainer(**options, logger=False, enable_checkpointing=False)  # names the device to load for
    data.batches = 1 << 30
    began = time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches).to(task.device)
    first = time.perf_counter() - began
    for batch in islice(batches, slots(min(workers, available_cores()))):
        batch.to(task.device, non_blocking=True)
    audio, count, start, pinned = 0.0, 0, time.perf_counter(), False
    while time.perf_counter() - start < seconds or count < 2:
        batch = next(batches)
        pinned = batch.audio.is_pinned() if task.device.type == "cuda" else False
        audio += float(batch.audio_len.sum()) / data.sample_rate
        count += 1
        batch.to(task.device, non_blocking=True)
    wait_for(task.device)
    taken = time.perf_counter() - start
    batches.close()
    data.teardown("fit")
    return {
        "audio_per_second": audio / taken,
        "processes": min(workers, available_cores()),
        "batch_seconds": audio / count,
        "batches": count,
        "first_batch_seconds": first,
        "pinned": pinned,
    }


def main() -> None:
    task = Task.given()
    batch_seconds, seconds = (20.0, 0.5) if task.rehearse else (600.0, 6.0)
    for workers in (PROCESSES, 1) if task.rehearse else (PROCESSES, 8, 1):
        task.measure(f"loader {workers} processes", lambda w=workers: loaded(task, w, batch_seconds, seconds))


if __name__ == "__main__":
    main()
