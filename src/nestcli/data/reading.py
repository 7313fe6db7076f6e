"""An utterance's samples, wherever its audio stands: a loose file, a remote one, or a member of a shard."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from nestcli.data import remote
from nestcli.data.audio import AudioError, load_audio
from nestcli.data.channel import Channel, kept_channel
from nestcli.data.manifest import Entry
from nestcli.data.shards import file_id, without_sub
from nestcli.data.sound import Samples, stated_slack
from nestcli.data.tar_index import TarMembers, open_shard
from nestcli.errors import DataError

_NO_AUDIO = (".json", ".jsonl", ".txt", ".lab")  # what stands beside audio in shards, under the same name


@dataclass(frozen=True, slots=True)
class Skipped:
    """A line whose audio could not be read and is left out of its batch, and why."""

    line: str
    why: str
    audio: str = ""


def read_audio(
    entry: Entry,
    *,
    sample_rate: int,
    offset: float | None = None,
    duration: float | None = None,
    channel: Channel | None = None,
) -> Samples:
    """An entry's audio, or a part of it, as mono float32 at `sample_rate` Hz; times in seconds.

    `channel` is for entries that choose none themselves. Raises DataError if nothing can be read, or if the file holds
    less than was asked for: by more than 0.1 s and a twentieth of the length, at most 0.5 s.
    """
    start = entry.offset if offset is None else offset
    length = entry.duration if duration is None else duration
    kept = kept_channel(entry.channel, channel)
    if entry.shard is None and not remote.is_remote(entry.audio_filepath):
        samples = load_audio(entry.audio_filepath, sample_rate=sample_rate, offset=start, duration=length, channel=kept)
        return _as_promised(samples, entry, sample_rate, start, length)
    with _as_file(_content(entry)) as path:
        try:
            samples = load_audio(path, sample_rate=sample_rate, offset=start, duration=length, channel=kept)
        except AudioError as error:
            raise AudioError(str(error).replace(path, entry.name), error.reason) from None
    return _as_promised(samples, entry, sample_rate, start, length)


def _as_promised(samples: Samples, entry: Entry, sample_rate: int, start: float, length: float) -> Samples:
    held = len(samples) / sample_rate
    if length - held > stated_slack(length):
        raise AudioError(
            f"{entry.name}: the manifest promises {length:.2f} s from {start:g} s on, the file has {held:.2f} s there. "
            "Correct the manifest: `nest prepare-data` measures every file.",
            "truncated",
        )
    return samples


def _content(entry: Entry) -> bytes:
    if entry.shard is None:
        return remote.read_bytes(entry.audio_filepath)
    shard = open_shard(entry.shard)
    return shard.read(_member(shard, entry))


def _member(shard: TarMembers, entry: Entry) -> str:
    """The member that a line means: by its whole name, else as NeMo finds it, by its name without folder and ending."""
    if entry.audio_filepath in shard.members:
        return entry.audio_filepath
    wanted = file_id(entry.audio_filepath)
    by_id = _by_id(shard)
    for name in (entry.audio_filepath, wanted, without_sub(wanted)):
        if name in by_id:
            return by_id[name]
    raise DataError(f"{entry.name}: there is no such member in the shard; were manifest and tars written together?")


@lru_cache(maxsize=64)
def _by_id(shard: TarMembers) -> dict[str, str]:
    """Members by their names without ending, with and without folders."""
    found: dict[str, str] = {}
    for name in shard.members:
        if not name.endswith(_NO_AUDIO):
            found.setdefault(name.rpartition(".")[0] or name, name)
            found.setdefault(file_id(name), name)
    return found


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """The path of a file with this content, in memory where the system has such files: libsndfile reads it faster."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("nest-audio", os.MFD_CLOEXEC)
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123  (not a path)
            file.write(content)
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile(prefix="nest-audio-") as file:
            file.write(content)
            file.flush()
            yield file.name
