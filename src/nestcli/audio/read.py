"""Audio for whoever wants samples: a file or a part of it, whole or in blocks, at any rate.

What cannot be read raises what `inspect_audio` (inspect.py) reports.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import soundfile as sf
import soxr

from nestcli.audio.containers import states_length
from nestcli.audio.load import (
    STREAM_BLOCK,
    BadAudioError,
    Samples,
    available,
    blocks_of,
    decoder,
    read_mono,
    seek,
    words,
)
from nestcli.errors import DataError


def load_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Samples:
    """Read a file, or `duration` s of it from `offset` s on, as mono float32 at `sample_rate` Hz.

    Channels are averaged, unless one is named, from 0. Times are the file's own and truncated to its samples, as in
    NeMo's AudioSegment; the result is shorter than `duration` where the file ends before. Raises AudioError if nothing
    can be read, or if the end is reached and the file holds more audio than its header says, or less.
    """
    try:
        with decoder(os.fspath(path)) as sound:
            file_rate: int = sound.samplerate
            count = None if duration is None else int(duration * file_rate)
            sound.keep(channel)
            samples = read_mono(sound, int(offset * file_rate), count)
    except BadAudioError as bad:
        raise _data_error(path, bad.detail, bad.reason) from None
    except sf.LibsndfileError as error:
        raise _data_error(path, words(error)) from None
    return samples if file_rate == sample_rate else _resample(samples, file_rate, sample_rate)


@contextmanager
def stream_audio(
    path: str | os.PathLike[str], *, offset: float = 0.0, duration: float | None = None, channel: int | None = None
) -> Iterator[tuple[int, Iterator[Samples]]]:
    """What `load_audio` reads, in blocks of bounded size at the file's own rate in Hz, which comes first."""
    try:
        with decoder(os.fspath(path)) as sound:
            sound.keep(channel)
            start = int(offset * sound.samplerate)
            count = available(sound, start, None if duration is None else int(duration * sound.samplerate))
            if start:
                seek(sound, start)
            yield sound.samplerate, blocks_of(sound, STREAM_BLOCK // sound.channels, count)
    except BadAudioError as bad:
        raise _data_error(path, bad.detail, bad.reason) from None
    except sf.LibsndfileError as error:
        raise _data_error(path, words(error)) from None


def resampled(blocks: Iterable[Samples], rate: int, target: int) -> Iterator[Samples]:
    """Blocks at `rate` Hz as blocks at `target` Hz: to the bit what `load_audio` makes of them in one go."""
    if rate == target:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    given = made = 0
    for block in blocks:
        given += len(block)
        piece = stream.resample_chunk(block)
        made += len(piece)
        yield piece
    length = math.ceil(given * (target / rate))
    last = stream.resample_chunk(np.zeros(0, np.float32), last=True)[: length - made]
    yield np.pad(last, (0, length - made - len(last)))


def audio_duration(path: str | os.PathLike[str]) -> tuple[float | None, str, str]:
    """The seconds that a file's header states, or None, why there are none and the reason of that.

    What states no length is decoded.
    """
    try:
        with decoder(os.fspath(path)) as sound:
            stated: int = sound.frames
            frames = stated if states_length(sound) else sum(map(len, blocks_of(sound, STREAM_BLOCK, stated)))
            return frames / sound.samplerate, "", ""
    except (BadAudioError, OSError, sf.LibsndfileError) as error:
        return None, str(error), getattr(error, "reason", "unreadable")


def audio_header(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Rate in Hz, channels, and frames, as a file's header states them. Raises DataError."""
    try:
        with decoder(os.fspath(path)) as sound:
            return sound.samplerate, sound.channels, sound.frames
    except BadAudioError as bad:
        raise _data_error(path, bad.detail, bad.reason) from None


class AudioError(DataError):
    """Audio that cannot be used, for one of the reasons of `inspect_audio`."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: Exception) -> str:
    """The reason of an AudioError; "unreadable" for others, which have none."""
    return error.reason if isinstance(error, AudioError) else "unreadable"


def _data_error(path: str | os.PathLike[str], why: str, reason: str = "unreadable") -> AudioError:
    return AudioError(f"{os.fspath(path)}: {why}. Run `nest prepare-data`: it finds and leaves out such files.", reason)


def _resample(samples: Samples, rate: int, target: int) -> Samples:
    """Resample by soxr to the length that librosa, NeMo's way to soxr, would give."""
    length = math.ceil(len(samples) * (target / rate))
    resampled: Samples = soxr.resample(samples, rate, target, quality="HQ")
    if len(resampled) < length:
        return np.pad(resampled, (0, length - len(resampled)))
    return resampled[:length]
