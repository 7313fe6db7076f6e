"""Collect the audio to check, in input order, from folders, files, globs, NeMo and Lhotse manifests, Kaldi folders."""

from __future__ import annotations

import glob
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestcli.audio.load import Channel
from nestcli.data.lhotse_cuts import recording_to_row
from nestcli.data.manifest import Manifest, check_row, to_row
from nestcli.data.manifest_scan import of_scan, scan
from nestcli.errors import DataError
from nestcli.files import is_remote, user_path
from nestcli.jobs.journal import NAME as JOURNAL
from nestcli.prepare.kaldi import is_kaldi, read_kaldi
from nestcli.storage import file_kinds
from nestcli.storage.file_kinds import foreign, has_json_lines, is_audio_or_array

# Includes formats that nest cannot read: such files must be rejected with a reason instead of ignored.
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .mp3 .mp2 .ogg .oga .opus .sph .nist .aif .aiff .aifc .au .snd .caf .w64 .rf64"  # noqa: SIM905
    " .voc .wv .amr .awb .gsm .m4a .mp4 .aac .wma .webm .mka .ape".split()
)
OUTPUTS = frozenset(["train_manifest.json", "val_manifest.json", "rejected.jsonl", "summary.json", "summary.svg"])
OUTPUT_FOLDERS = frozenset(["audio", "train_shards", "val_shards"])
_REFUSED = "nest_cannot_use"  # key of the reason in the row of an unusable line
MANIFEST_SUFFIXES = file_kinds.SUFFIXES


@dataclass(frozen=True, slots=True)
class Item:
    """One utterance to check: a whole file, or the segment that a manifest names.

    `path` is absolute; `key` is the path relative to the input it was found in, the path as the manifest writes it,
    or Kaldi's name of the recording. Times are in seconds; `duration` is NaN if no manifest states it.
    `facts` holds the metadata of an item that has no manifest to read it from again. `refused` says why the item
    cannot be checked, and `reason` is the code for that. `channel` is the one that the manifest chooses.
    """

    path: str
    key: str
    offset: float = 0.0
    duration: float = math.nan
    speaker: str | None = None
    manifest: Manifest | None = None
    index: int = -1
    facts: dict[str, Any] | None = None
    refused: str | None = None
    reason: str = "not_a_file"
    channel: Channel | None = None

    def known(self) -> dict[str, Any]:
        """Return everything that the item's manifest says about it, read from the manifest again."""
        return dict(self.facts or {}) if self.manifest is None else self.manifest.row(self.index)

    def where(self) -> str:
        """Return the manifest and line of the item (or its path), for messages."""
        if self.manifest is None:
            return self.path
        entry = self.manifest.entry(self.index)
        return f"{entry.manifest}, line {entry.line},"


@dataclass(slots=True)
class Collection:
    """The items found, and the number of other files in the folders: in total (`passed_over`) and by extension."""

    items: list[Item] = field(default_factory=list)
    passed_over: int = 0
    endings: Counter[str] = field(default_factory=Counter)


def collect(inputs: Sequence[str | os.PathLike[str]], out: Path) -> Collection:
    """List everything in the inputs; walk folders, except `out` and hidden ones.

    Raises DataError for an input that does not exist, before anything is listed, and if no input is audio.
    """
    collection = Collection()
    for path in [path for each in inputs for path in _existing(os.fspath(each), out, collection)]:
        if path.name == "wav.scp" or is_kaldi(path):
            collection.items.extend(_kaldi_items(path.parent if path.is_file() else path))
        elif path.is_dir():
            _add_folder(path, out, collection)
        elif is_manifest(path):
            collection.items.extend(_manifest_items(str(path)))
        else:
            why = "" if path.suffix.lower() in AUDIO_SUFFIXES else foreign(path)
            collection.items.append(Item(str(path.absolute()), path.name, refused=why or None, reason="not_audio"))
    if all(item.reason == "not_audio" and item.refused for item in collection.items) and collection.items:
        first = collection.items[0]
        raise DataError(f"{first.path}: {first.refused}")
    return collection


def is_manifest(path: Path) -> bool:
    """Return True if a file is a manifest: by its extension or, unless that is one of audio, by its first bytes."""
    if path.name.lower().endswith(MANIFEST_SUFFIXES):
        return not is_audio_or_array(path)
    return path.suffix.lower() not in AUDIO_SUFFIXES and has_json_lines(path)


def _existing(given: str, out: Path, collection: Collection) -> list[Path]:
    """Return the input itself or, if no such file exists, the files that it matches as a glob."""
    if not given:
        raise DataError("an input is empty; give folders, audio files or manifests. Is a shell variable unset?")
    given = user_path(given)
    if os.path.lexists(given):
        return [Path(given)]
    if is_remote(given):
        raise DataError(f"{given} is a remote address; first copy the audio to a disk that this machine can read")
    if glob.has_magic(given):
        if found := sorted(glob.glob(given, recursive=True)):  # noqa: PTH207  (absolute patterns, "~", hidden files)
            return _wanted(given, [Path(each) for each in found], out, collection)
        raise DataError(f"nothing matches {given}; give folders, audio files or manifests")
    raise DataError(f"{given} does not exist; give folders, audio files or manifests")


