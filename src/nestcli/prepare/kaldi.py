"""Kaldi data folders: wav.scp, and segments, utt2spk and text if they exist. Commands in them are never run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestcli.data.manifest import MAX_LINE, MAX_SECONDS
from nestcli.errors import DataError
from nestcli.files import user_path


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance of a Kaldi folder. `path` is None if wav.scp has a command instead of a file.

    Times are in seconds; `duration` is None if the folder has no segments.
    """

    name: str
    recording: str
    path: str | None
    offset: float
    duration: float | None
    known: dict[str, Any]


_BLANKS = " \t\r"


def is_kaldi(folder: Path) -> bool:
    return (folder / "wav.scp").is_file()


def read_kaldi(folder: Path) -> Iterator[Utterance]:
    """Yield the utterances of a folder, in the order of segments or else of wav.scp.

    Raises DataError, which names the file and the line.
    """
    recordings: dict[str, str | None] = {}
    for key, rest in _table(folder / "wav.scp"):
        if key in recordings:
            raise DataError(f"{folder / 'wav.scp'}: {key} occurs twice; give each line its own key")
        recordings[key] = _audio_file(folder, rest)
    speakers, texts = (dict(_table(folder / name)) for name in ("utt2spk", "text"))
    spans: list[tuple[str, str, float, float | None]]
    if (folder / "segments").is_file():
        spans = [(name, *_segment(folder, name, rest)) for name, rest in _table(folder / "segments")]
    else:
        spans = [(name, name, 0.0, None) for name in recordings]
    for name, recording, start, end in spans:
        if recording not in recordings:
            raise DataError(
                f"{folder / 'segments'}: {name} belongs to the recording {recording}, which wav.scp does not have"
            )
        known = {"speaker": speakers.get(name), "text": texts.get(name)}
        yield Utterance(
            name=name,
            recording=recording,
            path=recordings[recording],
            offset=start,
            duration=None if end is None else round(end - start, 6),
            known={"id": name, **{key: value for key, value in known.items() if value}},
        )


def _table(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (key, rest) of each line `KEY REST`; nothing if the file does not exist."""
    if not path.is_file():
        return
    for number, line in enumerate(_lines(path), 1):
        key, _, rest = line.strip(_BLANKS).replace("\t", " ").partition(" ")
        rest = rest.strip(_BLANKS)
        if not key:
            continue
        if "\0" in line:
            raise DataError(f"{path}, line {number}: it has a zero byte; is this a Kaldi table?")
        if not rest:
            if path.name == "text":  # an utterance without words
                continue
            raise DataError(f"{path}, line {number}: nothing follows {key!r}")
        yield key, rest


def _lines(path: Path) -> Iterator[str]:
    """Yield lines that end with a newline only, not with Unicode's other line separators. Raises DataError."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise DataError(f"{path} has a line longer than {MAX_LINE >> 20} MiB; is this a Kaldi table?")
                yield line.decode("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _audio_file(folder: Path, rest: str) -> str | None:
    if rest.endswith("|") or rest.startswith("|"):
        return None
    path = Path(user_path(rest))
    # Kaldi's paths are relative to the folder in which its scripts run
    if path.is_absolute() or os.path.exists(path):  # noqa: PTH110  (pathlib raises for a name that is too long)
        return str(path.absolute())
    return str((folder / path).absolute())


def _segment(folder: Path, name: str, rest: str) -> tuple[str, float, float | None]:
    """Return the recording, and start and end in seconds; the end is None where Kaldi writes -1 (to the end)."""
    fields = rest.split()
    try:
        recording, start, end = fields[0], float(fields[1]), float(fields[2])
    except (IndexError, ValueError):
        raise DataError(f"{folder / 'segments'}: {name} needs RECORDING START END, but has {rest!r}") from None
    if end == -1 and 0 <= start <= MAX_SECONDS:
        return recording, start, None
    if not 0 <= start < end <= MAX_SECONDS:
        raise DataError(
            f"{folder / 'segments'}: {name} goes from {start:g} to {end:g} s; its start must be 0 s or more, "
            f"and its end must be later, at most {MAX_SECONDS:g} s"
        )
    return recording, start, end
