"""Tarred data: matches manifests with tars, in NeMo's layout and in Lhotse's Shar.

A shard is opened when its first utterance is read: opening a corpus reads only manifests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nestcli.audio.load import CHANNEL_KEY
from nestcli.data.lhotse_cuts import source_of, supervision
from nestcli.data.manifest import Manifest, joined
from nestcli.data.manifest_scan import NO_SHARD, expand, of_scan, scan
from nestcli.errors import DataError
from nestcli.files import is_remote, user_path
from nestcli.storage.tar_members import open_shard

_LAST_NUMBER = re.compile(r"(\d+)\D*$")
_CUTS, _AUDIO = "cuts", "recording"  # the fields that are read from a Shar


def read_tarred(manifest_paths: str | Sequence[str], tar_paths: str | Sequence[str]) -> Manifest:
    """Open a tarred data set of NeMo: one manifest for all shards, or one per shard.

    A line goes with the tar whose name ends in its `shard_id`; without one, with its manifest's own tar, or with the
    tar that holds its file. Lines of shards that are not given are left out, as in NeMo. Raises DataError.
    """
    tars, names = tuple(expand(tar_paths)), expand(manifest_paths)
    if not tars or not names:
        raise DataError("tarred data needs both its manifest and its tars; one of them is empty")
    by_number = _by_number(tars)
    place_of: dict[str, int] = {}
    manifests = []
    for place, name in enumerate(names):
        found = scan(name)
        stated = np.array(found.shards)
        if (stated == NO_SHARD).all():
            if len(names) == len(tars) or len(tars) == 1:
                shard_of = np.full(len(stated), place if len(tars) > 1 else 0)
            else:
                place_of = place_of or _place_of(tars)
                shard_of = _found_in(of_scan(found), place_of)
        else:
            shard_of = np.array([by_number.get(int(number), NO_SHARD) for number in stated])
        manifests.append(_with_shards(of_scan(found), shard_of, tars))
    manifest = joined(manifests)
    if not len(manifest):
        raise DataError(f"no line of {names[0]} belongs to any of the {len(tars)} tars given, {tars[0]} the first")
    return manifest


def _by_number(tars: Sequence[str]) -> dict[int, int]:
    """Return the tar of each shard_id: by the last number in its name, or by its place if numbers repeat."""
    numbers = [_LAST_NUMBER.search(Path(tar).stem) for tar in tars]
    found = [int(number[1]) for number in numbers if number]
    if len(set(found)) < len(tars):
        found = list(range(len(tars)))
    return {number: place for place, number in enumerate(found)}


def _with_shards(manifest: Manifest, shard_of: np.ndarray, tars: tuple[str, ...]) -> Manifest:
    """Return the lines whose tar is given. The tuple of tars is shared, because there may be many manifests."""
    kept = np.flatnonzero(shard_of != NO_SHARD)
    columns = manifest.select(kept)
    return Manifest(**{**vars(columns), "shard_of": shard_of[kept].astype(np.int32), "shards": tars})


def _place_of(tars: Sequence[str]) -> dict[str, int]:
    """Return the tar of each member, by reading the index of all tars."""
    return {file_id(name): place for place, tar in enumerate(tars) for name in open_shard(tar).members}


def _found_in(manifest: Manifest, place_of: Mapping[str, int]) -> np.ndarray:
    """Return the tar that holds each line's file."""
    ids = (file_id(manifest.row(line)["audio_filepath"]) for line in range(len(manifest)))
    return np.array([place_of.get(each, place_of.get(without_sub(each), NO_SHARD)) for each in ids])


def file_id(name: str) -> str:
    """Return the name by which NeMo finds a line's file in a tar: without folders and extension."""
    return name.rpartition("/")[2].rpartition(".")[0] or name.rpartition("/")[2]


def without_sub(name: str) -> str:
    """Return the file of a line that is a part of it: NeMo's `NAME-sub2` is a part of NAME."""
    stem, _, number = name.rpartition("-sub")
    return stem if number.isdigit() else name


def read_shar(path: str | dict[str, Any]) -> Manifest:
    """Open a Lhotse Shar: a folder, or {cuts: [...], recording: [...]} with ranges. Raises DataError."""
    cuts, tars = _shar_files(path)
    if not cuts or len(cuts) != len(tars):
        raise DataError(
            f"{path}: there are {len(cuts)} files of cuts and {len(tars)} of recordings; a Shar has "
            "cuts.000000.jsonl.gz and recording.000000.tar, as `nest prepare-data --shards N --format shar` writes them"
        )
    manifests = []
    for cut_file, tar in zip(cuts, tars, strict=True):
        manifest = of_scan(scan(cut_file, to_row=_shar_row))
        manifests.append(_with_shards(manifest, np.zeros(len(manifest)), (tar,)))
    return joined(manifests)


def _shar_files(path: str | dict[str, Any]) -> tuple[list[str], list[str]]:
    if isinstance(path, str):
        if is_remote(path):
            raise DataError(
                f"{path}: nest does not list remote folders; name the files: shar_path={{cuts: "
                ".../cuts._OP_000000..000007_CL_.jsonl.gz, recording: .../recording._OP_000000..000007_CL_.tar}"
            )
        folder = Path(user_path(path))
        cuts = sorted(str(file) for pattern in ("cuts.*.jsonl.gz", "cuts.*.jsonl") for file in folder.glob(pattern))
        return cuts, sorted(str(file) for file in folder.glob("recording.*.tar"))
    if missing := {_CUTS, _AUDIO} - path.keys():
        raise DataError(f"shar_path: {sorted(missing)[0]} is missing; give cuts and recording")
    return expand(path[_CUTS]), expand(path[_AUDIO])


def _shar_row(cut: dict[str, Any]) -> dict[str, Any]:
    """Convert a cut of a Shar to a row of a manifest; its audio is the member of that name. Raises ValueError."""
    if "audio_filepath" in cut:
        return cut
    recording = cut.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    kinds = [isinstance(each, dict) and each.get("type") for each in sources] if isinstance(sources, list) else []
    if (
        not isinstance(recording, dict)
        or not kinds
        or any(kind != "shar" for kind in kinds)
        or not isinstance(cut.get("id"), str)
    ):
        raise ValueError("this is not a cut of a Shar; its recording must be a placeholder of type shar")
    if cut.get("type", "MonoCut") != "MonoCut":
        raise ValueError(f"a {str(cut['type'])[:60]} cannot be read; save MonoCuts")
    row = {
        CHANNEL_KEY: source_of(recording, cut.get("channel"))[1],
        "duration": cut.get("duration"),
        "offset": cut.get("start", 0.0),
        **supervision(cut.get("supervisions")),
    }
    return {"audio_filepath": cut["id"], **{key: value for key, value in row.items() if value is not None}}
