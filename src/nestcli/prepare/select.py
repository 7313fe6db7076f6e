"""Accept or reject utterances, with a reason, from the reports of their files, in input order."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from nestcli.audio.inspect import AudioReport
from nestcli.audio.load import kept_channel, stated_slack
from nestcli.prepare.check import File
from nestcli.prepare.inputs import Item

MAX_CLIPPED = 0.01  # share of samples in runs at full scale; at one in a hundred, speech is audibly distorted


@dataclass(frozen=True, slots=True)
class DurationLimits:
    """Limits of an utterance: durations in seconds, None for no limit; `max_clipped` is a share of the samples.

    With `cut`, utterances that are too long are accepted and cut later.
    """

    min_duration: float | None
    max_duration: float | None
    cut: bool
    max_clipped: float = MAX_CLIPPED


@dataclass(frozen=True, slots=True)
class Accepted:
    """An accepted utterance; times in seconds of its file."""

    item: Item
    offset: float
    duration: float
    speaker: str | None
    sample_rate: int
    rms_db: float
    channel: int | None = None  # None for the average of all channels, or for the only one
    path: str | None = None  # path of the converted file

    @property
    def audio(self) -> str:
        return self.path or self.item.path


@dataclass(frozen=True, slots=True)
class Rejected:
    """A rejected input: the code of the reason, and an explanation for the user."""

    item: Item
    reason: str
    detail: str


def judge(
    items: Sequence[Item],
    reports: dict[File, AudioReport],
    limits: DurationLimits,
    find_speaker: Callable[[Item], str | None],
    channel: int | None = None,
) -> tuple[list[Accepted], list[Rejected]]:
    """Split the items into accepted and rejected ones. Of duplicates, the first is accepted.

    `channel` applies to items that choose none; `reports` must hold a report for each item's file and channel.
    """
    accepted: list[Accepted] = []
    rejected: list[Rejected] = []
    places: set[bytes] = set()  # hashes, as there may be millions
    contents: dict[bytes, int] = {}  # hash of the content: number of the item
    folders: dict[str, str] = {}
    for number, item in enumerate(items):
        if item.refused is not None:
            rejected.append(Rejected(item, item.reason, item.refused))
            continue
        if not _is_utf8(item.path):
            rejected.append(Rejected(item, "bad_name", "the file's name is not UTF-8; rename it"))
            continue
        kept = kept_channel(item.channel, channel)
        report = reports[item.path, kept]
        kept = kept if report.channels > 1 else None
        offset, duration = _segment(item, report)
        # the same place, whichever input named it, and whether or not that input stated the length
        place = _short(f"{_real_path(item.path, folders)}\0{kept}", offset, duration)
        content = _short(report.digest, offset, duration)
        same_as = items[contents[content]].path if content in contents else None
        if fault := _fault(item, report, duration, limits, place in places, same_as):
            rejected.append(Rejected(item, *fault))
        else:
            speaker = find_speaker(item)
            accepted.append(Accepted(item, offset, duration, speaker, report.sample_rate, report.rms_db, kept))
            contents[content] = number
        places.add(place)
    return accepted, rejected


def _short(what: str, offset: float, duration: float) -> bytes:
    """Return a hash of a segment in 12 bytes; among a million, two are equal with a probability of 1e-16."""
    return blake2b(f"{what}\0{offset}\0{duration}".encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _real_path(path: str, folders: dict[str, str]) -> str:
    """Return os.path.realpath(path), resolving every folder only once."""
    if os.path.islink(path):  # noqa: PTH114  (str paths, perhaps with bytes that are not UTF-8)
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return f"{folders[folder]}/{name}"


def _fault(
    item: Item, report: AudioReport, duration: float, limits: DurationLimits, seen: bool, same_as: str | None
) -> tuple[str, str] | None:
    """Return the first reason to reject an item (code, explanation), or None to accept it."""
    if report.reason is not None:
        return report.reason, report.detail
    stated_end = item.offset + (0.0 if math.isnan(item.duration) else item.duration)
    if not math.isnan(item.duration) and item.duration <= 0:
        return "bad_duration", f"its manifest gives it {item.duration:g} s"
    slack = 0.5 if math.isnan(item.duration) else stated_slack(item.duration)
    if duration <= 0 or stated_end > report.duration + slack:
        detail = f"{item.where()} goes beyond the file's {report.duration:.2f} s"
        return "truncated", f"{detail}; copy the file again, or correct the line"
    if seen:  # checked after the faults above, so that each broken file is reported with its own fault
        return "duplicate_path", "the same audio already occurs earlier in the inputs"
    if report.clipped > limits.max_clipped:
        return "clipped", f"{report.clipped:.1%} of its samples are clipped"
    if same_as is not None:
        return "duplicate_content", f"its samples are the same as those of {same_as}"
    return length_fault(duration, limits)


def length_fault(duration: float, limits: DurationLimits) -> tuple[str, str] | None:
    """Return the reason (code, explanation) if an utterance is too short or too long, else None."""
    if limits.min_duration is not None and duration < limits.min_duration:
        return "too_short", f"{duration:.2f} s is less than {limits.min_duration:g} s"
    if limits.max_duration is not None and duration > limits.max_duration and not limits.cut:
        return "too_long", f"{duration:.2f} s is more than {limits.max_duration:g} s"
    return None


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _segment(item: Item, report: AudioReport) -> tuple[float, float]:
    """Return offset and duration in seconds, rounded to microseconds and never beyond the decoded end."""
    if report.frames == 0:
        return item.offset, 0.0
    end = report.frames * 1_000_000 // report.sample_rate
    start = math.ceil(item.offset * 1e6)
    wanted = end if math.isnan(item.duration) else round(item.duration * 1e6)
    return item.offset, min(wanted, end - start) / 1e6
