"""Write the features of a corpus to disk, layer by layer; resumable, with memory independent of the corpus's size.

Axes: L layers, M model width, S frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestcli.checkpoint.encoder import read_encoder
from nestcli.checkpoint.load import checkpoint_path
from nestcli.data.manifest import Manifest, write_manifest
from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.inputs import Inputs, read_inputs
from nestcli.evaluation.stores import STORES, Store
from nestcli.evaluation.walk import Walk, Walked, chosen_device
from nestcli.files import open_kept, refuse_links, remove_leftovers, write_text
from nestcli.model.speech_encoder import Layer, Layers, SpeechEncoder

SETTINGS, MANIFEST, REJECTED, JOURNAL = "extract.json", "features.json", "rejected.jsonl", ".rejected.jsonl"
DTYPES = ("float32", "float16")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExtractOptions:
    """Options of an extraction; `layers` as typed: all, last, or numbers joined by commas."""

    layers: str = "all"
    format: str = "npy"
    store: str = "float32"
    device: str = "auto"
    precision: str = "fp32"
    batch_duration: float = 120.0
    max_duration: float = 240.0

    def __post_init__(self) -> None:
        if self.format not in STORES:
            raise ConfigError(f"--format {self.format}: unknown format. Known: {', '.join(STORES)}.")
        if self.store not in DTYPES:
            raise ConfigError(f"--store {self.store}: use {' or '.join(DTYPES)}.")


@dataclass(frozen=True)
class Extracted:
    """The result of an extraction; `seconds` is the duration of the audio."""

    utterances: int
    rejected: int
    seconds: float
    layers: tuple[int | str, ...]
    dim: int
    path: Path  # of the features: a folder or a file
    manifest: Path
    was_done: bool = False  # an earlier call had already finished


def extract(
    given: str, checkpoint: str, out: Path, options: ExtractOptions, progress: Progress = lambda done, total: None
) -> Extracted:
    """Write the features of a manifest, folder or file into `out`; continue an earlier call that was interrupted.

    Raises ConfigError if `out` holds something else, DataError and CheckpointError.
    """
    encoder = read_encoder(checkpoint).build()
    layers = parsed_layers(options.layers, encoder)
    device = chosen_device(options.device)
    walk = Walk(
        encoder.sample_rate,
        device,
        options.precision,
        options.batch_duration,
        options.max_duration,
        encoder.preprocessor.config.hop_length,
    )
    _check_output(out)
    inputs = read_inputs(given, out)
    wanted = _settings(given, checkpoint, inputs, encoder, options)
    done = _agreed(out, wanted)
    store = STORES[options.format](out, encoder, layers)
    if not done:
        _Extraction(inputs, store, walk, np.dtype(options.store)).run(encoder.to(device), layers, progress)
    store.clean()
    return _summary(out, inputs, store, encoder, layers, was_done=done)


def parsed_layers(text: str, encoder: SpeechEncoder) -> Layers:
    """Parse `all`, `last` or `0,5,-1,input`. Raises ConfigError for a layer that does not exist."""
    if text in ("all", "last"):
        return "all" if text == "all" else "last"
    layers: list[Layer] = []
    for word in text.split(","):
        name = word.strip()
        if name != "input" and not name.removeprefix("-").isdecimal():
            raise ConfigError(f"--layers {text}: {name!r} is not a layer. Use all, last, or numbers such as 0,5,11.")
        layers.append("input" if name == "input" else int(name))
    try:
        encoder.chosen(layers)
    except ValueError as error:
        raise ConfigError(f"--layers {text}: {error}") from None
    return layers


class _Extraction:
    """One pass over the lines that are not done yet."""

    def __init__(self, inputs: Inputs, store: Store, walk: Walk, dtype: np.dtype[Any]) -> None:
        self.manifest, self.refused = inputs.manifest, inputs.refused
        self.store, self.walk, self.dtype = store, walk, dtype
        self.journal = store.out / JOURNAL

    def run(self, encoder: SpeechEncoder, layers: Layers, progress: Progress) -> None:
        rejected = _journalled(self.journal)
        batches = self.walk.batches(self.manifest.durations)
        # A batch is computed as a whole or not at all: with other padding, the last digits would differ.
        todo = [batch for batch in batches if not all(i in rejected or self.store.has(self._name(i)) for i in batch)]
        done = len(self.manifest) - sum(map(len, todo))
        progress(done, len(self.manifest))
        for found in self.walk.through(self.manifest, todo, lambda a, n: _embed(encoder, layers, a, n)):
            self._keep(found, rejected)
            done += len(found)
            progress(done, len(self.manifest))
        self._finish(rejected)

    def _keep(self, found: Sequence[Walked], rejected: dict[int, dict[str, Any]]) -> None:
        for each in found:
            if each.features is not None:
                self.store.put(self._name(each.index), each.features.float().cpu().numpy().astype(self.dtype))
        new = [each for each in found if each.features is None and each.index not in rejected]
        if new:
            with open_kept(self.journal, "a", ConfigError, encoding="utf-8") as file:
                for each in new:
                    rejected[each.index] = {"reason": each.reason, "detail": each.detail}
                    file.write(json.dumps({"index": each.index, **rejected[each.index]}) + "\n")

    def _finish(self, rejected: dict[int, dict[str, Any]]) -> None:
        """Write the manifests, in the order of the input, once everything else exists."""
        good = [index for index in range(len(self.manifest)) if index not in rejected]
        if not good:
            first = next(iter(rejected.values()))
            raise DataError(f"none of {len(self.manifest)} utterances could be used; the first: {first['detail']}")
        places = self.store.finish(self.manifest, lambda: ((index, self._name(index)) for index in good))
        bad = [*({**rejected[index], **self._line(index)} for index in sorted(rejected)), *self.refused]
        write_manifest(self.store.out / REJECTED, bad)
        write_manifest(
            self.store.out / MANIFEST, ({**self._line(index), **places(self._name(index))} for index in good)
        )
        self.journal.unlink(missing_ok=True)

    def _line(self, index: int) -> dict[str, Any]:
        entry = self.manifest.entry(index)
        row = {**self.manifest.row(index), "audio_filepath": entry.audio_filepath}
        return {**row, "duration": entry.duration}

    def _name(self, index: int) -> str:
        entry_path = str(self.manifest.row(index)["audio_filepath"])
        return utterance_name(int(index), entry_path)


def utterance_name(index: int, path: str) -> str:
    """Return a unique name for a line: its number, and the end of the file's name in plain characters."""
    stem = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in Path(path).stem)
    return f"{index:08d}-{stem[-80:]}"


