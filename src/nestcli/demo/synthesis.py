"""Speech without downloads: espeak-ng, from the shared library inside the `espeakng-loader` package.

espeak-ng allows one engine per process: its voice, parameters and callback are C statics. Some of them (the phase
of the pitch flutter, a cycle counter) survive even `espeak_Terminate`, so that the same text would sound slightly
different each time. `Synthesizer` therefore takes a lock, loads the library for one text and unloads it again. This
costs a few ms, and the samples depend only on text and voice.

Source: espeak-ng 1.52, `speak_lib.h` and `espeak_ng.h`. Why this engine: docs/decisions/0004-demo-speech.md.
"""

from __future__ import annotations

import _ctypes
import ctypes
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

from nestcli.errors import MissingDependencyError

SAMPLE_RATE = 16_000  # Hz; independent of the engine's own rate

_INSTALL = 'Install the extra that includes it: pip install "nestcli[demo]", in the source tree ".[demo]"'
_REINSTALL = "Reinstall it: pip install --force-reinstall espeakng-loader"

_OUTPUT_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER

_NOISE_SEED = 1  # espeak_Initialize seeds the breath noise with the clock
_QUIETER = 70  # of 100: below the level at which the engine's own peak limiter distorts
_LONGEST_PATH = 150  # bytes; espeak-ng truncates longer paths in a buffer of 160, including the folder's name

_AudioCallback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Voice:
    """One speaker: a language of espeak-ng, one of its voice variants, and their settings.

    `language` names a file under `espeak-ng-data/lang`: "en-us", "de", or "en" for Great Britain. `variant`
    names one under `espeak-ng-data/voices/!v`: "m3", "f2". `pitch` and `pitch_range` range from 0 to 99; 50
    is the variant's default. `rate` is in words per minute, 80 to 450.
    """

    name: str
    language: str
    variant: str
    pitch: int = 50
    rate: int = 165
    pitch_range: int = 50


class Synthesizer:
    """Turns text into speech with espeak-ng. Several instances may exist; they take turns using the process' engine.

    Raises MissingDependencyError if the package or its library is missing or does not start.
    """

    def __init__(self) -> None:
        self._library, self._data = _locate()
        with _engine(self._library, self._data):
            pass

    def speak(self, text: str, voice: Voice) -> npt.NDArray[np.float32]:
        """Speak `text` with `voice`: mono at 16 kHz, within [-1, 1], the same samples at every call.

        Raises ValueError for a voice that espeak-ng does not have.
        """
        if not (self._data / "voices" / "!v" / voice.variant).is_file():  # espeak-ng ignores unknown ones silently
            raise ValueError(_unknown(voice, f"variant {voice.variant!r}"))
        with _engine(self._library, self._data) as (espeak, rate):
            _select(espeak, voice)
            samples = _synthesize(espeak, text)
        speech = soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLE_RATE, quality="HQ")
        return np.asarray(speech.clip(-1.0, 1.0), np.float32)


def variants() -> list[str]:
    """Return the sorted names of all voice variants. Raises MissingDependencyError as `Synthesizer` does."""
    return sorted(path.name for path in (_locate()[1] / "voices" / "!v").iterdir())


def _locate() -> tuple[Path, Path]:
    """Return the paths of the shared library and its data folder."""
    try:
        import espeakng_loader

        library, data = Path(espeakng_loader.get_library_path()), Path(espeakng_loader.get_data_path())
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(f"Synthetic speech needs espeakng-loader ({error}). {_INSTALL}") from error
    # Without its data, espeak-ng would also search $ESPEAK_DATA_PATH, $HOME and the folders of its build machine.
    for needed in (library, data / "phontab"):
        if not needed.is_file():
            raise MissingDependencyError(f"espeakng-loader is incomplete: {needed} is missing. {_REINSTALL}")
    return library, data


@contextmanager
def _engine(library: Path, data: Path) -> Iterator[tuple[ctypes.CDLL, int]]:
    """Load espeak-ng, yield it with its sampling rate in Hz, and unload it at the end."""
    with _one_at_a_time, _short_path(data) as reachable:
        try:
            espeak = ctypes.CDLL(str(library))
        except OSError as error:
            raise MissingDependencyError(f"{library} does not load ({error}). {_REINSTALL}") from error
        try:
            yield espeak, _initialize(espeak, reachable)
        finally:
            espeak.espeak_Terminate()
            _ctypes.dlclose(espeak._handle)


def _initialize(espeak: ctypes.CDLL, data: Path) -> int:
    """Start the engine and return its sampling rate in Hz."""
    path = os.fsencode(data)
    rate: int = espeak.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, path, _DONT_EXIT)
    if rate <= 0:
        raise MissingDependencyError(f"espeak-ng does not start with its data in {data}. {_REINSTALL}")
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(_NOISE_SEED))
    return rate


@contextmanager
def _short_path(data: Path) -> Iterator[Path]:
    """Yield a path to `data` that fits espeak-ng's buffer: the path itself, or a link in a temporary folder."""
    if len(os.fsencode(data)) <= _LONGEST_PATH:
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="nest-") as folder:
        link = Path(folder, "espeak-ng-data")
        link.symlink_to(data, target_is_directory=True)
        yield link


def _select(espeak: ctypes.CDLL, voice: Voice) -> None:
    if espeak.espeak_SetVoiceByName(f"{voice.language}+{voice.variant}".encode()) != 0:
        raise ValueError(_unknown(voice, f"language {voice.language!r}"))
    settings = {_RATE: voice.rate, _VOLUME: _QUIETER, _PITCH: voice.pitch, _RANGE: voice.pitch_range}
    for parameter, value in settings.items():
        espeak.espeak_SetParameter(parameter, value, 0)


def _synthesize(espeak: ctypes.CDLL, text: str) -> npt.NDArray[np.int16]:
    """Return the samples of `text` at the engine's own rate."""
    blocks = [np.zeros(0, np.int16)]

    def collect(samples: ctypes._Pointer[ctypes.c_short], n_samples: int, _events: int | None) -> int:
        if samples and n_samples > 0:
            blocks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        return 0

    callback = _AudioCallback(collect)  # the variable keeps it alive: espeak-ng holds only a raw pointer
    encoded = text.encode()
    espeak.espeak_SetSynthCallback(callback)
    espeak.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, _CHARS_UTF8, None, None)
    espeak.espeak_Synchronize()
    return np.concatenate(blocks)


def _unknown(voice: Voice, part: str) -> str:
    return f"Voice {voice.name!r}: espeak-ng has no {part}. Choose one from espeak-ng-data/lang and voices/!v."
