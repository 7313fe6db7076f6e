"""Every way to read audio, and every way in which a file can be bad.

libsndfile decodes through a descriptor that was checked to belong to a regular file, block by block, so that
no header decides how much memory is taken; SoX, where it is installed, decodes what libsndfile cannot. Both
ways in share the checks: `load_audio` raises what `inspect_audio` reports.
"""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile as sf
import soxr

from nestcli.data import jail
from nestcli.data.containers import missing_audio, states_length, undeclared_audio
from nestcli.data.sox import UnreadableError, decoded_by_sox
from nestcli.errors import DataError

Samples = npt.NDArray[np.float32]

RATES = (1_000, 768_000)  # Hz
MAX_CHANNELS = 32
MAX_LOADED = 1 << 28  # frames of one utterance: 4 hours and 40 minutes at 16 kHz, a gigabyte of memory
_ALWAYS_READ, _MOST_PER_BYTE, _MOST_OF_FLAC = 1 << 25, 500, 64  # samples: megabytes can hold months of silence
SILENCE_DB = -100.0  # RMS in dBFS; one bit of 16 is -90
_FULL_SCALE = {"PCM_U8": 127 / 128, "PCM_S8": 127 / 128, "ULAW": 32124 / 32768, "ALAW": 32256 / 32768}
_OF_OTHERS = 0.999  # 16 bits end at 0.99997
_CLIPPED_RUN = 3  # samples in a row at full scale; a loud but whole signal has one or two at its peaks

_LOAD_BLOCK = 1 << 23  # samples of all channels decoded in one go: 32 MiB, a minute of 48 kHz stereo
_INSPECT_BLOCK = 1 << 18
_UNRECOGNISED = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT
_MP3_PREROLL = 12 * 1152  # frames: after a seek libmpg123 was seen to decode 4,805 samples wrongly


@dataclass(frozen=True, slots=True)
class AudioReport:
    """What decoding a whole file showed; `reason` is None for a good one.

    `frames` were decoded at `sample_rate` Hz and last `duration` s. `peak` and `rms_db` (dBFS) are those of
    the average of the channels, which is what `load_audio` returns. `clipped` is the share of samples in runs at full
    scale, `digest` a hash of the samples and their rate. `detail` says in words what is wrong.
    """

    sample_rate: int = 0
    channels: int = 0
    frames: int = 0
    duration: float = 0.0
    peak: float = 0.0
    rms_db: float = -math.inf
    clipped: float = 0.0
    digest: str = ""
    reason: str | None = None
    detail: str = ""