def _embed(encoder: SpeechEncoder, layers: Layers, audio_BN: Tensor, lengths_B: Tensor) -> list[Tensor]:
    """Return the features (L, M, S) of each item, arranged as in NeMo's extract_features."""
    encoded = encoder(audio_BN, lengths_B, layers=layers)
    return [each[:, :count].transpose(1, 2) for each, count in zip(encoded.features, encoded.lengths, strict=True)]


# ---- what a folder holds ---------------------------------------------------------------------------------------


def _check_output(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / SETTINGS).is_file():
        raise ConfigError(f"--out {out} already holds other files. Name a new folder.")
    refuse_links(out, ConfigError, itself=False)
    out.mkdir(parents=True, exist_ok=True)


def _settings(
    given: str, checkpoint: str, inputs: Inputs, encoder: SpeechEncoder, options: ExtractOptions
) -> dict[str, Any]:
    """Return everything that determines the features."""
    return {
        "input": os.path.abspath(given),  # noqa: PTH100  # links stay as they are
        "lines": _digest_of(inputs.manifest),
        "checkpoint": os.path.abspath(checkpoint_path(checkpoint)),  # noqa: PTH100  # links stay as they are
        "weights": _digest_of_weights(encoder),
        "layers": options.layers,
        "format": options.format,
        "store": options.store,
        "precision": options.precision,
        "batch_duration": options.batch_duration,
        "max_duration": options.max_duration,
    }


def _agreed(out: Path, wanted: dict[str, Any]) -> bool:
    """Return True if `out` is complete. Raises ConfigError if it holds another extraction than the wanted one."""
    path = out / SETTINGS
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            there = {}
        there = there if isinstance(there, dict) else {}
        different = [key for key in wanted if there.get(key) != wanted[key]]
        if different:
            key = different[0]
            raise ConfigError(
                f"--out {out} holds features with another {key} ({str(there.get(key))[:200]!r}, now {wanted[key]!r}). "
                "Name a new folder."
            )
        remove_leftovers(out)
        return (out / MANIFEST).is_file()
    write_text(path, [json.dumps(wanted, indent=2) + "\n"])
    return False


def _digest_of(manifest: Manifest) -> str:
    digest = sha256()
    for column in (manifest.durations, manifest.offsets, manifest.sizes):
        digest.update(np.ascontiguousarray(column).tobytes())
    for index in range(len(manifest)):
        digest.update(manifest.row(index)["audio_filepath"].encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _digest_of_weights(encoder: SpeechEncoder) -> str:
    digest = sha256()
    for name, value in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _journalled(path: Path) -> dict[int, dict[str, Any]]:
    """Return the rejections of earlier calls, by line; ignore a last line that a kill left incomplete."""
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(text)
            found[int(row.pop("index"))] = {key: str(row[key]) for key in ("reason", "detail")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _summary(
    out: Path, inputs: Inputs, store: Store, encoder: SpeechEncoder, layers: Layers, *, was_done: bool
) -> Extracted:
    try:
        durations = [float(row["duration"]) for row in _rows(out / MANIFEST)]
        rejected = sum(1 for _ in _rows(out / REJECTED))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"--out {out} holds manifests that nest did not write. Name a new folder.") from None
    names = [place - 1 if place else "input" for place in encoder.chosen(layers)]
    return Extracted(
        utterances=len(durations),
        rejected=rejected,
        seconds=round(sum(durations), 3),
        layers=tuple(names),
        dim=encoder.width,
        path=store.path,
        manifest=out / MANIFEST,
        was_done=was_done,
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
