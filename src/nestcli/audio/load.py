"""An open audio file: opening it with all the checks, and decoding it block by block.

libsndfile decodes through a descriptor that was checked to belong to a regular file, in blocks, so that no header
decides how much memory is taken; SoX, where it is installed, decodes what libsndfile cannot.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soundfile as sf
import soxr

from nestcli.audio.lengths import READ_FORMATS, length_fault, states_length
from nestcli.audio.sox import CONVERT, RECOVER, UnreadableError, decoded_by_sox, unreadable
from nestcli.errors import DataError
from nestcli.storage import allowed_folders
from nestcli.storage.file_kinds import HEAD

Samples = npt.NDArray[np.float32]
Channel = int | Literal["average"]  # "average": of all channels
CHANNEL_KEY = "channel_selector"
_MOST_CHANNELS = 1 << 16  # no file has a channel of a higher number

RATES = (1_000, 768_000)  # Hz
MAX_CHANNELS = 32
MAX_LOADED = 1 << 28  # frames of one utterance: 4 hours and 40 minutes at 16 kHz, a gigabyte of memory
END_SLACK = 0.5  # s: a part that ends this close to the end of a file stands for all of it
STREAM_BLOCK = 1 << 18  # samples of all channels, where a file is walked through

_LOAD_BLOCK = 1 << 23  # samples of all channels decoded in one go: 32 MiB, a minute of 48 kHz stereo
_UNRECOGNISED = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
_MP3_PREROLL = 12 * 1152  # frames: after a seek libmpg123 was seen to decode 4,805 samples wrongly


class Sound(sf.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """An open file that is read straight on.

    soundfile seeks to where it is after every read, which is slow, and spoils MP3: the decoder forgets the
    earlier frames that the next ones refer to. It does not where a file says that it cannot seek.
    """

    channel: int | None = None  # the one that is kept; None for the average of all

    def seekable(self) -> bool:
        return False

    def keep(self, channel: int | None) -> None:
        if channel is not None and not 0 <= channel < self.channels:
            raise BadAudioError(
                "no_such_channel",
                f"there is no channel {channel}: there are {self.channels}, from 0; choose another, or none",
            )
        self.channel = channel


class BadAudioError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def decoder_message(error: sf.LibsndfileError) -> str:
    text: str = error.error_string
    return text.removeprefix("Error : ").rstrip(".")


# --- for whoever wants samples


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
        raise _data_error(path, decoder_message(error)) from None
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
        raise _data_error(path, decoder_message(error)) from None


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


# --- opening


@contextmanager
def decoder(path: str) -> Iterator[Sound]:
    """Open a regular file with libsndfile, else with SoX; raises BadAudioError."""
    if why := allowed_folders.outside(path):
        raise BadAudioError(allowed_folders.REASON, why)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not hang on a FIFO
    except (FileNotFoundError, NotADirectoryError):
        raise BadAudioError("missing", "there is no such file; correct its path, or mount its disk") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # what opening a socket gives
            _check_regular(os.stat(path))  # noqa: PTH116
        why = getattr(error, "strerror", None) or str(error)
        raise BadAudioError(
            "unreadable", f"it cannot be opened ({why}); mend its permissions, its name or its link"
        ) from None
    try:
        _check_regular(os.fstat(descriptor))
        try:
            sound = Sound(descriptor, closefd=False)
        except sf.LibsndfileError as error:
            if error.code != _UNRECOGNISED:
                raise BadAudioError(
                    "unreadable", unreadable(path, os.pread(descriptor, HEAD, 0), decoder_message(error))
                ) from None
        else:
            with sound:
                yield _checked(sound)
            return
    finally:
        os.close(descriptor)
    try:
        with decoded_by_sox(path) as copy, Sound(copy) as sound:
            yield _checked(sound)
    except UnreadableError as error:
        raise BadAudioError("unreadable", str(error)) from None


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadAudioError("not_a_file", "this is a folder, a pipe, a socket or a device, not a file; leave it out")
    if status.st_size == 0:
        raise BadAudioError("empty", "the file has no bytes; copy or record it again")


def _checked(sound: Sound) -> Sound:
    lowest, highest = RATES
    if not lowest <= sound.samplerate <= highest:
        raise BadAudioError(
            "bad_rate", f"{sound.samplerate} Hz is no rate from {lowest} to {highest} Hz; mend the header, or {CONVERT}"
        )
    if sound.channels > MAX_CHANNELS:
        detail = f"{sound.channels} channels are more than {MAX_CHANNELS}"
        remedy = "take one of them with `ffmpeg -i FILE -af 'pan=mono|c0=c0' FILE.flac`"
        raise BadAudioError("too_many_channels", f"{detail}; {remedy}")
    if sound.format not in READ_FORMATS:
        raise BadAudioError(
            "unreadable",
            f"it cannot be told whether a file in the format {sound.format} is whole; convert it with SoX or ffmpeg, "
            "for example with `sox FILE FILE.wav` or `ffmpeg -i FILE FILE.flac`",
        )
    return sound


# --- decoding


def read_mono(sound: Sound, start: int, count: int | None) -> Samples:
    """Decode `count` frames from `start` on, or as many as there are.

    Raises BadAudioError, also where this reaches the end and the file holds more than its header says, or less.
    """
    count = available(sound, start, count)
    if count > MAX_LOADED and states_length(sound):
        raise _too_long(sound)
    count = min(count, MAX_LOADED + 1)
    try:
        samples = _read(sound, start, count)
    except sf.LibsndfileError as error:
        raise BadAudioError(*decoding_failure(sound, error)) from None
    if len(samples) == 0:
        check_length(sound, start)
        raise BadAudioError("empty", f"no audio could be decoded; {CONVERT}")
    stopped = start + len(samples)
    if len(samples) < count or sound.frames - stopped <= END_SLACK * sound.samplerate:
        check_length(sound, stopped if len(samples) < count else sound.frames)
    if len(samples) > MAX_LOADED:
        raise _too_long(sound)
    return samples


def _read(sound: Sound, start: int, count: int) -> Samples:
    if start:
        seek(sound, start)
    limit = _LOAD_BLOCK // sound.channels
    if count <= limit:
        return _decode(sound, count)
    return np.concatenate(list(blocks_of(sound, limit, count)) or [np.zeros(0, np.float32)])


def decoding_failure(sound: Sound, error: sf.LibsndfileError) -> tuple[str, str]:
    """Tell a file that ends too early from one that is broken in the middle, by where the decoder stopped."""
    if isinstance(sound.name, int) and os.lseek(sound.name, 0, os.SEEK_CUR) >= os.fstat(sound.name).st_size:
        return "truncated", f"the file ends in the middle of its audio ({decoder_message(error)}); {RECOVER}"
    return "unreadable", f"the audio is damaged ({decoder_message(error)}); {RECOVER}"


def check_length(sound: Sound, frames: int) -> None:
    """Raise BadAudioError where a file holds more or less than what was decoded up to the frame `frames`."""
    reason, detail = length_fault(sound, frames)
    if reason:
        raise BadAudioError(reason, detail)


def stated_slack(seconds: float) -> float:
    """By how many seconds a manifest may promise more than there is: for rounded durations and codecs' padding."""
    return min(0.5, 0.1 + 0.05 * seconds)


