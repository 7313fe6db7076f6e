"""Manifests: lists of utterances in NeMo's JSON lines or Lhotse's cuts.

A manifest of millions of lines stays on the disk. `Manifest` holds 40 bytes a line (where it stands, how long
the audio is, where it starts and in which shard), and reads the rest of a line when it is asked for an entry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from nestcli.audio.channel import KEY as CHANNEL
from nestcli.audio.channel import Channel, parsed_channel
from nestcli.data.manifest_scan import Scan, Source, parse, scan
from nestcli.errors import DataError, NestError
from nestcli.files import user_path, write_text
from nestcli.storage import addresses

_KEY_ORDER = ("audio_filepath", "duration", "offset", CHANNEL, "speaker", "text", "lang", "reason", "detail")


@dataclass(frozen=True, slots=True)
class Entry:
    """One utterance: `duration` s of a file from `offset` s on, and the line (from 1) that says so.

    Where `shard` is given, the file is a member of that tar. `channel` is the one that the line chooses, if it does.
    """

    audio_filepath: str
    duration: float
    offset: float
    speaker: str | None
    text: str | None
    lang: str | None
    line: int
    manifest: str
    shard: str | None = None
    channel: Channel | None = None

    @property
    def name(self) -> str:
        """The audio, for messages."""
        return self.audio_filepath if self.shard is None else f"{self.shard}: {self.audio_filepath}"


@dataclass(frozen=True, eq=False)
class Manifest:
    """The lines of one or more manifests, in their order; may be pickled to other processes.

    `durations` and `offsets` are in seconds, float64, one a line. A duration that the line does not state is
    NaN, where `read_manifests` was told to let that pass. `shard_of` tells the tar in `shards` that holds a line's
    audio, -1 for a loose file.
    """

    durations: npt.NDArray[np.float64]
    offsets: npt.NDArray[np.float64]
    sources: tuple[Source, ...] = field(repr=False)
    source_of: npt.NDArray[np.int32] = field(repr=False)
    positions: npt.NDArray[np.int64] = field(repr=False)  # in bytes
    sizes: npt.NDArray[np.int32] = field(repr=False)  # in bytes
    lines: npt.NDArray[np.int32] = field(repr=False)
    shard_of: npt.NDArray[np.int32] = field(repr=False)
    shards: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.durations)

    def select(self, indices: npt.ArrayLike) -> Manifest:
        """The lines at `indices` (or where a mask is true), in that order."""
        chosen = np.asarray(indices)
        if not chosen.size:  # numpy makes an empty list one of floats
            chosen = chosen.astype(np.intp)
        return replace(self, **{name: getattr(self, name)[chosen] for name in _COLUMNS})

    def row(self, index: int) -> dict[str, Any]:
        """Everything that a line says, its path as it stands there; raises DataError if the file changed."""
        source = self.sources[self.source_of[index]]
        try:
            return parse(source.read(int(self.positions[index]), int(self.sizes[index])), source.to_row)[0]
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.where(index)}: {error}. Did the file change since it was opened? Start again."
            ) from None

    def where(self, index: int) -> str:
        """The place of a line, for messages."""
        return f"{self.sources[self.source_of[index]].path}, line {self.lines[index]}"

    def entry(self, index: int) -> Entry:
        """Read one line; a relative path is looked for beside its manifest first, or in the line's shard."""
        source, row, shard = self.sources[self.source_of[index]], self.row(index), int(self.shard_of[index])
        speaker, text, lang = (_text(row.get(key)) for key in ("speaker", "text", "lang"))
        path = row["audio_filepath"]
        return Entry(
            audio_filepath=path if shard >= 0 else _resolve(path, source.folder),
            duration=float(self.durations[index]),
            offset=float(self.offsets[index]),
            speaker=speaker,
            text=text,
            lang=lang,
            line=int(self.lines[index]),
            manifest=source.path,
            shard=self.shards[shard] if shard >= 0 else None,
            channel=parsed_channel(row.get(CHANNEL)),
        )


