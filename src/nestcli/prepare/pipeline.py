"""Turn folders, files and manifests into checked manifests: collect, check, judge, shape, split, write, pack.

Every step is a function over items in input order; the result depends only on the inputs and options.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nestcli.audio.load import CHANNEL_KEY, kept_channel
from nestcli.data.manifest import write_manifest
from nestcli.errors import DataError, RunFailedError
from nestcli.files import file_name, refuse_links, write_text
from nestcli.jobs.cores import available_cores
from nestcli.jobs.journal import REMEDY, Journal, disk_faults_told, open_journal
from nestcli.jobs.pool import Pool, local_pool
from nestcli.prepare.check import check_files
from nestcli.prepare.inputs import OUTPUTS, Collection, collect, made_before
from nestcli.prepare.options import PrepareOptions, checked_fraction, speaker_finder
from nestcli.prepare.segment import Piece, ShapeOptions, ShapeTask, shape
from nestcli.prepare.select import Accepted, DurationLimits, Rejected, judge, length_fault
from nestcli.prepare.split import for_validation
from nestcli.prepare.summary import PrepareSummary, summarise
from nestcli.prepare.summary_picture import draw_summary
from nestcli.prepare.write_shards import ShardSet, write_shards
from nestcli.storage.file_kinds import known_ending

__all__ = ["PrepareOptions", "first_rejection", "prepare"]

_write_rows = partial(write_manifest, error=RunFailedError, remedy=REMEDY)
Progress = Callable[..., None]  # (done, total, doing)


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: PrepareOptions,
    progress: Progress = lambda done, total, doing="": None,
) -> PrepareSummary:
    """Check every input and write train_manifest.json, val_manifest.json, rejected.jsonl and summary.json.

    The result depends only on inputs and options, not on the number or speed of processes. After an interruption the
    same call continues where it stopped. Raises DataError for a wrong option or input; if nothing can be accepted, the
    summary says so.
    """
    fraction = checked_fraction(options)
    find_speaker = speaker_finder(options.speaker_pattern)
    collection = collect(inputs, Path(out))
    if not collection.items:
        raise DataError(_nothing_found(inputs, collection))
    folder = _make_folder(Path(out))
    _check_folders(folder, options)
    if options.split_by == "speaker":
        _check_speakers(map(find_speaker, collection.items))
    with (
        disk_faults_told(folder),
        open_journal(folder) as journal,
        _without_leftovers(folder),
        _pool(options) as pool,
    ):
        usable = (item for item in collection.items if item.refused is None)
        files = list(dict.fromkeys((item.path, kept_channel(item.channel, options.channel)) for item in usable))
        reports = check_files(files, pool, journal, progress, options.patience)
        limits = DurationLimits(
            options.min_duration, options.max_duration, options.segment is not None, options.max_clipped
        )
        accepted, rejected = judge(collection.items, reports, limits, find_speaker, options.channel)
        reports.clear()
        accepted, rejected = _shaped(accepted, rejected, folder, options, limits, pool, journal, progress)
        in_val = for_validation(_groups(accepted, options.split_by), fraction) if accepted else []
        _write_rows(folder / "rejected.jsonl", (_rejected_row(each) for each in rejected))
        manifests = _write(folder, accepted, in_val)
        shards = _packed(folder, manifests, options, pool, progress) if options.shards else {}
        summary = summarise(options.kind, accepted, rejected, in_val, manifests, collection.passed_over)
        summary = replace(
            summary,
            shards={side: made.config for side, made in shards.items()},
            not_packed=sum(len(made.skipped) for made in shards.values()),
        )
        draw_summary(folder / "summary.svg", options.kind, accepted)
        text = json.dumps(summary.as_json(), ensure_ascii=False, indent=2)
        write_text(folder / "summary.json", [text, "\n"], RunFailedError, REMEDY)
    return summary


def first_rejection(out: str | os.PathLike[str]) -> str:
    """Return the first rejected input and the reason, for a message."""
    with (Path(out) / "rejected.jsonl").open(encoding="utf-8") as file:
        row = json.loads(file.readline())
    return f"{row['audio_filepath']}: {row['detail']}"


@contextmanager
def _pool(options: PrepareOptions) -> Iterator[Pool]:
    if options.ray is None:
        with local_pool(options.jobs or available_cores()) as pool:
            yield pool
        return
    from nestcli.jobs.ray_pool import ray_pool

    with ray_pool(options.ray) as pool:
        yield pool


# --- the call


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be created: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"the folder {folder} cannot be written to; choose another for --out")
    return folder


def _check_folders(folder: Path, options: PrepareOptions) -> None:
    """Check that no folder that this run writes to or cleans up is a link. Raises DataError."""
    used = {folder / "audio"} if options.convert else set()
    if options.shards:
        used |= {folder / "train_shards", folder / "val_shards"}
    for each in sorted({*used, *made_before(folder)}):
        refuse_links(each, DataError)


def _nothing_found(inputs: Sequence[str | os.PathLike[str]], collection: Collection) -> str:
    where = ", ".join(os.fspath(each) for each in inputs)
    others = f"; {collection.passed_over} other files were ignored" if collection.passed_over else ""
    for ending, count in collection.endings.most_common():
        if about := known_ending(ending):
            held = "a file" if count == 1 else f"{count} files"
            return f"no audio file found in {where}, but {held} with the extension {ending}: {about}{others}."
    return f"no audio found in {where}{others}. Give folders, audio files or manifests."


# --- shaping and packing


def _shaped(
    accepted: list[Accepted],
    rejected: list[Rejected],
    folder: Path,
    options: PrepareOptions,
    limits: DurationLimits,
    pool: Pool,
    journal: Journal,
    progress: Progress,
) -> tuple[list[Accepted], list[Rejected]]:
    """Cut and convert the accepted utterances; reject those that become too short or fail."""
    if options.segment is None and not options.convert:
        return accepted, rejected
    audio = folder.absolute() / "audio"
    how = ShapeOptions(options.segment, str(audio) if options.convert else None, options.sample_rate)
    of_channel = {channel: replace(how, channel=channel) for channel in {each.channel for each in accepted}}
    tasks = [_shape_task(each, of_channel[each.channel]) for each in accepted]
    final = DurationLimits(limits.min_duration, limits.max_duration, cut=False)
    with _audio_journal(audio) if options.convert else nullcontext(journal) as pieces_made:
        shaped = shape(tasks, pool, pieces_made, partial(progress, doing="(cutting and converting)"), options.patience)
        return _piecewise(accepted, rejected, shaped, options, final)


def _piecewise(
    accepted: Sequence[Accepted],
    rejected: list[Rejected],
    shaped: Iterable[list[Piece] | str],
    options: PrepareOptions,
    limits: DurationLimits,
) -> tuple[list[Accepted], list[Rejected]]:
    kept: list[Accepted] = []
    for whole, pieces in zip(accepted, shaped, strict=True):
        if isinstance(pieces, str):
            rejected.append(Rejected(whole.item, "not_converted", pieces))
            continue
        start = whole.offset
        for piece in pieces:
            if fault := length_fault(piece.duration, limits):
                where = f"the piece at {start:.2f} s: " if len(pieces) > 1 else ""
                rejected.append(Rejected(whole.item, fault[0], where + fault[1]))
                start += piece.duration
                continue
            start += piece.duration
            path = piece.path if options.convert else None
            rate = options.sample_rate if options.convert else whole.sample_rate
            kept.append(replace(whole, offset=piece.offset, duration=piece.duration, path=path, sample_rate=rate))
    return kept, rejected


@contextmanager
def _audio_journal(folder: Path) -> Iterator[Journal]:
    """Open the journal of converted files. Raises DataError if the folder holds files of the user."""
    if folder.is_dir() and any(folder.iterdir()) and folder not in made_before(folder.parent):
        raise DataError(f"{folder} already holds files that nest did not write; give another --out")
    folder.mkdir(exist_ok=True)
    journal = Journal(folder)
    try:
        yield journal
    finally:
        journal.close()


@contextmanager
def _without_leftovers(folder: Path) -> Iterator[None]:
    """Remove unfinished files: on entry those of a killed run, on exit those of this run's processes if it fails."""
    _clear_leftovers(folder)
    try:
        yield
    finally:
        _clear_leftovers(folder)


