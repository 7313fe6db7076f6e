"""The samples of an utterance, from a local file, a remote file, or a member of a shard."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from nestcli.audio.load import AudioError, Channel, Samples, audio_duration, kept_channel, load_audio, stated_slack
from nestcli.data.manifest import Entry
from nestcli.data.tarred import file_id, without_sub
from nestcli.errors import DataError
from nestcli.storage import addresses
from nestcli.storage.allowed_folders import Admitted
from nestcli.storage.tar_members import TarMembers, open_shard

_NO_AUDIO = (".json", ".jsonl", ".txt", ".lab")  # files beside the audio in shards, under the same name


@dataclass(frozen=True, slots=True)
class Skipped:
    """A line that was left out of its batch because its audio could not be read, and the reason."""

    line: str
    why: str
    audio: str = ""
    reason: str = "unreadable"


def read_audio(
    entry: Entry,
    *,
    sample_rate: int,
    offset: float | None = None,
    duration: float | None = None,
    channel: Channel | None = None,
) -> Samples:
    """Read an entry's audio, or a part of it, as mono float32 at `sample_rate` Hz; times in seconds.

    `channel` applies to entries that choose none. Raises DataError if nothing can be read, or if the file is shorter
    than requested by more than 0.1 s plus a twentieth of the length, at most 0.5 s.
    """
    start = entry.offset if offset is None else offset
    stated = entry.duration if duration is None else duration
    length = None if math.isnan(stated) else stated
    kept = kept_channel(entry.channel, channel)
    with _local(entry) as path:
        try:
            samples = load_audio(path, sample_rate=sample_rate, offset=start, duration=length, channel=kept)
        except AudioError as error:
            raise AudioError(str(error).replace(path, entry.name), error.reason) from None
    return _as_promised(samples, entry, sample_rate, start, length)


def _as_promised(samples: Samples, entry: Entry, sample_rate: int, start: float, length: float | None) -> Samples:
    held = len(samples) / sample_rate
    if length is not None and length - held > stated_slack(length):
        raise AudioError(
            f"{entry.name}: the manifest promises {length:.2f} s from {start:g} s on, the file has {held:.2f} s there. "
            "Correct the manifest: `nest prepare-data` measures every file.",
            "truncated",
        )
    return samples


def duration_of(entry: Entry) -> float:
    """Return an entry's duration in seconds: as its line states, else the rest of its file after the offset.

    Raises DataError if the file cannot be read.
    """
    if not math.isnan(entry.duration):
        return entry.duration
    with _local(entry) as path:
        whole, why, reason = audio_duration(path)
    if whole is None:
        raise AudioError(f"{entry.name}: {why}", reason)
    return max(0.0, whole - entry.offset)


@contextmanager
def _local(entry: Entry) -> Iterator[str]:
    """Yield the path of a local file with an entry's audio."""
    path = entry.audio_filepath
    if entry.shard is None and not ("://" in path and addresses.is_remote(path)):
        yield path
        return
    with _as_file(_content(entry)) as copy:
        yield copy


def _content(entry: Entry) -> bytes:
    if entry.shard is None:
        return addresses.read_bytes(entry.audio_filepath)
    shard = open_shard(entry.shard)
    return shard.read(_member(shard, entry))


def _member(shard: TarMembers, entry: Entry) -> str:
    """Return the member for a line: by its full name, else, as in NeMo, by its name without folder and extension."""
    if entry.audio_filepath in shard.members:
        return entry.audio_filepath
    wanted = file_id(entry.audio_filepath)
    by_id = _by_id(shard)
    for name in (entry.audio_filepath, wanted, without_sub(wanted)):
        if name in by_id:
            return by_id[name]
    raise DataError(f"{entry.name}: the shard has no such member; were manifest and tars written together?")


@lru_cache(maxsize=64)
def _by_id(shard: TarMembers) -> dict[str, str]:
    """Return members by their names without extension, with and without folders."""
    found: dict[str, str] = {}
    for name in shard.members:
        if not name.endswith(_NO_AUDIO):
            found.setdefault(name.rpartition(".")[0] or name, name)
            found.setdefault(file_id(name), name)
    return found


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Yield the path of a file with this content, in memory if the system supports it: libsndfile reads it faster.

    The jail admits it, because it has already checked the source of the content.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("nest-audio", os.MFD_CLOEXEC)
        with open(descriptor, "wb") as file:  # noqa: PTH123  (not a path)
            file.write(content)  # buffered: a system call writes at most 2 GiB
            file.flush()
            yield Admitted(f"/proc/{os.getpid()}/fd/{descriptor}")  # with the process id, so that SoX can open it too
    else:
        with tempfile.NamedTemporaryFile(prefix="nest-audio-") as file:
            file.write(content)
            file.flush()
            yield Admitted(file.name)
