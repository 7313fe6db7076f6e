"""From folders, files and manifests to checked manifests: collect, check, judge, split, write.

Every step is a function of its own over items in input order, so that a later stage (conversion, segments,
shards) can take the accepted utterances from here.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from nestcli.data.audio import AudioReport, inspect_audio
from nestcli.data.collect import Collection, Item, collect
from nestcli.data.cores import available_cores
from nestcli.data.manifest import write_manifest
from nestcli.data.split import for_validation
from nestcli.errors import DataError
from nestcli.files import write_text

VAL_FRACTION = {"speech": 0.05, "noise": 0.0}
SHORT = 1.0  # s; `nest pretrain` leaves out shorter utterances unless told otherwise
_STATED_SLACK = 0.5  # s by which a manifest may promise more than its file holds, in rounded durations

Progress = Callable[[int, int], None]
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """What to make of the inputs; durations in seconds, None for no limit.

    `val_fraction` None is 0.05 for speech and 0 for noise. `jobs` None is one thread a core.
    """

    kind: Literal["speech", "noise"] = "speech"
    val_fraction: float | None = None
    split_by: Literal["utterance", "speaker"] = "utterance"
    speaker_pattern: str | None = None
    min_duration: float | None = None
    max_duration: float | None = None
    jobs: int | None = None


@dataclass(frozen=True, slots=True)
class PrepareSummary:
    """What was prepared, as it stands in summary.json; durations in seconds."""

    kind: str
    accepted: int
    rejected: int
    hours: float
    manifests: dict[str, str | None]
    utterances: dict[str, int]
    rejections: dict[str, int]
    speakers: int
    without_speaker: int
    durations: dict[str, float]
    shorter_than_1s: int
    sample_rates: dict[int, int]
    passed_over: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Accepted:
    item: Item
    offset: float
    duration: float
    speaker: str | None
    sample_rate: int


@dataclass(frozen=True, slots=True)
class _Rejected:
    item: Item
    reason: str
    detail: str


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: PrepareOptions,
    progress: Progress = lambda done, total: None,
) -> PrepareSummary:
    """Check every input and write train_manifest.json, val_manifest.json, rejected.jsonl and summary.json.

    The result depends on inputs and options only, not on `jobs`. Raises DataError for a wrong call or input,
    and when nothing can be accepted.
    """
    fraction = _checked_fraction(options)
    find_speaker = _speaker_finder(options.speaker_pattern)
    collection = collect(inputs, Path(out))
    if not collection.items:
        raise DataError(_nothing_found(inputs, collection))
    folder = _make_folder(Path(out))
    reports = _check(collection.items, options.jobs, progress)
    accepted, rejected = _judge(collection.items, reports, options, find_speaker)
    write_manifest(folder / "rejected.jsonl", (_rejected_row(each) for each in rejected))
    if not accepted:
        for stale in ("train_manifest.json", "val_manifest.json", "summary.json"):
            (folder / stale).unlink(missing_ok=True)  # of an earlier run, that rejected.jsonl no longer belongs to
        raise DataError(_nothing_accepted(rejected, folder))
    in_val = for_validation(_groups(accepted, options.split_by), fraction)
    manifests = _write(folder, accepted, in_val)
    summary = _summarise(options.kind, accepted, rejected, in_val, manifests, collection.passed_over)
    text = json.dumps(summary.as_json(), ensure_ascii=False, indent=2)
    write_text(folder / "summary.json", [text, "\n"], DataError)
    return summary


# --- the call


def _checked_fraction(options: PrepareOptions) -> float:
    """Check the options; the share of validation."""
    fraction = VAL_FRACTION[options.kind] if options.val_fraction is None else options.val_fraction
    if not 0 <= fraction < 1:
        raise DataError(f"a validation share of {fraction:g} is not possible; give 0 or more, and less than 1")
    low, high = options.min_duration or 0.0, options.max_duration
    if not math.isfinite(low) or (high is not None and not low <= high):
        raise DataError(f"no duration lies between {low:g} s and {high} s; raise the maximum")
    if options.jobs is not None and options.jobs < 1:
        raise DataError(f"{options.jobs} jobs do no work; give 1 or more")
    return fraction


def _speaker_finder(pattern: str | None) -> Callable[[Item], str | None]:
    """A function that finds an item's speaker: by the pattern in its path, else in its manifest."""
    if pattern is None:
        return lambda item: item.speaker or None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"the speaker pattern {pattern!r} is no regular expression: {error}") from None
    if not compiled.groups:
        raise DataError(f"the speaker pattern {pattern!r} has no group; put ( ) around the speaker's part of it")
    group = "speaker" if "speaker" in compiled.groupindex else 1

    def find(item: Item) -> str | None:
        found = compiled.search(item.path)
        return (found[group] if found else None) or item.speaker or None

    return find


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise DataError(f"the folder {folder} cannot be written to; choose another for --out")
    return folder