def _clear_leftovers(folder: Path) -> None:
    stale = [path for name in OUTPUTS for path in folder.glob(f".{name}.*.tmp")]
    for made in made_before(folder):
        stale.extend(made.rglob(".*.tmp"))
        for half in made.glob(".shar-*"):
            shutil.rmtree(half, ignore_errors=True)
    for path in stale:
        path.unlink(missing_ok=True)


def _shape_task(utterance: Accepted, how: ShapeOptions) -> ShapeTask:
    item = utterance.item
    # The name depends on the content, so that a run with other options does not change the pieces of this one.
    content = (item.path, utterance.offset, utterance.duration, how.segment, how.sample_rate, how.channel)
    return ShapeTask(item.path, utterance.offset, utterance.duration, file_name(item.key, repr(content)), how)


def _packed(
    folder: Path, manifests: dict[str, str | None], options: PrepareOptions, pool: Pool, progress: Progress
) -> dict[str, ShardSet]:
    """Write the shards of both sides; validation gets a proportional number."""
    assert options.shards is not None
    shards: dict[str, ShardSet] = {}
    counts = {side: _n_lines(path) for side, path in manifests.items() if path is not None}
    for side, count in counts.items():
        share = 1.0 if side == "train" else count / counts.get("train", count)
        path = manifests[side]
        assert path is not None
        shards[side] = write_shards(
            path,
            folder / f"{side}_shards",
            shards=min(max(1, round(options.shards * share)), count),
            format=options.shard_format,
            sample_rate=options.sample_rate,
            patience=options.patience,
            pool=pool,
            progress=partial(progress, doing=f"(packing the shards of {side})"),
        )
    return shards