class _Sound(sf.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """An open file that is read straight on.

    soundfile seeks to where it is after every read, which is slow, and spoils MP3: the decoder forgets the
    earlier frames that the next ones refer to. It does not where a file says that it cannot seek.
    """

    channel: int | None = None  # the one that is kept; None for the average of all

    def seekable(self) -> bool:
        return False

    def keep(self, channel: int | None) -> None:
        if channel is not None and not 0 <= channel < self.channels:
            raise _BadAudioError("no_such_channel", f"there is no channel {channel}: there are {self.channels}, from 0")
        self.channel = channel


class _BadAudioError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


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
    NeMo's AudioSegment; the result is shorter than `duration` where the file ends before. Raises DataError if nothing
    can be read.
    """
    try:
        with _decoder(os.fspath(path)) as sound:
            file_rate: int = sound.samplerate
            count = None if duration is None else int(duration * file_rate)
            sound.keep(channel)
            samples = _read_mono(sound, int(offset * file_rate), count)
    except _BadAudioError as bad:
        raise _data_error(path, bad.detail) from None
    except sf.LibsndfileError as error:
        raise _data_error(path, _words(error)) from None
    return samples if file_rate == sample_rate else _resample(samples, file_rate, sample_rate)


@contextmanager
def stream_audio(
    path: str | os.PathLike[str], *, offset: float = 0.0, duration: float | None = None, channel: int | None = None
) -> Iterator[tuple[int, Iterator[Samples]]]:
    """What `load_audio` reads, in blocks of bounded size at the file's own rate in Hz, which comes first."""
    try:
        with _decoder(os.fspath(path)) as sound:
            sound.keep(channel)
            start = int(offset * sound.samplerate)
            count = _available(sound, start, None if duration is None else int(duration * sound.samplerate))
            if start:
                _seek(sound, start)
            yield sound.samplerate, _blocks(sound, _INSPECT_BLOCK // sound.channels, count)
    except _BadAudioError as bad:
        raise _data_error(path, bad.detail) from None
    except sf.LibsndfileError as error:
        raise _data_error(path, _words(error)) from None


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


def audio_duration(path: str | os.PathLike[str]) -> tuple[float | None, str]:
    """The seconds that a file's header states, or None and why there are none; decoded is what states none."""
    try:
        with _decoder(os.fspath(path)) as sound:
            stated: int = sound.frames
            frames = stated if states_length(sound) else sum(map(len, _blocks(sound, _INSPECT_BLOCK, stated)))
            return frames / sound.samplerate, ""
    except (_BadAudioError, OSError, sf.LibsndfileError) as error:
        return None, str(error)


def audio_header(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Rate in Hz, channels, and frames, as a file's header states them. Raises DataError."""
    try:
        with _decoder(os.fspath(path)) as sound:
            return sound.samplerate, sound.channels, sound.frames
    except _BadAudioError as bad:
        raise _data_error(path, bad.detail) from None


def inspect_audio(path: str | os.PathLike[str]) -> AudioReport:
    """Decode a whole file in bounded memory and report the first thing that is wrong with it.

    Reasons: outside_jail, missing, not_a_file, empty, unreadable, bad_rate, too_many_channels, not_finite,
    truncated, silent. Raises nothing.
    """
    path = os.fspath(path)
    try:
        with _decoder(path) as sound:
            return _inspect(path, sound)
    except _BadAudioError as bad:
        return AudioReport(reason=bad.reason, detail=bad.detail)
    except (OSError, sf.LibsndfileError) as error:  # the file goes away, or its disk does, while it is read
        return AudioReport(reason="unreadable", detail=str(error))


def _data_error(path: str | os.PathLike[str], why: str) -> DataError:
    return DataError(f"{os.fspath(path)}: {why}. Run `nest prepare-data`: it finds and leaves out such files.")


def _words(error: sf.LibsndfileError) -> str:
    text: str = error.error_string
    return text.removeprefix("Error : ").rstrip(".")


# --- opening


@contextmanager
def _decoder(path: str) -> Iterator[_Sound]:
    """Open a regular file with libsndfile, else with SoX; raises _BadAudioError."""
    if why := jail.outside(path):
        raise _BadAudioError(jail.REASON, why)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not hang on a FIFO
    except (FileNotFoundError, NotADirectoryError):
        raise _BadAudioError("missing", "there is no such file") from None
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # what opening a socket gives
            _check_regular(os.stat(path))  # noqa: PTH116
        raise _BadAudioError("unreadable", getattr(error, "strerror", None) or str(error)) from None
    try:
        _check_regular(os.fstat(descriptor))
        try:
            sound = _Sound(descriptor, closefd=False)
        except sf.LibsndfileError as error:
            if error.code != _UNRECOGNISED:
                raise _BadAudioError("unreadable", _words(error)) from None
        else:
            with sound:
                yield _checked(sound)
            return
    finally:
        os.close(descriptor)
    try:
        with decoded_by_sox(path) as copy, _Sound(copy) as sound:
            yield _checked(sound)
    except UnreadableError as error:
        raise _BadAudioError("unreadable", str(error)) from None


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _BadAudioError("not_a_file", "this is a folder, a pipe, a socket or a device, not a file")
    if status.st_size == 0:
        raise _BadAudioError("empty", "the file has no bytes")


def _checked(sound: _Sound) -> _Sound:
    lowest, highest = RATES
    if not lowest <= sound.samplerate <= highest:
        raise _BadAudioError("bad_rate", f"{sound.samplerate} Hz is no rate from {lowest} to {highest} Hz")
    if sound.channels > MAX_CHANNELS:
        raise _BadAudioError("too_many_channels", f"{sound.channels} channels are more than {MAX_CHANNELS}")
    return sound


# --- decoding


def _read_mono(sound: _Sound, start: int, count: int | None) -> Samples:
    """Decode `count` frames from `start` on, or as many as there are."""
    count = _available(sound, start, count)
    if count > MAX_LOADED and states_length(sound):
        raise _too_long(sound)
    count = min(count, MAX_LOADED + 1)
    if start:
        _seek(sound, start)
    limit = _LOAD_BLOCK // sound.channels
    if count <= limit:
        samples = _decode(sound, count)
    else:
        samples = np.concatenate(list(_blocks(sound, limit, count)) or [np.zeros(0, np.float32)])
    if len(samples) == 0:
        raise _BadAudioError("empty", "no audio could be decoded")
    if len(samples) > MAX_LOADED:
        raise _too_long(sound)
    return samples


def _too_long(sound: _Sound) -> _BadAudioError:
    most = MAX_LOADED / sound.samplerate
    return _BadAudioError("too_long", f"more than {most:,.0f} s are asked for in one piece; cut it with --segment")


def _available(sound: _Sound, start: int, count: int | None) -> int:
    """How many of `count` frames there are from `start` on; raises _BadAudioError for none."""
    left = sound.frames - start
    count = left if count is None else min(count, left)
    if count <= 0:
        begin, end = start / sound.samplerate, sound.frames / sound.samplerate
        raise _BadAudioError("empty", f"there is no audio to read at {begin:g} s: the file lasts {end:g} s")
    return count


def _seek(sound: _Sound, start: int) -> None:
    """Go to a frame so that the next one read is the same as if all had been read."""
    preroll = min(start, _MP3_PREROLL) if sound.format == "MP3" else 0
    sound.seek(start - preroll)
    if preroll:
        sound.read(preroll, dtype="float32")


def _blocks(sound: _Sound, size: int, count: int) -> Iterator[Samples]:
    """Decode `count` frames in mono blocks of at most `size`, until the file ends."""
    while count > 0:
        block = _decode(sound, min(size, count))
        if len(block) == 0:
            return
        yield block
        count -= len(block)


def _decode(sound: _Sound, count: int) -> Samples:
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


def _resample(samples: Samples, rate: int, target: int) -> Samples:
    """Resample by soxr to the length that librosa, NeMo's way to soxr, would give."""
    length = math.ceil(len(samples) * (target / rate))
    resampled: Samples = soxr.resample(samples, rate, target, quality="HQ")
    if len(resampled) < length:
        return np.pad(resampled, (0, length - len(resampled)))
    return resampled[:length]


# --- inspecting


def _inspect(path: str, sound: _Sound) -> AudioReport:
    """Decode all of an open file; the report of what was decoded carries the first thing that is wrong."""
    frames, peak, energy, clipped, failure = 0, 0.0, 0.0, 0, ""
    full_scale = _FULL_SCALE.get(sound.subtype, _OF_OTHERS)
    most = max(_ALWAYS_READ, (_MOST_OF_FLAC if sound.format == "FLAC" else _MOST_PER_BYTE) * Path(path).stat().st_size)
    digest = sha256(str(sound.samplerate).encode())  # processors do it: blake2b takes four times as long here
    try:
        for block in _blocks(sound, _INSPECT_BLOCK // sound.channels, sound.frames):
            frames += len(block)
            if frames * sound.channels > most:
                raise _BadAudioError("too_long", "its bytes stand for far more audio than those of a recording")
            digest.update(block.data)
            highest = max(float(block.max()), -float(block.min()))
            peak = math.nan if math.isnan(highest) else max(peak, highest)
            clipped += _clipped_samples(block, full_scale) if highest >= full_scale else 0
            with np.errstate(all="ignore"):
                energy += float(np.dot(block, block))
    except sf.LibsndfileError as error:
        failure = _words(error)
    rms_db = 10 * math.log10(energy / frames) if energy > 0 and math.isfinite(energy) else -math.inf
    if failure:
        reason, detail = _decoding_failure(path, sound, failure)
    elif undeclared := undeclared_audio(path, sound):
        reason, detail = "wrong_duration", undeclared
    else:
        reason, detail = _first_fault(path, sound, frames, peak, energy, rms_db)
    rate = sound.samplerate
    return AudioReport(
        sample_rate=rate,
        channels=sound.channels,
        frames=frames,
        duration=frames / rate,
        peak=peak,
        rms_db=rms_db,
        clipped=clipped / max(1, frames),
        digest=digest.hexdigest()[:32],
        reason=reason or None,
        detail=detail,
    )


def _clipped_samples(block: Samples, full_scale: float) -> int:
    """Samples in runs of three or more at full scale."""
    high = np.concatenate([[False], np.abs(block) >= full_scale, [False]])
    edges = np.flatnonzero(high[1:] != high[:-1])
    runs = edges[1::2] - edges[::2]
    return int(runs[runs >= _CLIPPED_RUN].sum())


def _first_fault(path: str, sound: _Sound, frames: int, peak: float, energy: float, rms_db: float) -> tuple[str, str]:
    if not math.isfinite(peak) or not math.isfinite(energy):
        return "not_finite", "some samples are not a number, infinite, or absurdly large"
    if missing := missing_audio(path, sound, frames):
        return "truncated", missing
    if frames == 0:
        return "empty", "the file has a header but no audio"
    if peak == 0:
        return "silent", "every sample is zero"
    if rms_db < SILENCE_DB:
        return "silent", f"the level is {rms_db:.0f} dBFS, below {SILENCE_DB:.0f} dBFS"
    return "", ""


def _decoding_failure(path: str, sound: _Sound, failure: str) -> tuple[str, str]:
    """Tell a file that ends too early from one that is broken in the middle, by where the decoder stopped."""
    if isinstance(sound.name, int) and os.lseek(sound.name, 0, os.SEEK_CUR) >= Path(path).stat().st_size:
        return "truncated", f"the file ends in the middle of its audio ({failure})"
    return "unreadable", f"the audio is damaged ({failure})"
