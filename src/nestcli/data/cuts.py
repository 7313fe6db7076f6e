"""Lhotse's cuts, read without Lhotse: no command, address, pickle or transform in them is followed."""

from __future__ import annotations

from typing import Any

_HARMLESS = {"Resample"}  # the loader resamples anyway; other transforms would change what is heard


def looks_like_cut(record: dict[str, Any]) -> bool:
    return "recording" in record or str(record.get("type", "")).endswith("Cut")


def cut_to_row(cut: dict[str, Any]) -> dict[str, Any]:
    """Turn a MonoCut of one audio file into a row of a NeMo manifest; raises ValueError for any other."""
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise ValueError(f"a {str(kind)[:60]} cannot be read; save its audio with Lhotse's save_audios, as MonoCuts")
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise ValueError("this cut has no recording, only features; nest reads audio")
    row = {
        "audio_filepath": _audio_file(recording),
        "duration": cut.get("duration"),
        "offset": cut.get("start", 0.0),
        **supervision(cut.get("supervisions")),
    }
    return {key: value for key, value in row.items() if value is not None}


def recording_to_row(recording: dict[str, Any]) -> dict[str, Any]:
    """Turn a Lhotse recording of one audio file into a row of a NeMo manifest; raises ValueError for any other."""
    return {"audio_filepath": _audio_file(recording), "id": str(recording.get("id", ""))}


def _audio_file(recording: dict[str, Any]) -> str:
    """The path of the recording's only source, which must be a file of one channel without transforms."""
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise ValueError("the recording must have one source")
    source = sources[0]
    if source.get("type") != "file":
        raise ValueError(f"a source of type {str(source.get('type'))[:60]!r} is refused; only files are read")
    channels = source.get("channels")
    if isinstance(channels, list) and len(channels) > 1:
        raise ValueError(f"the recording has {len(channels)} channels; save the cut's own channel as a file")
    transforms = recording.get("transforms") or []
    if not isinstance(transforms, list):
        raise ValueError("the recording's transforms are no list")
    names = [str(each.get("name") if isinstance(each, dict) else each) for each in transforms]
    if unknown := [name for name in names if name not in _HARMLESS]:
        raise ValueError(f"the recording has the transform {unknown[0]}; save the changed audio first")
    path = source.get("source")
    if not isinstance(path, str):
        raise ValueError("the recording's source names no file")
    return path


def supervision(supervisions: Any) -> dict[str, Any]:
    """Speaker and language where all supervisions agree on one, and their texts in a row. Raises ValueError."""
    if not isinstance(supervisions or [], list):
        raise ValueError("the cut's supervisions are no list")
    known = [each for each in supervisions or [] if isinstance(each, dict)]
    row: dict[str, Any] = {}
    for key, theirs in (("speaker", "speaker"), ("lang", "language")):
        values = {str(each[theirs]) for each in known if each.get(theirs)}
        if len(values) == 1:
            row[key] = values.pop()
    if texts := [str(each["text"]) for each in known if each.get("text")]:
        row["text"] = " ".join(texts)
    return row
