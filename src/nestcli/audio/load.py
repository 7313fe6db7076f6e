"""Open audio files with all checks, and decode them block by block.

libsndfile decodes through a descriptor that is known to belong to a regular file. It decodes in blocks, so that no
header decides how much memory is used. SoX, if installed, decodes what libsndfile cannot.
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
_MOST_CHANNELS = 1 << 16  # channel numbers must be smaller

RATES = (1_000, 768_000)  # Hz
MAX_CHANNELS = 32
MAX_LOADED = 1 << 28  # frames of one utterance: 4 hours and 40 minutes at 16 kHz, a gigabyte of memory
END_SLACK = 0.5  # s: an excerpt that ends this close to the end of the file is checked like the whole file
STREAM_BLOCK = 1 << 18  # samples over all channels, for files that are streamed

_LOAD_BLOCK = 1 << 23  # samples over all channels decoded at once: 32 MiB, more than a minute of 48 kHz stereo
_UNRECOGNISED = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
_MP3_PREROLL = 12 * 1152  # frames; after a seek, libmpg123 decoded 4,805 samples wrongly (measured)


class Sound(sf.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """An open file that is read sequentially.

    soundfile seeks to its own position after every read. This is slow, and it spoils MP3: the decoder forgets the
    earlier frames that the next ones refer to. soundfile does not do this with a file that says it cannot seek.
    """

    channel: int | None = None  # the channel to keep; None for the average of all

    def seekable(self) -> bool:
        return False

    def keep(self, channel: int | None) -> None:
        if channel is not None and not 0 <= channel < self.channels:
            raise BadAudioError(
                "no_such_channel",
                f"channel {channel} does not exist: the file has {self.channels}, from 0; choose another, or none",
            )
        self.channel = channel


class BadAudioError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def decoder_message(error: sf.LibsndfileError) -> str:
    text: str = error.error_string
    return text.removeprefix("Error : ").rstrip(".")


# --- public functions


def load_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Samples:
    """Read a file, or `duration` s of it from `offset` s on, as mono float32 at `sample_rate` Hz.

    Channels are averaged unless `channel` names one (from 0). Times are converted to frames at the file's own rate and
    truncated, as in NeMo's AudioSegment. The result is shorter than `duration` if the file ends earlier. Raises
    AudioError if nothing can be read, or if the read reaches the end and the file holds more or less audio than its
    header declares.
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
    """Yield the file's own rate in Hz, and the samples of `load_audio` at that rate as blocks of bounded size."""
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
    """Resample blocks from `rate` to `target` Hz, bit-identical to what `load_audio` computes in one piece."""
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
    """Return the duration in s that a file's header states, or None; then the detail and the reason of a failure.

    A file that states no length is decoded.
    """
    try:
        with decoder(os.fspath(path)) as sound:
            stated: int = sound.frames
            frames = stated if states_length(sound) else sum(map(len, blocks_of(sound, STREAM_BLOCK, stated)))
            return frames / sound.samplerate, "", ""
    except (BadAudioError, OSError, sf.LibsndfileError) as error:
        return None, str(error), getattr(error, "reason", "unreadable")