def _nothing_found(inputs: Sequence[str | os.PathLike[str]], collection: Collection) -> str:
    where = ", ".join(os.fspath(each) for each in inputs)
    others = f"; {collection.passed_over} other files were passed over" if collection.passed_over else ""
    return f"there is no audio in {where}{others}. Give folders, audio files or manifests."


def _nothing_accepted(rejected: Sequence[_Rejected], folder: Path) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in _count_reasons(rejected).items())
    example = f"{rejected[0].item.path}: {rejected[0].detail}"
    return f"nothing can be used ({reasons}); see {folder / 'rejected.jsonl'}. The first: {example}"


# --- checking


def _check(items: Sequence[Item], jobs: int | None, progress: Progress) -> dict[str, AudioReport]:
    """Decode every file once, however many utterances are in it."""
    paths = list(dict.fromkeys(item.path for item in items))
    reports: dict[str, AudioReport] = {}
    for report in _in_order(inspect_audio, paths, jobs or available_cores()):
        reports[paths[len(reports)]] = report
        if len(reports) % 16 == 0 or len(reports) == len(paths):
            progress(len(reports), len(paths))
    return reports


def _in_order(work: Callable[[_In], _Out], items: Iterable[_In], jobs: int) -> Iterator[_Out]:
    """Do the work in threads; results come in the order of the items, and few are ever waiting."""
    waiting: deque[Future[_Out]] = deque()
    with ThreadPoolExecutor(jobs) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 8 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# --- judging


def _judge(
    items: Sequence[Item],
    reports: dict[str, AudioReport],
    options: PrepareOptions,
    find_speaker: Callable[[Item], str | None],
) -> tuple[list[_Accepted], list[_Rejected]]:
    accepted: list[_Accepted] = []
    rejected: list[_Rejected] = []
    seen: set[tuple[str, float, float]] = set()
    for item in items:
        report = reports[item.path]
        offset, duration = _segment(item, report)
        identity = (os.path.realpath(item.path), offset, duration)  # whichever input named it, stated length or not
        if fault := _fault(item, report, duration, options, identity in seen):
            rejected.append(_Rejected(item, *fault))
        else:
            accepted.append(_Accepted(item, offset, duration, find_speaker(item), report.sample_rate))
        seen.add(identity)
    return accepted, rejected