def _wanted(pattern: str, found: Sequence[Path], out: Path, collection: Collection) -> list[Path]:
    """Filter the paths that a glob found.

    Drops what lies inside a folder that was found too, what lies in `out`, and files without an audio extension.
    Other files, such as manifests, stay only if the pattern itself has their extension: `corpus/**` also matches JSON
    files that are not manifests.
    """
    named = Path(pattern).suffix.lower()
    own_ending = (named,) if named and not glob.has_magic(named) else ()
    endings = (
        *AUDIO_SUFFIXES,
        *own_ending,
        *(MANIFEST_SUFFIXES if pattern.lower().endswith(MANIFEST_SUFFIXES) else ()),
    )
    folders = {path for path in found if path.is_dir()}
    own = out.absolute()
    alone = [path for path in found if folders.isdisjoint(path.parents) and own not in path.absolute().parents]
    wanted = [path for path in alone if path in folders or path.name.lower().endswith((*endings, "wav.scp"))]
    collection.passed_over += len(alone) - len(wanted)
    collection.endings.update(path.suffix.lower() for path in set(alone).difference(wanted))
    return wanted


def made_before(out: Path) -> list[Path]:
    """Return the folders of converted audio and shards that earlier runs made in `out`.

    A journal inside distinguishes them from a user's folder of the same name.
    """
    folders = [out / name for name in OUTPUT_FOLDERS]
    return [folder for folder in folders if not folder.is_symlink() and (folder / JOURNAL).is_file()]


def _add_folder(root: Path, out: Path, collection: Collection) -> None:
    base = str(root.absolute())
    own = OUTPUTS if root.resolve() == out.resolve() else frozenset()
    made = {f"{base}/{folder.name}" for folder in made_before(out)} if own else set()
    for folder, names in _walk(base, os.path.realpath(out)):
        if any(folder == each or folder.startswith(f"{each}/") for each in made):
            continue
        for name in names:
            if folder == base and name in own:
                continue
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:  # noqa: PTH122  (a million names)
                path = f"{folder}/{name}"
                collection.items.append(Item(path, path[len(base) + 1 :]))
            else:
                collection.passed_over += 1
                collection.endings[os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122


def _walk(root: str, out: str) -> Iterator[tuple[str, list[str]]]:
    """Yield folders with their visible files, sorted; follow links to folders, but enter each folder only once."""

    def stop(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}; change its permissions")

    entered: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=stop):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in entered or (folder != root and os.path.realpath(folder) == out):
            subfolders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield folder, sorted(name for name in names if not name.startswith("."))


def _any_row(record: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a manifest's line, or of a Lhotse recording (a whole file), or the reason it is unusable."""
    is_recording = "sources" in record and "recording" not in record and "audio_filepath" not in record
    try:
        row = recording_to_row(record) if is_recording else to_row(record)
        check_row(row)
    except ValueError as error:
        name = record.get("id", record.get("audio_filepath", ""))
        return {"audio_filepath": "-", "id": str(name)[:200], _REFUSED: str(error)}
    return row


def _manifest_items(path: str) -> Iterator[Item]:
    manifest = of_scan(scan(path, require_duration=False, to_row=_any_row))
    for index in range(len(manifest)):
        row = manifest.row(index)
        if (why := row.get(_REFUSED)) is not None:
            name = f"{manifest.where(index)}: {row.get('id', '')}"
            yield Item(name, name, manifest=manifest, index=index, refused=str(why), reason="unsupported_line")
            continue
        entry = manifest.entry(index)
        elsewhere = is_remote(entry.audio_filepath)
        yield Item(
            # abspath resolves "..", pathlib does not
            path=entry.audio_filepath if elsewhere else os.path.abspath(entry.audio_filepath),  # noqa: PTH100
            key=str(row["audio_filepath"]),
            offset=entry.offset,
            duration=entry.duration,
            speaker=entry.speaker,
            manifest=manifest,
            index=index,
            channel=entry.channel,
            refused="it is at a remote address; copy it to this machine first" if elsewhere else None,
        )


def _kaldi_items(folder: Path) -> Iterator[Item]:
    for utterance in read_kaldi(folder):
        command = "wav.scp has a command instead of a file, and nest runs no commands; write its output to a file"
        yield Item(
            path=utterance.path or f"{folder.absolute()}/wav.scp: {utterance.name}",
            key=utterance.recording,
            offset=utterance.offset,
            duration=math.nan if utterance.duration is None else utterance.duration,
            speaker=utterance.known.get("speaker"),
            facts=utterance.known,
            refused=command if utterance.path is None else None,
        )