_COLUMNS = ("durations", "offsets", "source_of", "positions", "sizes", "lines", "shard_of")


def read_manifests(paths: str | Sequence[str], *, require_duration: bool = True) -> Manifest:
    """Open NeMo manifests and Lhotse cuts, plain or .gz; a string may name several, joined by commas.

    Every line is checked. Raises DataError naming file and line.
    """
    names = split_paths(paths) if isinstance(paths, str) else [os.fspath(path) for path in paths]
    if not names:
        raise DataError("no manifest is given; name a file of JSON lines, as `nest prepare-data` writes")
    return joined([of_scan(scan(user_path(name), require_duration=require_duration)) for name in names])


def of_scan(found: Scan) -> Manifest:
    """The manifest of one scan; its lines' shards are not known yet."""
    count = len(found.lines)
    return Manifest(
        durations=np.frombuffer(found.durations),
        offsets=np.frombuffer(found.offsets),
        sources=(found.source,),
        source_of=np.zeros(count, np.int32),
        positions=np.frombuffer(found.positions, np.int64),
        sizes=np.frombuffer(found.sizes, np.int32),
        lines=np.frombuffer(found.lines, np.int32),
        shard_of=np.full(count, -1, np.int32),
    )


def joined(manifests: Sequence[Manifest]) -> Manifest:
    """Manifests one after the other, as one."""
    if len(manifests) == 1:
        return manifests[0]
    columns = {name: np.concatenate([getattr(each, name) for each in manifests]) for name in _COLUMNS}
    sources: list[Source] = []
    shards: list[str] = []
    first_of: dict[int, int] = {}  # by identity: manifests of one data set share one tuple of all its tars
    start = 0
    for each in manifests:
        part = slice(start, start := start + len(each))
        columns["source_of"][part] += len(sources)
        sources.extend(each.sources)
        if id(each.shards) not in first_of:
            first_of[id(each.shards)] = len(shards)
            shards.extend(each.shards)
        columns["shard_of"][part][each.shard_of >= 0] += first_of[id(each.shards)]
    return Manifest(**columns, sources=tuple(sources), shards=tuple(shards))


def write_manifest(
    path: str | os.PathLike[str],
    rows: Iterable[Mapping[str, Any]],
    error: type[NestError] = DataError,
    remedy: str = "",
) -> None:
    """Write rows as JSON lines: a file of that name is either complete or not there at all.

    What the disk refuses becomes `error`, with `remedy` as its last words.
    """
    write_text(path, (_dump(row) + "\n" for row in rows), error, remedy)


def split_paths(paths: str) -> list[str]:
    """The names in a string that may join several by commas."""
    # its name may have a comma
    if os.path.isfile(user_path(paths)):  # noqa: PTH113  (pathlib raises for a name that is too long, as many joined ones are)
        return [paths]
    return [name.strip() for name in paths.split(",") if name.strip()]


def _dump(row: Mapping[str, Any]) -> str:
    order = [*(key for key in _KEY_ORDER if key in row), *sorted(row.keys() - set(_KEY_ORDER))]
    ordered = {key: row[key] for key in order}
    line = json.dumps(ordered, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, or a file name that is not UTF-8
        return json.dumps(ordered)
    return line


def _resolve(path: str, folder: str) -> str:
    if path.startswith("/") or addresses.is_remote(path):
        return path
    if path.startswith("file:") and (local := user_path(path)) != path:
        return local
    if addresses.is_remote(folder):
        return addresses.join(folder, path)
    beside = os.path.join(folder, path)  # noqa: PTH118  (pathlib is slower, and this runs for every utterance)
    return beside if os.path.exists(beside) else user_path(path)  # noqa: PTH110


def _text(value: object) -> str | None:
    return None if value is None else str(value)