def _too_long(sound: Sound) -> BadAudioError:
    most = MAX_LOADED / sound.samplerate
    return BadAudioError("too_long", f"more than {most:,.0f} s are asked for in one piece; cut it with --segment")


def available(sound: Sound, start: int, count: int | None) -> int:
    """How many of `count` frames there are from `start` on; raises BadAudioError for none."""
    left = sound.frames - start
    count = left if count is None else min(count, left)
    if count <= 0:
        check_length(sound, sound.frames)
        begin, end = start / sound.samplerate, sound.frames / sound.samplerate
        raise BadAudioError("empty", f"there is no audio to read at {begin:g} s: the file lasts {end:g} s")
    return count


def seek(sound: Sound, start: int) -> None:
    """Go to a frame so that the next one read is the same as if all had been read."""
    preroll = min(start, _MP3_PREROLL) if sound.format == "MP3" else 0
    sound.seek(start - preroll)
    if preroll:
        sound.read(preroll, dtype="float32")


def blocks_of(sound: Sound, size: int, count: int) -> Iterator[Samples]:
    """Decode `count` frames in mono blocks of at most `size`, until the file ends."""
    while count > 0:
        block = _decode(sound, min(size, count))
        if len(block) == 0:
            return
        yield block
        count -= len(block)


def _decode(sound: Sound, count: int) -> Samples:
    """Decode up to `count` frames and average the channels."""
    if sound.subtype != "PCM_16":
        return _one_channel(sound.read(count, dtype="float32"), sound.channel)
    samples: Samples = sound.read(count, dtype="int16").astype(np.float32)
    samples *= 1 / 32768  # what libsndfile computes for float32, to the bit, in half its time
    return _one_channel(samples, sound.channel)


def _one_channel(samples: Samples, channel: int | None) -> Samples:
    return _average(samples) if channel is None or samples.ndim == 1 else samples[:, channel].copy()


def _average(samples: Samples) -> Samples:
    """(frames,) or (frames, channels) -> (frames,); eight times as fast as numpy's mean over short rows."""
    if samples.ndim == 1:
        return samples
    total = samples[:, 0].copy()
    with np.errstate(all="ignore"):  # what is not finite is reported by those who look
        for channel in range(1, samples.shape[1]):
            total += samples[:, channel]
        total /= samples.shape[1]
    return total


# --- which channel


def parsed_channel(value: Any) -> Channel | None:
    """The channel that a `channel_selector` means: a number from 0, "average", or None where it is null.

    A list of one number is that number, as in NeMo. Raises ValueError for anything else.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if value == "average":
        return "average"
    if type(value) is int and 0 <= value < _MOST_CHANNELS:
        return value
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    several = "; several channels are not one signal" if isinstance(value, list | tuple) else ""
    raise ValueError(f'"{CHANNEL_KEY}" is {shown}; it must be the number of one channel, from 0, or "average"{several}')


def kept_channel(own: Channel | None, default: Channel | None) -> int | None:
    """The number of the channel to keep, None for the average of all: an utterance's own choice comes first."""
    channel = default if own is None else own
    return None if channel == "average" else channel
