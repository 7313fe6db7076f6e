"""Measure the loader's time by stage."""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from types import FrameType, TracebackType

_EVERY = 0.0007  # sampling interval in s; an odd value does not coincide with regular events
_FUNCTIONS = {
    ("data/utterance_audio.py", "draw"): "noise",
    ("data/utterance_audio.py", "draw_like_nemo"): "noise",
    ("data/dataset.py", "collate"): "collate",
    ("data/dataset.py", "_mixed"): "mix",
}
_READING = ("manifest entry", "open", "decode", "resample")
STAGES = (
    "manifest entry", "open", "decode", "resample", "noise: manifest entry", "noise: open", "noise: decode",
    "noise: resample", "noise", "collate", "mix", "other",
)  # fmt: skip


class StageClock:
    """A sampling profiler: every 0.7 ms it adds the time since the last sample to the current stage of the main thread.

    A profiler that counts every call would make small calls look slow. This class depends on the names of a few
    modules and functions only, so that other code can change freely. `seconds` holds the time inside the `with` block
    by stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = 0.0

    def __enter__(self) -> StageClock:
        self._before = signal.signal(signal.SIGALRM, self._look)
        self._last = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, _EVERY, _EVERY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)

    def _look(self, _number: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        self.seconds[stage_of(frame)] += now - self._last
        self._last = now


def stage_of(frame: FrameType | None) -> str:
    """Return the stage of the innermost frame that has one."""
    stage = ""
    while frame is not None:
        found = _stage_of_code(frame.f_code.co_filename, frame.f_code.co_name)
        if found == "noise":
            return f"noise: {stage}" if stage in _READING else "noise"
        stage = stage or found
        frame = frame.f_back
    return stage or "other"


def _stage_of_code(file: str, function: str) -> str:
    if file.endswith(("/soundfile.py", "audio/load.py")):
        if "resample" in function:
            return "resample"
        decodes = function in ("read", "_array_io", "_cdata_io", "_create_empty_array", "_check_frames")
        return "decode" if decodes or "decode" in function or "average" in function else "open"
    if file.endswith("soxr/__init__.py"):
        return "resample"
    module = file.rpartition("nestcli/")[2]
    return "manifest entry" if module == "data/manifest.py" else _FUNCTIONS.get((module, function), "")
