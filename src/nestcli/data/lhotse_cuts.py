"""Lhotse's cuts, read without Lhotse. Commands, addresses, pickles and transforms in them are never followed."""

from __future__ import annotations

from typing import Any

from nestcli.audio.load import CHANNEL_KEY

_HARMLESS = {"Resample"}  # the loader resamples anyway; other transforms would change the sound


def looks_like_cut(record: dict[str, Any]) -> bool:
    return "recording" in record or str(record.get("type", "")).endswith("Cut")


def cut_to_row(cut: dict[str, Any]) -> dict[str, Any]:
    """Convert a MonoCut to a row of a NeMo manifest, with a channel if its file has several.

    Raises ValueError for a cut of any other kind.
    """
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise ValueError(f"a {str(kind)[:60]} cannot be read; save its audio with Lhotse's save_audios, as MonoCuts")
    recording = cut.get("recording")
    if not isinstance(recording, dict):
        raise ValueError("this cut has no recording, only features; nest reads audio")
    path, channel = _audio_file(recording, cut.get("channel"))
    row = {
        "audio_filepath": path,
        CHANNEL_KEY: channel,
        "duration": cut.get("duration"),
        "offset": cut.get("start", 0.0),
        **supervision(cut.get("supervisions")),
    }
    return {key: value for key, value in row.items() if value is not None}


def recording_to_row(recording: dict[str, Any]) -> dict[str, Any]:
    """Convert a Lhotse recording of one audio file to a row of a NeMo manifest, without a channel.

    Raises ValueError for a recording of any other kind.
    """
    _check_transforms(recording)
    sources = recording.get("sources")
    if not isinstance(sources, list) or len(sources) != 1:
        raise ValueError("the recording must have one source; make a cut of each of its channels")
    return {"audio_filepath": _path_of(sources[0]), "id": str(recording.get("id", ""))}


def _audio_file(recording: dict[str, Any], channel: Any) -> tuple[str, int | None]:
    """Return the path of the file that has a cut's channel, and the channel's index there (None if it is mono)."""
    _check_transforms(recording)
    source, place = source_of(recording, channel)
    return _path_of(source), place


def source_of(recording: dict[str, Any], channel: Any) -> tuple[dict[str, Any], int | None]:
    """Return the recording's source that has the channel, and the channel's index in it (None if the source is mono).

    Raises ValueError unless exactly one source has the channel.
    """
    sources = recording.get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(each, dict) for each in sources):
        raise ValueError("the recording must have at least one source")
    if channel is None and len(sources) == 1 and len(_channels(sources[0])) == 1:
        return sources[0], None
    if type(channel) is not int:
        number = sum(len(_channels(each)) for each in sources)
        stated = "the cut names none" if channel is None else f"the cut's is {str(channel)[:60]}"
        raise ValueError(f"the recording has {number} channels and {stated}; give the number of one of them")
    found = [each for each in sources if channel in _channels(each)]
    if len(found) != 1:
        known = sorted({number for each in sources for number in _channels(each)})
        raise ValueError(
            f"the cut's channel is {channel}, and {'several' if found else 'none'} of the recording's sources "
            f"{'have' if found else 'has'} it; its channels are {', '.join(map(str, known))[:60]}"
        )
    channels = _channels(found[0])
    return found[0], channels.index(channel) if len(channels) > 1 else None


def _channels(source: dict[str, Any]) -> list[int]:
    """Return the channel numbers of a source, in the order of its file; [0] if it states none."""
    channels = source.get("channels", [0])
    if not isinstance(channels, list) or not channels or any(type(each) is not int for each in channels):
        raise ValueError("the source's channels must be a list of numbers")
    if len(set(channels)) < len(channels):
        raise ValueError("a channel occurs twice in the recording's source")
    return channels


def _path_of(source: Any) -> str:
    """Return the path of a source, which must be a file."""
    kind, path = (source.get("type"), source.get("source")) if isinstance(source, dict) else (None, None)
    if kind != "file":
        raise ValueError(f"a source of type {str(kind)[:60]!r} is refused; only files are read")
    if not isinstance(path, str):
        raise ValueError("the recording's source names no file")
    return path


def _check_transforms(recording: dict[str, Any]) -> None:
    """Raise ValueError if a recording has a transform other than resampling."""
    transforms = recording.get("transforms") or []
    if not isinstance(transforms, list):
        raise ValueError("the recording's transforms must be a list")
    names = [str(each.get("name") if isinstance(each, dict) else each) for each in transforms]
    if unknown := [name for name in names if name not in _HARMLESS]:
        raise ValueError(f"the recording has the transform {unknown[0]}; save the changed audio first")


def supervision(supervisions: Any) -> dict[str, Any]:
    """Return speaker and language if all supervisions agree, and their joined texts. Raises ValueError."""
    if not isinstance(supervisions or [], list):
        raise ValueError("the cut's supervisions must be a list")
    known = [each for each in supervisions or [] if isinstance(each, dict)]
    row: dict[str, Any] = {}
    for key, theirs in (("speaker", "speaker"), ("lang", "language")):
        values = {str(each[theirs]) for each in known if each.get(theirs)}
        if len(values) == 1:
            row[key] = values.pop()
    if texts := [str(each["text"]) for each in known if each.get("text")]:
        row["text"] = " ".join(texts)
    return row