def audio_header(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Return rate in Hz, number of channels and number of frames from a file's header. Raises DataError."""
    try:
        with decoder(os.fspath(path)) as sound:
            return sound.samplerate, sound.channels, sound.frames
    except BadAudioError as bad:
        raise _data_error(path, bad.detail, bad.reason) from None


class AudioError(DataError):
    """Audio cannot be used, for one of the reasons that `inspect_audio` lists."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def reason_of(error: Exception) -> str:
    """Return the reason of an AudioError, or "unreadable" for other errors, which have none."""
    return error.reason if isinstance(error, AudioError) else "unreadable"


def _data_error(path: str | os.PathLike[str], why: str, reason: str = "unreadable") -> AudioError:
    return AudioError(f"{os.fspath(path)}: {why}. Run `nest prepare-data`: it finds and leaves out such files.", reason)


def _resample(samples: Samples, rate: int, target: int) -> Samples:
    """Resample with soxr to the length that librosa, through which NeMo calls soxr, would give."""
    length = math.ceil(len(samples) * (target / rate))
    resampled: Samples = soxr.resample(samples, rate, target, quality="HQ")
    if len(resampled) < length:
        return np.pad(resampled, (0, length - len(resampled)))
    return resampled[:length]


# --- opening


@contextmanager
def decoder(path: str) -> Iterator[Sound]:
    """Open a regular file with libsndfile, or else with SoX. Raises BadAudioError."""
    if allowed_folders.VARIABLE in os.environ and (why := allowed_folders.outside(path)):
        raise BadAudioError(allowed_folders.REASON, why)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not hang on a FIFO
    except (FileNotFoundError, NotADirectoryError):
        raise BadAudioError("missing", "no such file; correct its path, or mount its disk") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # the path is a socket
            _check_regular(os.stat(path))  # noqa: PTH116
        why = getattr(error, "strerror", None) or str(error)
        raise BadAudioError(
            "unreadable", f"it cannot be opened ({why}); fix its permissions, its name or its link"
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
            "bad_rate",
            f"its rate of {sound.samplerate} Hz is not between {lowest} and {highest} Hz; fix the header, or {CONVERT}",
        )
    if sound.channels > MAX_CHANNELS:
        detail = f"{sound.channels} channels are more than {MAX_CHANNELS}"
        remedy = "take one of them with `ffmpeg -i FILE -af 'pan=mono|c0=c0' FILE.flac`"
        raise BadAudioError("too_many_channels", f"{detail}; {remedy}")
    if sound.format not in READ_FORMATS:
        raise BadAudioError(
            "unreadable",
            f"the format {sound.format} does not show whether a file is whole; convert it with SoX or ffmpeg, "
            "for example with `sox FILE FILE.wav` or `ffmpeg -i FILE FILE.flac`",
        )
    return sound


# --- decoding


def read_mono(sound: Sound, start: int, count: int | None) -> Samples:
    """Decode `count` frames from `start`, or as many as there are.

    Raises BadAudioError, also if this reaches the end and the file holds more or less than its header declares.
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
    """Distinguish a file that ends too early from one that is damaged inside, by where the decoder stopped."""
    if isinstance(sound.name, int) and os.lseek(sound.name, 0, os.SEEK_CUR) >= os.fstat(sound.name).st_size:
        return "truncated", f"the file ends in the middle of its audio ({decoder_message(error)}); {RECOVER}"
    return "unreadable", f"the audio is damaged ({decoder_message(error)}); {RECOVER}"


def check_length(sound: Sound, frames: int) -> None:
    """Raise BadAudioError if a file holds more or less than what was decoded up to the frame `frames`."""
    reason, detail = length_fault(sound, frames)
    if reason:
        raise BadAudioError(reason, detail)


def stated_slack(seconds: float) -> float:
    """Return by how many s a stated duration may exceed the real one: durations are rounded, codecs pad."""
    return min(0.5, 0.1 + 0.05 * seconds)


def _too_long(sound: Sound) -> BadAudioError:
    most = MAX_LOADED / sound.samplerate
    return BadAudioError("too_long", f"more than {most:,.0f} s were requested in one piece; cut it with --segment")


def available(sound: Sound, start: int, count: int | None) -> int:
    """Return how many of `count` frames exist from `start`. Raises BadAudioError if none do."""
    left = sound.frames - start
    count = left if count is None else min(count, left)
    if count <= 0:
        check_length(sound, sound.frames)
        begin, end = start / sound.samplerate, sound.frames / sound.samplerate
        raise BadAudioError("empty", f"there is no audio to read at {begin:g} s: the file lasts {end:g} s")
    return count


def seek(sound: Sound, start: int) -> None:
    """Move to a frame so that decoding from there gives the same samples as decoding from the beginning."""
    preroll = min(start, _MP3_PREROLL) if sound.format == "MP3" else 0
    sound.seek(start - preroll)
    if preroll:
        sound.read(preroll, dtype="float32")


def blocks_of(sound: Sound, size: int, count: int) -> Iterator[Samples]:
    """Decode `count` frames, or fewer if the file ends, in mono blocks of at most `size` frames."""
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
    samples *= 1 / 32768  # bit-identical to libsndfile's float32, in half the time
    return _one_channel(samples, sound.channel)


def _one_channel(samples: Samples, channel: int | None) -> Samples:
    return _average(samples) if channel is None or samples.ndim == 1 else samples[:, channel].copy()


def _average(samples: Samples) -> Samples:
    """Average channels: (frames,) or (frames, channels) -> (frames,); eight times as fast as numpy's mean here."""
    if samples.ndim == 1:
        return samples
    total = samples[:, 0].copy()
    with np.errstate(all="ignore"):  # callers that care report values that are not finite
        for channel in range(1, samples.shape[1]):
            total += samples[:, channel]
        total /= samples.shape[1]
    return total


# --- choice of a channel


def parsed_channel(value: Any) -> Channel | None:
    """Return the channel that a `channel_selector` means: a number from 0, "average", or None for null.

    A list of one number means that number, as in NeMo. Raises ValueError for anything else.
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
    """Return the number of the channel to keep, or None for the average; an utterance's own choice comes first."""
    channel = default if own is None else own
    return None if channel == "average" else channel
