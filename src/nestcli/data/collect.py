"""What there is to check: audio in folders, audio files, and the lines of manifests, in input order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestcli.data.manifest import Manifest, read_manifests
from nestcli.errors import DataError

# also what nobody here can read: it shall be rejected with its reason, not passed over
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .mp3 .mp2 .ogg .oga .opus .sph .nist .aif .aiff .aifc .au .snd .caf .w64 .rf64"  # noqa: SIM905
    " .voc .wv .amr .awb .gsm .m4a .mp4 .aac .wma .webm .mka .ape".split()
)
OUTPUTS = frozenset(["train_manifest.json", "val_manifest.json", "rejected.jsonl", "summary.json"])
MANIFEST_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass(frozen=True, slots=True)
class Item:
    """One utterance to check: a whole file, or the segment that a manifest names.

    `path` is absolute; `key` is the path relative to the input that it came with, or as its manifest writes
    it. Times are in seconds; the duration is NaN where no manifest states one.
    """

    path: str
    key: str
    offset: float = 0.0
    duration: float = math.nan
    speaker: str | None = None
    manifest: Manifest | None = None
    index: int = -1

    def known(self) -> dict[str, Any]:
        """All that the item's manifest says about it, read again from there."""
        return {} if self.manifest is None else self.manifest.row(self.index)

    def where(self) -> str:
        """The manifest's line, for messages."""
        if self.manifest is None:
            return self.path
        entry = self.manifest.entry(self.index)
        return f"{entry.manifest}, line {entry.line},"


@dataclass(slots=True)
class Collection:
    """The items found, and how many files in folders were no audio by their names."""

    items: list[Item] = field(default_factory=list)
    passed_over: int = 0


def collect(inputs: Sequence[str | os.PathLike[str]], out: Path) -> Collection:
    """List everything in the inputs; folders are walked, except `out` and what is hidden.

    Raises DataError, before anything is listed, for an input that does not exist.
    """
    paths = [Path(each) for each in inputs]
    for path in paths:
        if not os.path.lexists(path):
            raise DataError(f"{path} does not exist; give folders, audio files or manifests")
    collection = Collection()
    for path in paths:
        if path.is_dir():
            _add_folder(path, out, collection)
        elif path.name.lower().endswith(MANIFEST_SUFFIXES):
            collection.items.extend(_manifest_items(str(path)))
        else:
            collection.items.append(Item(str(path.absolute()), path.name))
    return collection


def _add_folder(root: Path, out: Path, collection: Collection) -> None:
    base = str(root.absolute())
    own = OUTPUTS if root.resolve() == out.resolve() else frozenset()
    for folder, names in _walk(base, os.path.realpath(out)):
        for name in names:
            if folder == base and name in own:
                continue
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES:  # noqa: PTH122  (a million names)
                path = f"{folder}/{name}"
                collection.items.append(Item(path, path[len(base) + 1 :]))
            else:
                collection.passed_over += 1


def _walk(root: str, out: str) -> Iterator[tuple[str, list[str]]]:
    """Folders and their visible files, sorted; links to folders are followed, each folder is entered once."""

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


def _manifest_items(path: str) -> Iterator[Item]:
    manifest = read_manifests([path], require_duration=False)
    for index in range(len(manifest)):
        entry = manifest.entry(index)
        yield Item(
            path=os.path.abspath(entry.audio_filepath),  # noqa: PTH100  (folds "..", as pathlib does not)
            key=str(manifest.row(index)["audio_filepath"]),
            offset=entry.offset,
            duration=entry.duration,
            speaker=entry.speaker,
            manifest=manifest,
            index=index,
        )
