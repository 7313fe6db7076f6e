"""Pre-flight checks: do the files exist, are there enough cores and memory?"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, ListConfig, OmegaConf

from nestcli.data.corpus import speech_manifests
from nestcli.data.manifest import Manifest
from nestcli.data.manifest_scan import check_there
from nestcli.errors import DataError
from nestcli.files import is_remote
from nestcli.jobs.cores import available_cores

_ALL_UP_TO, _SAMPLE = 10_000, 1_000  # lines: check all files of manifests up to this size, a sample of longer ones
_JUDGED_FROM = 100  # utterances; with fewer, one corrupt file is a large share
_THREADS, _PIECE = 16, 64  # file servers answer slowly, but many requests at a time
_SURE = 3  # standard deviations


@dataclass(frozen=True)
class Found:
    """The number of missing files among the lines that were looked at; `total` counts all lines of the manifest."""

    total: int
    looked: int
    missing: int
    first: str  # the first missing file and its line

    def exceeds(self, share: float) -> bool:
        """Return True if more than a share of all lines is surely missing."""
        chance = math.sqrt(share * (1 - share) / self.looked) if self.looked < self.total else 0.0
        return self.missing == self.looked or self.missing > (share + _SURE * chance) * self.looked

    def __str__(self) -> str:
        of = f"{self.looked:,}" if self.looked == self.total else f"{self.looked:,} that were looked for"
        return f"{self.missing:,} of {of} files are not there, or may not be read; the first: {self.first}"


def check_names(config: DictConfig, key: str) -> None:
    """Raise ConfigError or DataError if the manifests of a block are not set or not there. Reads none of them."""
    block = OmegaConf.select(config, key)
    if block is None or any(block.get(other) for other in ("input_cfg", "shar_path", "cuts_path")):
        return
    for paths in (speech_manifests(config, key), block.get("noise_manifest")):
        each = [paths] if isinstance(paths, str) else list(paths) if isinstance(paths, list | ListConfig) else []
        if all(isinstance(path, str) and path.strip(" ,[]") for path in each):  # reading judges all other values
            check_there(paths if isinstance(paths, str) else each)


def check_speech(manifest: Manifest, key: str, max_failed_share: float) -> None:
    """Raise DataError if so much speech is missing that a run would fail, or would have nothing to train on."""
    found = look_for_files(manifest, _SAMPLE)
    allowed = max_failed_share if found.looked >= _JUDGED_FROM else 0.5
    if found.missing and found.exceeds(allowed):
        raise DataError(f"{key}: {found}. {_remedy(manifest)}")


def check_noise(manifest: Manifest, key: str, max_failed_share: float) -> str | None:
    """Return a message about missing noise, if any. Raises DataError if more is missing than the run allows."""
    found = look_for_files(manifest, len(manifest) if len(manifest) <= _ALL_UP_TO else _SAMPLE)
    if found.missing and found.exceeds(max_failed_share):
        raise DataError(
            f"{key}.noise_manifest: {found}. {_remedy(manifest)} Set {key}.noise_manifest=null to train without noise."
        )
    return f"{key}.noise_manifest: {found}. Other noise is taken instead." if found.missing else None


def look_for_files(manifest: Manifest, most: int) -> Found:
    """Check whether the files of at most `most` lines, spread over the manifest, are readable; skip remote files."""
    lines = np.linspace(0, len(manifest) - 1, min(len(manifest), most)).astype(int).tolist()
    pieces = [lines[start : start + _PIECE] for start in range(0, len(lines), _PIECE)]
    with ThreadPoolExecutor(_THREADS) as threads:
        missing = [line for piece in threads.map(lambda piece: _missing(manifest, piece), pieces) for line in piece]
    first = f"{manifest.entry(missing[0]).name} ({manifest.where(missing[0])})" if missing else ""
    return Found(len(manifest), len(lines), len(missing), first)


def _missing(manifest: Manifest, lines: list[int]) -> list[int]:
    missing, shards = [], dict[str, bool]()
    for line in lines:
        entry = manifest.entry(line)
        if entry.shard is None:
            there = _can_be_read(entry.audio_filepath)
        else:
            there = shards[entry.shard] if entry.shard in shards else _can_be_read(entry.shard)
            shards[entry.shard] = there
        if not there:
            missing.append(line)
    return missing


def _can_be_read(path: str) -> bool:
    try:
        return is_remote(path) or os.access(path, os.R_OK)
    except ValueError:  # a NUL in it
        return False


def _remedy(manifest: Manifest) -> str:
    return (
        f"If the audio was moved, run `nest prepare-data` where it is now; if a disk is not mounted, mount it. "
        f"Paths in {manifest.sources[0].path} are absolute, or relative to its folder."
    )


# --- the machine


def machine_notes(key: str, workers: int, loader_bytes: int, processes: int) -> list[str]:
    """Return messages if cores or memory are short for `workers` loader processes per training process.

    `processes` of the run are on this machine; each needs up to `loader_bytes` for its queued batches.
    """
    told, cores = [], available_cores()
    if workers * processes > cores:
        each = f" for each of {processes} training processes" if processes > 1 else ""
        told.append(
            f"{key}.num_workers={workers}{each} are more than the {cores} processor cores that there are to use; "
            f"{min(workers, cores)} are started{each}"
        )
    memory = available_memory()
    if memory is not None and loader_bytes * processes > memory:
        told.append(
            f"the loader of {key} may need {loader_bytes * processes / 2**30:.1f} GiB for its batches, and "
            f"{memory / 2**30:.1f} GiB of memory are free; if the run is killed, lower {key}.num_workers or "
            "the size of its batches"
        )
    return told


def available_memory() -> int | None:
    """Return the bytes that this process and its children may still use; None if the system does not say."""
    left = []
    with suppress(OSError, ValueError, IndexError):
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        left.append(int(rows["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a container
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        left.append(int(most) - int(used))
    return min(left, default=None)
