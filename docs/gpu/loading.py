"""The training loader alone: seconds of audio a second, with augmentation, on the GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from itertools import islice

import torch
from measure import Facts, Task, wait_for

from nestcli.config import load_config
from nestcli.data.datamodule import NestDataModule
from nestcli.data.dataset import NoiseBatch
from nestcli.data.loader.loader import slots
from nestcli.errors import NestError
from nestcli.jobs.cores import available_cores

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
    data = NestDataModule(load_config("large", words))
    data.batches, data.device = 1 << 30, task.device
    began = time.perf_counter()
    batches = arrived(data, task.device)
    next(batches)
    wait_for(task.device)
    first = time.perf_counter() - began
    for _ in islice(batches, slots(min(workers, available_cores()))):
        pass
    samples, count = torch.zeros((), dtype=torch.int64, device=task.device), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or count < 2:
        samples += next(batches).audio_len.sum()  # read at the end: reading would wait for the GPU
        count += 1
    wait_for(task.device)
    taken, audio = time.perf_counter() - start, int(samples) / data.sample_rate
    batches.close()
    data.teardown("fit")
    return {
        "audio_per_second": audio / taken,
        "processes": min(workers, available_cores()),
        "batch_seconds": audio / count,
        "batches": count,
        "first_batch_seconds": first,
    }


def arrived(data: NestDataModule, device: torch.device) -> Generator[NoiseBatch, None, None]:
    """Yield the training batches on the device."""
    for batch in data.train_dataloader():
        if isinstance(batch, NestError):
            raise batch
        yield batch.to(device)


def main() -> None:
    task = Task.given()
    batch_seconds, seconds = (20.0, 0.5) if task.rehearse else (600.0, 6.0)
    for workers in (PROCESSES, 1) if task.rehearse else (PROCESSES, 8, 1):
        task.measure(f"loader {workers} processes", lambda w=workers: loaded(task, w, batch_seconds, seconds))


if __name__ == "__main__":
    main()
