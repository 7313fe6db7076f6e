"""Section `buckets`: duration bins of the training manifest, and the largest batch of each on this device."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
from omegaconf import DictConfig

from nestcli.bench.buckets import default_buckets, estimate_bins, padding_of_buckets, padding_of_plain
from nestcli.bench.context import BenchContext, Told, plain
from nestcli.bench.largest import Search, Trial
from nestcli.bench.material import read_material
from nestcli.bench.peer import Peer, our_peer
from nestcli.bench.report import SectionReport, Spread
from nestcli.conversation import DiedError
from nestcli.data.batch_plan import bucketed
from nestcli.errors import ConfigError, RunFailedError
from nestcli.model.cost import batch_size

_KEYS = "model.train_ds"


def buckets_section(context: BenchContext) -> SectionReport:
    """Estimate bins from the manifest's durations, then try training steps in a separate process."""
    config = context.loader_config()
    durations = read_material(config).speech.durations
    bins = estimate_bins(durations, default_buckets(len(durations), context.options.buckets))
    counts = np.bincount(bucketed(durations, bins, upper_inclusive=True), minlength=len(bins))
    device = context.device
    with Trials(config, device, context.options.memory, context.tell) as trials:
        search = Search(trials.attempt)
        sizes = search.largest(bins, [max(1, int(count)) for count in counts])
    memory = trials.memory or 0
    if not all(sizes):
        raise RunFailedError(
            f"one utterance of {bins[-1]:g} s does not fit into {memory >> 20:,} MiB. Lower {_KEYS}.max_duration, "
            "set trainer.precision=bf16-mixed, or raise --memory."
        )
    padding = {
        "plain": padding_of_plain(durations, batch_size(config, float(durations.mean()))),
        "buckets": padding_of_buckets(durations, bins, sizes),
    }
    return _reported(bins, sizes, counts.tolist(), search.trials, padding, device, memory)


class Trials:
    """Tries batches in a process that may run out of memory and die: then the batch does not fit, and a new one starts.

    `memory` is in bytes; None until the process has measured how much is free.
    """

    def __init__(self, config: DictConfig, device: str, memory: int | None, tell: Told) -> None:
        self.config, self.device, self.memory, self.tell = config, device, memory, tell
        self._peer: Peer | None = None

    def attempt(self, batch: int, seconds: float) -> Trial:
        peer = self._ready()
        self.tell(f"buckets: {batch} utterances of {seconds:g} s")
        try:
            facts = peer.ask("try_step", batch=batch, seconds=seconds)
        except DiedError:
            self._end()
            return Trial(batch, seconds, None)
        if not facts["fits"]:
            if self.device == "cpu":  # the C library's allocator does not return freed memory to the system
                self._end()
            return Trial(batch, seconds, None)
        return Trial(batch, seconds, facts["used"], facts["seconds"], facts["peak"])

    def _ready(self) -> Peer:
        if self._peer is None:
            peer = self._peer = our_peer(one_thread=False, returns_memory=True)
            try:
                facts = peer.ask("open_step", config=plain(self.config), device=self.device, memory=self.memory)
            except DiedError as error:
                raise ConfigError(f"--memory: too little to start the training step ({error}). Raise it.") from None
            self.memory = facts["memory"]
        return self._peer

    def _end(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()


def _reported(
    bins: list[float], sizes: list[int], counts: list[int], trials: list[Trial], padding: dict[str, float],
    device: str, memory: int,
) -> SectionReport:  # fmt: skip
    keys = {"use_lhotse": True, "bucket_duration_bins": bins, "bucket_batch_size": sizes}
    return SectionReport(
        name="buckets",
        unit="seconds of audio in the largest batch of a bucket",
        ours=Spread.of(size * end for size, end in zip(sizes, bins, strict=True)),
        nemo=None,
        ratio=None,
        memory=max(trial.peak for trial in trials),
        extra={
            "device": device,
            "memory_budget_bytes": memory,
            "bins": [
                {"upto_seconds": end, "utterances": count, "batch_size": size}
                for end, count, size in zip(bins, counts, sizes, strict=True)
            ],
            "keys": {f"{_KEYS}.{key}": value for key, value in keys.items()},
            "words": [f"{_KEYS}.{key}={_word(value)}" for key, value in keys.items()],
            "padding": padding,
            "trials": [_told(trial) for trial in trials],
        },
    )


def _word(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",".join(f"{item:g}" for item in value) + "]"
    return str(value).lower()


def _told(trial: Trial) -> dict[str, Any]:
    return {
        "batch_size": trial.batch,
        "seconds": trial.seconds,
        "fits": trial.fits,
        "step_seconds": trial.step_seconds,
        "peak_bytes": trial.peak or None,
    }
