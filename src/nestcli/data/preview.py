"""Pictures of augmented utterances: clean speech, what was mixed in, and the mixture. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestcli.data.audio import Samples, load_audio
from nestcli.errors import MissingDependencyError

_N_FFT, _HOP = 512, 160  # samples
_RANGE_DB = 70.0
_INK, _MARK = "#22262b", "#d9702b"


def draw_preview(path: Path, row: Mapping[str, Any], sample_rate: int) -> None:
    """Write a PNG of three spectrograms with the mixed segments marked, from a row of an augmented manifest."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError('--preview needs matplotlib: run pip install "nestcli[demo]".') from None
    done = row["augmentation"]
    clean = load_audio(
        row["clean_filepath"],
        sample_rate=sample_rate,
        offset=row.get("clean_offset", 0.0),
        duration=row.get("clean_duration"),
    )
    noisy = load_audio(row["audio_filepath"], sample_rate=sample_rate)
    length = min(len(clean), len(noisy))
    clean, noisy = clean[:length], noisy[:length]
    mixed = noisy / np.float32(done.get("scale", 1.0)) - clean
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(_title(row), color=_INK, fontsize=12)
    panels = figure.subplots(3, 1, sharex=True)
    loudest = max(float(_levels(sound).max()) for sound in (clean, noisy))
    for axes, sound, name in zip(panels, (clean, mixed, noisy), ("clean", "mixed in", "result"), strict=True):
        axes.imshow(
            _levels(sound).T,
            origin="lower",
            aspect="auto",
            extent=(0, length / sample_rate, 0, sample_rate / 2000),
            vmin=loudest - _RANGE_DB,
            vmax=loudest,
            cmap="magma",
        )
        axes.set_ylabel(f"{name}\nkHz", color=_INK)
        for segment in done.get("segments", []):
            end = segment["start"] + segment["duration"]
            axes.axvspan(segment["start"], end, fill=False, edgecolor=_MARK, linewidth=2)
    for segment in done.get("segments", []):
        label = segment.get("speaker") or Path(segment["source"]).name
        panels[1].text(
            segment["start"], sample_rate / 2000, f" {label}", color="white", va="top", fontsize=8, clip_on=True
        )
    panels[-1].set_xlabel("seconds", color=_INK)
    figure.savefig(path, dpi=110)


def _title(row: Mapping[str, Any]) -> str:
    done = row["augmentation"]
    name = Path(row["clean_filepath"]).name
    if done["mode"] == "none":
        return f"{name}: left as it is"
    turned = f", turned down to {done['scale']:.2f}" if done["scale"] < 1 else ""
    return f"{name}: {done['mode']} at {done['ratio_db']:+.1f} dB{turned}"


def _levels(sound: Samples) -> npt.NDArray[np.float32]:
    """(frames, bins) in dB."""
    padded = np.pad(sound, _N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT)[::_HOP]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(_N_FFT).astype(np.float32), axis=1))
    return (20 * np.log10(np.maximum(spectrum, 1e-7))).astype(np.float32)
