"""Pictures of augmented utterances: clean speech, the added sound, and the mixture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestcli.audio.load import Samples, load_audio
from nestcli.data.manifest import Entry
from nestcli.data.utterance_audio import read_audio
from nestcli.errors import DataError
from nestcli.pictures import ORANGE, new_figure, save, styled, words

_N_FFT, _HOP = 512, 160  # samples
_RANGE_DB = 70.0
_COLOURS = 64
_LETTERS = 150  # letters of a label that fit into the width of a panel


def draw_previews(
    manifest: Path, folder: Path, count: int, sample_rate: int, tell: Callable[[str], None] = lambda note: None
) -> list[Path]:
    """Draw the first `count` utterances of an augmented manifest that were changed: 01.png, 02.png, ...

    `tell` receives one sentence if no font has some letters of the labels.
    """
    drawn: list[Path] = []
    notes: list[str] = []
    folder.mkdir(exist_ok=True)
    with manifest.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if len(drawn) == count:
                break
            if row["augmentation"]["mode"] != "none":
                drawn.append(folder / f"{len(drawn) + 1:02d}.png")
                notes.append(draw_preview(drawn[-1], row, sample_rate))
    for note in list(filter(None, notes))[:1]:
        tell(note)
    return drawn


@styled()
def draw_preview(path: Path, row: Mapping[str, Any], sample_rate: int) -> str:
    """Write a PNG of three spectrograms with the mixed segments marked, from a row of an augmented manifest.

    Returns the sentence of `pictures.save` about missing letters.
    """
    done = row["augmentation"]
    clean = _clean(row, sample_rate)
    noisy = load_audio(row["audio_filepath"], sample_rate=sample_rate) / np.float32(done["scale"])
    length = min(len(clean), len(noisy))
    sounds = {"clean": clean[:length], "mixed in": noisy[:length] - clean[:length], "noisy": noisy[:length]}
    levels = {name: _levels(sound) for name, sound in sounds.items()}
    loudest = max(float(each.max()) for each in levels.values())
    figure = new_figure(10, 7.2, _title(row))
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    for axes, (name, level) in zip(panels, levels.items(), strict=True):
        axes.imshow(
            level.T,
            origin="lower",
            aspect="auto",
            interpolation="bilinear",
            extent=(0, length / sample_rate, 0, sample_rate / 2000),
            vmin=loudest - _RANGE_DB,
            vmax=loudest,
            cmap="magma",
        )
        axes.set_ylabel(f"{name}\nkHz")
        axes.spines[:].set_visible(False)
        if name != "clean":
            _mark(axes, done["segments"], sample_rate / 2000, labels=name == "mixed in")
    panels[-1].set_xlabel("seconds")
    return save(figure, path, dpi=100, colours=_COLOURS, error=DataError)


def _clean(row: Mapping[str, Any], sample_rate: int) -> Samples:
    """Read the clean utterance: a local or remote file, or a member of a shard."""
    entry = Entry(
        audio_filepath=row["clean_filepath"],
        duration=row["clean_duration"],
        offset=row["clean_offset"],
        speaker=None,
        text=None,
        lang=None,
        line=0,
        manifest="",
        shard=row.get("clean_shard"),
        channel=row.get("clean_channel"),
    )
    return read_audio(entry, sample_rate=sample_rate)


def _mark(axes: Any, segments: list[dict[str, Any]], top: float, *, labels: bool) -> None:
    """Draw a frame around each segment; if there is room, add its source and its place in the source."""
    right = axes.get_xlim()[1]
    for segment in segments:
        start, end = segment["start"], segment["start"] + segment["duration"]
        axes.axvspan(start, end, 0.004, 0.996, fill=False, edgecolor=ORANGE, linewidth=1.8)
        if labels:
            source = segment.get("speaker") or Path(segment["source"]).name
            text = f"{source}\nfrom {segment['source_offset']:.2f} s"
            room = int((end - start) / right * _LETTERS)
            lines = text.split("\n")
            text = "\n".join(words(line, room if len(line) <= room else max(0, room - 1)) for line in lines)
            axes.text(start + 0.006 * right, 0.96 * top, text, color="white", va="top", fontsize=8, clip_on=True)


def _title(row: Mapping[str, Any]) -> str:
    done = row["augmentation"]
    name = words(Path(row["clean_filepath"]).name)
    if done["mode"] == "none":
        return f"{name}: left as it is"
    what = "noise" if done["mode"] == "noise" else "other speakers"
    span = "" if done["span_ratio_db"] is None else f", {done['span_ratio_db']:+.1f} dB where it is mixed in"
    turned = f"; turned down by {-20 * math.log10(done['scale']):.1f} dB" if done["scale"] < 1 else ""
    return f"{name}\n{what} at {done['ratio_db']:+.1f} dB over the clip{span}{turned}"


def _levels(sound: Samples) -> npt.NDArray[np.float32]:
    """Return the spectrogram in dB (frames, bins)."""
    padded = np.pad(sound, _N_FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT)[::_HOP]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(_N_FFT).astype(np.float32), axis=1))
    return (20 * np.log10(np.maximum(spectrum, 1e-7))).astype(np.float32)