def _fault(
    item: Item, report: AudioReport, duration: float, options: PrepareOptions, seen_before: bool
) -> tuple[str, str] | None:
    """The first reason to leave an item out, and what to say about it."""
    if not _is_utf8(item.path):
        return "bad_name", "the file's name is not UTF-8; rename it"
    if seen_before:
        return "duplicate_path", "the same audio is in the inputs already"
    if report.reason is not None:
        return report.reason, report.detail
    stated_end = item.offset + (0.0 if math.isnan(item.duration) else item.duration)
    if not math.isnan(item.duration) and item.duration <= 0:
        return "bad_duration", f"its manifest gives it {item.duration:g} s"
    if duration <= 0 or stated_end > report.duration + _STATED_SLACK:
        return "truncated", f"{item.where()} goes beyond the file's {report.duration:.2f} s"
    if options.min_duration is not None and duration < options.min_duration:
        return "too_short", f"{duration:.2f} s are less than {options.min_duration:g} s"
    if options.max_duration is not None and duration > options.max_duration:
        return "too_long", f"{duration:.2f} s are more than {options.max_duration:g} s"
    return None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _segment(item: Item, report: AudioReport) -> tuple[float, float]:
    """Offset and duration in seconds, in whole microseconds and never beyond the decoded end."""
    if report.frames == 0:
        return item.offset, 0.0
    end = report.frames * 1_000_000 // report.sample_rate
    start = math.ceil(item.offset * 1e6)
    wanted = end if math.isnan(item.duration) else round(item.duration * 1e6)
    return item.offset, min(wanted, end - start) / 1e6


def _groups(accepted: Sequence[_Accepted], by: str) -> list[str | None]:
    """What must stay on one side of the split: a speaker, or all that came from one path."""
    if by == "utterance":
        return [each.item.key for each in accepted]
    speakers = [each.speaker for each in accepted]
    if not any(speakers):
        raise DataError("no speakers are known to split by; give --speaker-pattern, or manifests with speakers")
    return speakers


# --- writing


def _write(folder: Path, accepted: Sequence[_Accepted], in_val: Sequence[bool]) -> dict[str, str | None]:
    """Write both manifests; the path of each, None for one that has no lines."""
    written: dict[str, str | None] = {}
    for name, side in (("train", False), ("val", True)):
        path = folder / f"{name}_manifest.json"
        if side in in_val:
            write_manifest(path, (_row(each) for each, is_val in zip(accepted, in_val, strict=True) if is_val is side))
            written[name] = str(path.absolute())
        else:
            path.unlink(missing_ok=True)  # of an earlier run
            written[name] = None
    return written


def _row(utterance: _Accepted) -> dict[str, Any]:
    """The manifest's line: all that the input's manifest knew, with what was measured in place."""
    row = utterance.item.known()
    row.update(audio_filepath=utterance.item.path, duration=utterance.duration)
    row.pop("offset", None)
    if utterance.offset:
        row["offset"] = utterance.offset
    if utterance.speaker is not None:
        row["speaker"] = utterance.speaker
    return row


def _rejected_row(rejected: _Rejected) -> dict[str, Any]:
    return {"audio_filepath": rejected.item.path, "reason": rejected.reason, "detail": rejected.detail}


def _count_reasons(rejected: Sequence[_Rejected]) -> dict[str, int]:
    return dict(sorted(Counter(each.reason for each in rejected).items()))


def _summarise(
    kind: str,
    accepted: Sequence[_Accepted],
    rejected: Sequence[_Rejected],
    in_val: Sequence[bool],
    manifests: dict[str, str | None],
    passed_over: int,
) -> PrepareSummary:
    durations = [each.duration for each in accepted]
    return PrepareSummary(
        kind=kind,
        accepted=len(accepted),
        rejected=len(rejected),
        hours=round(math.fsum(durations) / 3600, 6),
        manifests=manifests,
        utterances={"train": len(accepted) - sum(in_val), "val": sum(in_val)},
        rejections=_count_reasons(rejected),
        speakers=len({each.speaker for each in accepted} - {None}),
        without_speaker=sum(each.speaker is None for each in accepted),
        durations={"min": min(durations), "median": statistics.median(durations), "max": max(durations)},
        shorter_than_1s=sum(duration < SHORT for duration in durations),
        sample_rates=dict(sorted(Counter(each.sample_rate for each in accepted).items())),
        passed_over=passed_over,
    )