def _n_lines(path: str) -> int:
    with Path(path).open("rb") as file:
        return sum(1 for _ in file)


# --- splitting and writing


def _groups(accepted: Sequence[Accepted], by: str) -> list[str | None]:
    """Return the group of each utterance that must stay on one side of the split: its speaker, or its input path."""
    if by == "utterance":
        return [each.item.key for each in accepted]
    speakers = [each.speaker for each in accepted]
    _check_speakers(speakers)
    return speakers


def _check_speakers(speakers: Iterable[str | None]) -> None:
    if not any(speakers):
        raise DataError(
            "the split needs speakers, but none is known; give --speaker-pattern or manifests with speakers"
        )


def _write(folder: Path, accepted: Sequence[Accepted], in_val: Sequence[bool]) -> dict[str, str | None]:
    """Write both manifests and return their paths, None for one without lines."""
    written: dict[str, str | None] = {}
    for name, side in (("train", False), ("val", True)):
        path = folder / f"{name}_manifest.json"
        if side in in_val:
            _write_rows(path, (_row(each) for each, is_val in zip(accepted, in_val, strict=True) if is_val is side))
            written[name] = str(path.absolute())
        else:
            path.unlink(missing_ok=True)  # from an earlier run
            written[name] = None
    return written


def _row(utterance: Accepted) -> dict[str, Any]:
    """Return the manifest's line: everything that the input's manifest says, updated with the measured values."""
    row = utterance.item.known()
    row.update(audio_filepath=utterance.audio, duration=utterance.duration)
    row.pop("offset", None)
    chosen_there = row.pop(CHANNEL_KEY, None)
    if utterance.path is None and (utterance.channel is not None or chosen_there == "average"):
        row[CHANNEL_KEY] = chosen_there if utterance.channel is None else utterance.channel
    if utterance.offset:
        row["offset"] = utterance.offset
    if utterance.speaker is not None:
        row["speaker"] = utterance.speaker
    return row


def _rejected_row(rejected: Rejected) -> dict[str, Any]:
    return {"audio_filepath": rejected.item.path, "reason": rejected.reason, "detail": rejected.detail}
