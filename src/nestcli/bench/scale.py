"""Section `scale`: time and memory that long manifests cost before the first batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nestcli.bench.context import BenchContext, plain
from nestcli.bench.corpus import make_bench_corpus
from nestcli.bench.loader import nemo_block
from nestcli.bench.peer import Peer, nemo_peer, our_peer
from nestcli.bench.report import SectionReport, Spread
from nestcli.files import write_text

ROUNDS = 3
_EPOCH = 3  # epochs that the resumed run has completed
_FILES = 8
_WRITTEN_AT_ONCE = 10_000  # lines per write

Facts = dict[str, Any]


@dataclass(frozen=True)
class StartUp:
    """Seconds from the start of a process to its first batch, by part; its memory and peak memory then, in bytes."""

    total: float
    imports: float
    manifest: float
    first_batch: float
    batches_per_epoch: int | None
    main: dict[str, int | None]
    worker: dict[str, int | None]


def scale_section(context: BenchContext) -> SectionReport:
    """Start processes on manifests of growing length, and one that resumes late in its fourth epoch."""
    speech, noise = make_bench_corpus(
        context.folder / "scale", speech=_FILES, noise=_FILES, seconds=(20.0, 20.0), noise_seconds=(20.0, 20.0)
    )
    rounds, lengths = context.options.rounds or ROUNDS, sorted(context.options.lines)
    rows, starts = [], []
    for count in lengths:
        manifest = context.folder / f"scale-{count}.json"
        write_long_manifest(manifest, sorted((speech.parent / "speech").iterdir()), count)
        config = context.loader_config(manifest_filepath=str(manifest), noise_manifest=str(noise), pin_memory=False)
        context.tell(f"scale: {count:,} lines")
        starts = [started(our_peer, config=plain(config)) for _ in range(rounds)]
        rows.append(_row(count, starts))
        if context.nemo is not None and context.options.nemo_python is not None:
            context.tell(f"scale: {count:,} lines, NeMo")
            theirs = started(partial(nemo_peer, context.options.nemo_python), train_ds=nemo_block(config))
            rows[-1]["nemo"] = _row(count, [theirs])
    batches = starts[-1].batches_per_epoch or 1
    context.tell(f"scale: {lengths[-1]:,} lines, resumed in epoch {_EPOCH}")
    consumed = _EPOCH * batches + batches * 9 // 10
    with our_peer() as peer:
        state = peer.ask("state_at", config=plain(config), consumed=consumed)["state"]
    resumed = [started(our_peer, config=plain(config), consumed=consumed, state=state) for _ in range(rounds)]
    return _reported(context, rows, starts, {**_row(lengths[-1], resumed), "consumed_batches": consumed})


def write_long_manifest(path: Path, audio: Sequence[Path], lines: int, seed: int = 0) -> None:
    """Write a manifest of utterances of 1 to 19 s, each an excerpt of one of a few 20 s files, by 5,000 speakers."""
    rng = np.random.default_rng(seed)

    def pieces() -> Any:
        for first in range(0, lines, _WRITTEN_AT_ONCE):
            count = min(_WRITTEN_AT_ONCE, lines - first)
            durations = rng.uniform(1, 19, count)
            offsets = rng.uniform(0, 20 - durations)
            columns = zip(rng.integers(len(audio), size=count), durations, offsets, strict=True)
            yield "".join(
                f'{{"audio_filepath": "{audio[file]}", "duration": {duration:.4f}, "offset": {offset:.4f}, '
                f'"speaker": "speaker-{(first + number) % 5000:05d}"}}\n'
                for number, (file, duration, offset) in enumerate(columns)
            )

    write_text(path, pieces())


def started(make: Callable[[], Peer], **parameters: Any) -> StartUp:
    """Start a process, take it to its first batch, and end it."""
    begin = time.perf_counter()
    with make() as peer:
        facts = peer.ask("open_loader", **parameters)
        total = time.perf_counter() - begin
        memory = peer.ask("memory")
    nothing: dict[str, int | None] = {"peak": 0, "resident": 0, "proportional": 0, "own": 0}
    return StartUp(
        total=total,
        imports=total - facts["manifest"] - facts["first_batch"],
        manifest=facts["manifest"],
        first_batch=facts["first_batch"],
        batches_per_epoch=facts.get("batches_per_epoch"),
        main=memory["main"],
        worker=memory["workers"][0] if memory["workers"] else nothing,
    )


def _row(lines: int, starts: Sequence[StartUp]) -> Facts:
    """Return the medians of several starts, in seconds and microseconds per line, and the memory of the last one."""

    def median(name: str) -> float:
        return Spread.of(getattr(start, name) for start in starts).median

    return {
        "lines": lines,
        "seconds": median("total"),
        "imports": median("imports"),
        "manifest": median("manifest"),
        "first_batch": median("first_batch"),
        "microseconds_per_line": 1e6 * median("manifest") / lines,
        "memory": {"main": starts[-1].main, "worker": starts[-1].worker},
    }


def _reported(context: BenchContext, rows: list[Facts], longest: Sequence[StartUp], resumed: Facts) -> SectionReport:
    theirs = rows[-1].get("nemo")
    ours = Spread.of(start.total for start in longest)
    return SectionReport(
        name="scale",
        unit=f"seconds to the first batch, {rows[-1]['lines']:,} lines",
        ours=ours,
        nemo=None if theirs is None else Spread.of([theirs["seconds"]]),
        ratio=None if theirs is None else theirs["seconds"] / ours.median,
        memory=_peak(rows[-1]),
        nemo_memory=None if theirs is None else _peak(theirs),
        extra={"nemo_version": context.nemo, "rows": rows, "resume": resumed},
    )


def _peak(row: Facts) -> int:
    return int(row["memory"]["main"]["peak"]) + int(row["memory"]["worker"]["peak"])
