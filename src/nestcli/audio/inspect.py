"""Find any fault of an audio file by decoding the whole file in bounded memory."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile as sf

from nestcli.audio.lengths import length_fault
from nestcli.audio.load import STREAM_BLOCK, BadAudioError, Samples, Sound, blocks_of, decoder, decoding_failure

_MOST_SCALE = 16.0  # 24 dB above full scale; float samples that were merely amplified too much stay below it
_AUDIBLE = 1e-4  # -80 dBFS: the peak of a channel that is not silent
SILENCE_DB = -100.0  # RMS in dBFS; the lowest of 16 bits is at -90
_ALWAYS_READ, _MOST_PER_BYTE, _MOST_OF_FLAC = 1 << 25, 500, 64  # samples: a few megabytes can hold months of silence
_FULL_SCALE = {"PCM_U8": 127 / 128, "PCM_S8": 127 / 128, "ULAW": 32124 / 32768, "ALAW": 32256 / 32768}
_OF_OTHERS = 0.999  # full scale of other formats; 16-bit samples end at 0.99997
_CLIPPED_RUN = 3  # samples in a row at full scale; a loud but unclipped signal has one or two at its peaks


@dataclass(frozen=True, slots=True)
class AudioReport:
    """Result of decoding a whole file; `reason` is None if the file is good.

    `frames` were decoded at `sample_rate` Hz and last `duration` s. `peak` and `rms_db` (dBFS) describe the chosen
    channel, or the average of all channels, which is what `load_audio` returns. `clipped` is the share of samples
    in runs at full scale. `digest` is a hash of the samples and their rate. `detail` says in words what is wrong.
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


def inspect_audio(path: str | os.PathLike[str], channel: int | None = None) -> AudioReport:
    """Decode a whole file in bounded memory and report the first fault found.

    Faults of the signal, as opposed to faults of the file itself, are judged on `channel` (from 0), or on the average
    of all channels if it is None. Raises nothing.

    Possible reasons: outside_jail, missing, not_a_file, empty, unreadable, bad_rate, too_many_channels,
    no_such_channel, not_finite, truncated, wrong_duration, too_long, wrong_scale, silent.
    """
    path = os.fspath(path)
    try:
        with decoder(path) as sound:
            sound.keep(channel)
            return _inspect(path, sound)
    except BadAudioError as bad:
        return AudioReport(reason=bad.reason, detail=bad.detail)
    except (OSError, sf.LibsndfileError) as error:  # the file or its disk disappears while it is read
        return AudioReport(reason="unreadable", detail=str(error))


def _inspect(path: str, sound: Sound) -> AudioReport:
    """Decode a whole open file; the report describes the decoded part and carries the first fault."""
    frames, peak, energy, clipped = 0, 0.0, 0.0, 0
    failure: sf.LibsndfileError | None = None
    full_scale = _FULL_SCALE.get(sound.subtype, _OF_OTHERS)
    most = max(_ALWAYS_READ, (_MOST_OF_FLAC if sound.format == "FLAC" else _MOST_PER_BYTE) * Path(path).stat().st_size)
    digest = sha256(str(sound.samplerate).encode())  # in hardware; blake2b takes four times as long here
    try:
        for block in blocks_of(sound, STREAM_BLOCK // sound.channels, sound.frames):
            frames += len(block)
            if frames * sound.channels > most:
                raise BadAudioError(
                    "too_long", "it decodes to far more audio than a recording of its size can hold; leave it out"
                )
            digest.update(block.data)
            highest = max(float(block.max()), -float(block.min()))
            peak = math.nan if math.isnan(highest) else max(peak, highest)
            clipped += _clipped_samples(block, full_scale) if highest >= full_scale else 0
            with np.errstate(all="ignore"):
                energy += float(np.dot(block, block))
    except sf.LibsndfileError as error:
        failure = error
    rms_db = 10 * math.log10(energy / frames) if energy > 0 and math.isfinite(energy) else -math.inf
    if failure:
        reason, detail = decoding_failure(sound, failure)
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
    """Return the number of samples in runs of three or more at full scale."""
    high = np.concatenate([[False], np.abs(block) >= full_scale, [False]])
    edges = np.flatnonzero(high[1:] != high[:-1])
    runs = edges[1::2] - edges[::2]
    return int(runs[runs >= _CLIPPED_RUN].sum())


def _first_fault(path: str, sound: Sound, frames: int, peak: float, energy: float, rms_db: float) -> tuple[str, str]:
    if not math.isfinite(peak) or not math.isfinite(energy):
        return (
            "not_finite",
            "some samples are not a number, infinite, or absurdly large; leave the file out, or write it again",
        )
    if (fault := length_fault(sound, frames)) != ("", ""):
        return fault
    if frames == 0:
        return "empty", "the file has a header but no audio; copy or record it again"
    if peak > _MOST_SCALE:
        return "wrong_scale", _scale(peak)
    if peak == 0 or rms_db < SILENCE_DB:
        level = "every sample is zero" if peak == 0 else f"the level is {rms_db:.0f} dBFS, below {SILENCE_DB:.0f} dBFS"
        return "silent", _cancelled(path, sound) or level
    return "", ""


def _scale(peak: float) -> str:
    """Say by which factor the samples probably have to be divided."""
    full = next((1 << bits for bits in (7, 15, 23, 31) if peak <= 1 << bits), None)
    if full is None:
        return f"its samples reach {peak:.3g}, where full scale is 1; write it again from its source"
    command = f"ffmpeg -i FILE -af volume=1/{full} FILE.flac"
    return f"its samples reach {peak:.0f}, where full scale is 1; divide them by {full}: `{command}`"


def _cancelled(path: str, sound: Sound) -> str:
    """Say which channel is not silent although the average of all channels is; empty if all are silent."""
    for channel in range(sound.channels if sound.channel is None and sound.channels > 1 else 0):
        with decoder(path) as again:
            again.keep(channel)
            blocks = blocks_of(again, STREAM_BLOCK // again.channels, again.frames)
            if any(float(np.abs(block).max()) >= _AUDIBLE for block in blocks):
                return (
                    f"the {sound.channels} channels cancel each other: their average is silent, channel {channel} is "
                    f"not; take one channel with `--channel {channel}`"
                )
    return ""
