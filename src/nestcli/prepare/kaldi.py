"""Kaldi data folders: wav.scp with segments, utt2spk and text where they are. No command in them is run."""

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
    """One utterance of a Kaldi folder. `path` is None where wav.scp has a command in place of a file.

    Times are in seconds; the duration is None where there are no segments.
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
    """The utterances of a folder in the order of segments, or of wav.scp. Raises DataError naming file and line."""
    recordings: dict[str, str | None] = {}
    for key, rest in _table(folder / "wav.scp"):
        if key in recordings:
            raise DataError(f"{folder / 'wav.scp'}: {key} is there twice; one of its lines would be lost")
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
                f"{folder / 'segments'}: {name} is of the recording {recording}, which wav.scp does not have"
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
    """Lines `KEY REST` of a file; none if it is not there."""
    if not path.is_file():
        return
    for number, line in enumerate(_lines(path), 1):
        key, _, rest = line.strip(_BLANKS).replace("\t", " ").partition(" ")
        rest = rest.strip(_BLANKS)
        if not key:
            continue
        if "\0" in line:
            raise DataError(f"{path}, line {number}: there is a zero byte; is this a table of Kaldi's?")
        if not rest:
            if path.name == "text":  # an utterance without words
                continue
            raise DataError(f"{path}, line {number}: there is nothing after {key!r}")
        yield key, rest


def _lines(path: Path) -> Iterator[str]:
    """Ended by newlines alone, not by what else Unicode takes for a line's end. Raises DataError."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE:
                    raise DataError(f"{path} has a line longer than {MAX_LINE >> 20} MiB; is this a table of Kaldi's?")
                yield line.decode("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _audio_file(folder: Path, rest: str) -> str | None:
    if rest.endswith("|") or rest.startswith("|"):
        return None
    path = Path(user_path(rest))
    # Kaldi's paths are relative to where its scripts are run
    if path.is_absolute() or os.path.exists(path):  # noqa: PTH110  (pathlib raises for a name that is too long)
        return str(path.absolute())
    return str((folder / path).absolute())


def _segment(folder: Path, name: str, rest: str) -> tuple[str, float, float | None]:
    """The recording, the start and the end in seconds; Kaldi writes -1 for an end that is the recording's."""
    fields = rest.split()
    try:
        recording, start, end = fields[0], float(fields[1]), float(fields[2])
    except (IndexError, ValueError):
        raise DataError(f"{folder / 'segments'}: {name} needs RECORDING START END, and has {rest!r}") from None
    if end == -1 and 0 <= start <= MAX_SECONDS:
        return recording, start, None
    if not 0 <= start < end <= MAX_SECONDS:
        raise DataError(
            f"{folder / 'segments'}: {name} goes from {start:g} to {end:g} s; it must go forward, from 0 to "
            f"{MAX_SECONDS:g} at most"
        )
    return recording, start, end
