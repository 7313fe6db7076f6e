"""Turn the input of an evaluation (a manifest, a folder of audio, or one file) into a manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nestcli.audio.load import audio_duration
from nestcli.data.manifest import Manifest, write_manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.utterance_audio import duration_of
from nestcli.errors import DataError
from nestcli.prepare.inputs import collect, is_manifest

LISTING = "input.json"  # the manifest of a folder or a file, in the folder of results


@dataclass(frozen=True)
class Inputs:
    """The lines to process, all with a duration, and rows for inputs that were rejected beforehand."""

    manifest: Manifest
    refused: tuple[Mapping[str, Any], ...] = ()


def read_inputs(given: str | os.PathLike[str], out: Path) -> Inputs:
    """Open a manifest or Lhotse cuts, or list a folder or file into `out`. Raises DataError.

    Durations that a manifest does not state come from the files' headers.
    """
    path = Path(given)
    if path.is_file() and is_manifest(path):
        manifest = read_manifests([os.fspath(given)], require_duration=False)
        if not len(manifest):
            raise DataError(f"{given} has no lines.")
        return Inputs(_with_durations(manifest))
    rows, refused = [], []
    for item in collect([given], out).items:
        duration, why, reason = audio_duration(item.path)
        if item.refused or duration is None:
            reason = item.reason if item.refused else reason
            refused.append({"audio_filepath": item.path, "reason": reason, "detail": item.refused or why})
        else:
            known = {key: value for key, value in item.known().items() if key not in ("duration", "offset")}
            stated = duration - item.offset if np.isnan(item.duration) else item.duration
            offset = {"offset": item.offset} if item.offset else {}
            rows.append({**known, "audio_filepath": item.path, "duration": round(stated, 6), **offset})
    if not rows:
        why = f" The first: {refused[0]['audio_filepath']}: {refused[0]['detail']}." if refused else ""
        raise DataError(f"{given}: it holds no readable audio.{why}")
    write_manifest(out / LISTING, rows)
    return Inputs(read_manifests([os.fspath(out / LISTING)]), tuple(refused))


def _with_durations(manifest: Manifest) -> Manifest:
    """Give lines without a duration the length of their file from their offset on, or 0 if it is unknown."""
    missing = np.flatnonzero(np.isnan(manifest.durations))
    if not len(missing):
        return manifest
    durations = manifest.durations.copy()
    for index in missing:
        with suppress(DataError):  # the error is raised again when the line is read
            durations[index] = duration_of(manifest.entry(int(index)))
    durations = np.nan_to_num(durations)
    return replace(manifest, durations=durations)
