"""Parts of `make gpu`: their command line, the rows that they write as they go, and a device's clock and memory."""

from __future__ import annotations

import argparse
import gc
import json
import linecache
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
BEGUN, DONE, FAILED, SKIPPED = "begun", "done", "failed", "skipped"
BROKEN = 3  # exit code of a process whose GPU context is unusable after an error
_WARM_UP, _LEAST = 3, 5  # calls before and during a measurement

Facts = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One process of a part: its file of rows, the folder that all parts share, and its time limit in seconds."""

    rows: Path
    work: Path
    seconds: float
    rehearse: bool
    options: tuple[str, ...]

    @classmethod
    def given(cls) -> Task:
        """Read the command line that run.py writes."""
        parser = argparse.ArgumentParser(description="A part of docs/gpu/run.py, which starts it.")
        parser.add_argument("rows", type=Path)
        parser.add_argument("work", type=Path)
        parser.add_argument("--seconds", type=float, required=True)
        parser.add_argument("--rehearse", action="store_true")
        parser.add_argument("options", nargs="*")
        given = parser.parse_intermixed_args()
        return cls(given.rows, given.work, given.seconds, given.rehearse, tuple(given.options))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.rehearse else torch.device("cuda", 0)

    @property
    def accelerator(self) -> tuple[str, ...]:
        """Keys that choose this device."""
        return ("trainer.devices=1", f"trainer.accelerator={'cpu' if self.rehearse else 'gpu'}")

    def measure(self, name: str, work: Callable[[], Facts]) -> Facts | None:
        """Write the row `name` with the facts that `work` returns, or with its error; return the facts.

        A row that an earlier process of this part began is left alone: it may have ended that process.
        """
        if name in {row["name"] for row in read_rows(self.rows)}:
            return None
        self._write(name, BEGUN, {})
        facts: Facts | None = None
        try:
            facts = work()
            self._write(name, DONE, facts)
        except torch.OutOfMemoryError as error:
            self._write(name, SKIPPED, {"why": f"out of memory: {_first_line(error)}"})
        except Exception as error:
            traceback.print_exc()
            self._write(name, FAILED, {"why": f"{type(error).__name__}: {_first_line(error)}"})
            if "CUDA error" in str(error):  # every later call of this process would fail
                sys.exit(BROKEN)
        free_memory(self.device)
        return facts

    def _write(self, name: str, state: str, facts: Facts) -> None:
        print(f"{name}: {state} {json.dumps(facts, default=str)[:300]}", flush=True)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "state": state, **facts}, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[Facts]:
    """Return the newest state of every row, in the order in which they began."""
    rows: dict[str, Facts] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the process was killed while it wrote
            continue
        rows[row["name"]] = {**rows.get(row["name"], {}), **row}
    return list(rows.values())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


# ---- a device's clock and memory, with stand-ins on a processor ----


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def memory(device: torch.device) -> int:
    """Return the bytes of tensors on a GPU; 0 on a processor."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def start_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Return the largest number of bytes since `start_peak`; 0 on a processor."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def timed(device: torch.device, work: Callable[[], object], seconds: float) -> float:
    """Return the median seconds of a call, from calls of about `seconds` in all."""
    for _ in range(_WARM_UP):
        work()
    wait_for(device)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < _LEAST or time.perf_counter() < end:
        taken.append(_one(device, work))
    return statistics.median(taken)


def _one(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def noted_waits(device: torch.device) -> Iterator[list[str]]:
    """Yield a list that holds the lines of code for which the host waited for the GPU, once the block has ended."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found += [_line_of(each) for each in caught if "called a synchronizing" in str(each.message)]


def _line_of(warning: warnings.WarningMessage) -> str:
    text = linecache.getline(warning.filename, warning.lineno).strip()
    return f"{Path(warning.filename).name}:{warning.lineno} {text}"
