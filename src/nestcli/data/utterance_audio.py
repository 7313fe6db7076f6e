"""The samples of an utterance, and the noise pool: clips of noise drawn at random from a manifest.

Audio comes from a local file, a remote file, or a member of a shard.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from nestcli.audio.load import (
    AudioError,
    Channel,
    Samples,
    audio_duration,
    kept_channel,
    load_audio,
    reason_of,
    stated_slack,
)
from nestcli.data.manifest import Entry, Manifest
from nestcli.data.mixing import is_audible
from nestcli.data.tarred import file_id, without_sub
from nestcli.errors import DataError
from nestcli.files import is_remote
from nestcli.storage import addresses
from nestcli.storage.allowed_folders import Admitted
from nestcli.storage.tar_members import TarMembers, open_shard

_NO_AUDIO = (".json", ".jsonl", ".txt", ".lab")  # files beside the audio in shards, under the same name
ATTEMPTS = 20
_NEMO_PLACES = 100  # random positions to try in one file
WHITE_NOISE_DB = (-90, -46)  # replaces silent clips: an integer in dBFS, upper end excluded


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
    if entry.shard is None and not ("://" in path and is_remote(path)):
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


# ---- noise ----


@dataclass(frozen=True, slots=True)
class Clip:
    """Noise and its origin: a line of the manifest (None: generated), and the offset in its file in seconds."""

    samples: Samples
    line: int | None
    offset: float


class NoisePool:
    """Draws clips of noise: each line with the same probability, then any place in it.

    Source: NeMo `sample_noise`. Unlike NeMo, a clip stays inside the line's offset and duration, channels are averaged,
    and a clip is silent if it has no energy, not if its sum is zero. For a line without a duration, the whole file
    after its offset counts; NeMo takes the beginning of the file. Lines that cannot be read are skipped;
    `take_skipped` returns them.
    """

    def __init__(self, manifest: Manifest, sample_rate: int) -> None:
        self.manifest, self.sample_rate = manifest, sample_rate
        self._skipped: list[Skipped] = []
        self._durations = manifest.durations.copy()  # missing ones are filled in when they are looked up

    def draw(self, n_samples: int, rng: random.Random, keep: int | None = None) -> Clip:
        """Return a clip of `n_samples`, or a whole shorter line; with `keep`, only its first samples.

        Raises DataError if 20 lines in a row cannot be read.
        """
        clip: Clip | None = None
        problem: DataError | None = None
        for _ in range(ATTEMPTS):
            line = rng.randrange(len(self.manifest))
            try:
                with self.manifest.reading(line) as entry:
                    clip = self._load(entry, line, n_samples, rng, n_samples if keep is None else min(keep, n_samples))
            except DataError as error:
                problem = error
                self._skipped.append(Skipped(self.manifest.where(line), str(error), self._path(line), reason_of(error)))
                continue
            if is_audible(clip.samples):
                return clip
        if clip is None and problem is not None:
            raise DataError(f"none of {ATTEMPTS} noise files drawn can be read; the last: {problem}")
        return Clip(_white_noise(n_samples, rng)[:keep], None, 0.0)

    def draw_like_nemo(self, n_samples: int, state: np.random.RandomState) -> Clip:
        """Return the clip that NeMo's `sample_noise` draws from the same state of NumPy's generator, for mono files.

        NeMo ignores the line's offset when it draws a place, and treats a clip as silent if its sum is not above 0.
        """
        for _ in range(ATTEMPTS):
            line = int(state.randint(len(self.manifest)))
            try:
                with self.manifest.reading(line) as entry:
                    clip = self._load_like_nemo(entry, line, n_samples, state)
            except DataError as error:
                self._skipped.append(Skipped(self.manifest.where(line), str(error), self._path(line), reason_of(error)))
                continue
            if _running_sum(clip.samples) == 0:
                level_db = state.randint(*WHITE_NOISE_DB, dtype="int32")
                white = state.randn(len(clip.samples)) * (10.0 ** (level_db / 20.0))
                clip = replace(clip, samples=(clip.samples + white).astype(np.float32))
            return replace(clip, samples=clip.samples[:n_samples])
        return Clip(np.zeros(n_samples, np.float32), None, 0.0)

    def take_skipped(self) -> list[Skipped]:
        """Return the lines that could not be read since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    def _load_like_nemo(self, entry: Entry, line: int, n_samples: int, state: np.random.RandomState) -> Clip:
        wanted = n_samples / self.sample_rate
        if not entry.duration > wanted:  # also for NaN: the whole file is read, and cut afterwards
            return Clip(read_audio(entry, sample_rate=self.sample_rate), line, entry.offset)
        for _ in range(_NEMO_PLACES):
            offset = state.uniform(0, entry.duration - wanted)
            clip = Clip(read_audio(entry, sample_rate=self.sample_rate, offset=offset, duration=wanted), line, offset)
            if _running_sum(clip.samples) > 0:
                break
        return clip

    def _path(self, line: int) -> str:
        try:
            return self.manifest.entry(line).name
        except DataError:
            return ""

    def _load(self, entry: Entry, line: int, n_samples: int, rng: random.Random, keep: int) -> Clip:
        wanted = n_samples / self.sample_rate
        offset, duration = entry.offset, float(self._durations[line])
        if math.isnan(duration):
            duration = self._durations[line] = duration_of(entry)
        if duration > wanted:
            offset += rng.uniform(0, duration - wanted)
            duration = wanted
        kept = min(duration, (keep + 0.5) / self.sample_rate)  # the half protects against losing a sample to rounding
        samples = read_audio(entry, sample_rate=self.sample_rate, offset=offset, duration=kept)
        if not math.isfinite(float(samples.sum())):
            raise DataError(f"{entry.name}: some samples are not a number, or infinite. Leave it out of the manifest.")
        return Clip(samples[:keep], line, offset)


def _running_sum(samples: Samples) -> float:
    """Return the result of Python's `sum` over float32 samples, added one by one."""
    return float(np.add.accumulate(samples)[-1]) if len(samples) else 0.0


def _white_noise(n_samples: int, rng: random.Random) -> Samples:
    level_db = rng.randrange(*WHITE_NOISE_DB)
    generator = np.random.default_rng(rng.getrandbits(64))
    noise = generator.standard_normal(n_samples, dtype=np.float32)
    return noise * np.float32(10 ** (level_db / 20))
