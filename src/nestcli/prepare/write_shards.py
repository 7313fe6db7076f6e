"""Write shards: pack audio into tars of equal size, in NeMo's layout or as Lhotse Shar, one task per shard."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import numpy as np
import soundfile as sf

from nestcli.audio.load import CHANNEL_KEY, Samples, kept_channel, load_audio, parsed_channel, reason_of
from nestcli.data.manifest import write_manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import DataError, RunFailedError
from nestcli.files import atomic_file
from nestcli.jobs.journal import REMEDY, Journal, file_version
from nestcli.jobs.patience import PATIENCE, file_size, seconds_for
from nestcli.jobs.pool import Died, Pool

Format = Literal["nemo-tar", "shar"]

_write = partial(write_manifest, error=RunFailedError, remedy=REMEDY)
_AS_THEY_ARE = ("FLAC", "WAV")  # whole mono files of 16 bits and the wanted rate are packed unchanged


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards that were written; `config` holds the data set keys that make `nest pretrain` and NeMo read them."""

    format: Format
    folder: str
    config: dict[str, Any]
    shards: int
    utterances: int
    skipped: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Packing:
    """One shard to write: (line number, row) of a manifest, with absolute paths."""

    folder: str
    number: int
    rows: list[tuple[int, dict[str, Any]]]
    format: Format
    sample_rate: int


@dataclass(frozen=True, slots=True)
class _Packed:
    rows: list[dict[str, Any]]
    skipped: list[dict[str, Any]]


def write_shards(
    manifest: str | os.PathLike[str],
    out: Path,
    *,
    shards: int,
    format: Format,
    pool: Pool,
    sample_rate: int = 16000,
    patience: float = PATIENCE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ShardSet:
    """Pack the utterances of a checked manifest, shuffled, into `shards` files in `out`.

    A shard that an earlier run finished from the same rows is kept. Utterances that cannot be read are left out and
    listed in `skipped`. Raises DataError if none can be read, or if a shard takes longer than `patience` seconds plus
    an allowance for the size of its files.
    """
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(os.fspath(manifest), out, shards, format, sample_rate)
    _clear_others(out, format, shards)
    journal = Journal(out)
    try:
        packed = _all_packed(tasks, pool, journal, progress, patience)
    finally:
        journal.close()
    skipped = [row for each in packed for row in each.skipped]
    _write(out / "skipped.jsonl", skipped)
    written = sum(len(each.rows) for each in packed)
    if not written:
        raise DataError(f"no utterance of {manifest} could be packed; the first: {skipped[0]['detail']}")
    config = _nemo_manifests(out, packed) if format == "nemo-tar" else {"use_lhotse": True, "shar_path": str(out)}
    return ShardSet(format, str(out), config, shards, written, skipped)


def _tasks(manifest: str, out: Path, shards: int, format: Format, sample_rate: int) -> list[_Packing]:
    lines = read_manifests([manifest])
    order = np.random.default_rng(0).permutation(len(lines))  # makes every shard a random sample of the corpus
    tasks = []
    for number, chosen in enumerate(np.array_split(order, shards)):
        rows = []
        for line in chosen.tolist():
            entry = lines.entry(line)
            place = {"audio_filepath": entry.audio_filepath, "duration": entry.duration, "offset": entry.offset}
            rows.append((line, {**lines.row(line), **place}))
        tasks.append(_Packing(str(out), number, rows, format, sample_rate))
    return tasks


def _all_packed(
    tasks: Sequence[_Packing], pool: Pool, journal: Journal, progress: Callable[[int, int], None], patience: float
) -> list[_Packed]:
    keys = [_digest(task) for task in tasks]
    packed: dict[int, _Packed] = {}
    for number, (task, key) in enumerate(zip(tasks, keys, strict=True)):
        known = journal.get(f"{number}/{key}")
        if known is not None and all(path.is_file() for path in _files(task)):
            packed[number] = _Packed(*known)
    todo = [number for number in range(len(tasks)) if number not in packed]
    work = _pack_tar if tasks[0].format == "nemo-tar" else _pack_shar

    def limit(task: _Packing) -> float:
        places = ((file_size(row["audio_filepath"]), row["offset"] + row["duration"]) for _, row in task.rows)
        return patience + sum(seconds_for(*place) for place in places)

    for number, result in zip(todo, pool.in_order(work, (tasks[number] for number in todo), limit), strict=True):
        if isinstance(result, Died):
            raise DataError(f"shard {number} could not be written: {result.detail}. Run the same command again.")
        packed[number] = result
        journal.add(f"{number}/{keys[number]}", [result.rows, result.skipped])
        journal.flush()
        progress(len(packed), len(tasks))
    return [packed[number] for number in range(len(tasks))]


def _digest(task: _Packing) -> str:
    versions = [file_version(row["audio_filepath"]) for _, row in task.rows]
    content = json.dumps([task.rows, versions, task.format, task.sample_rate])
    return blake2b(content.encode(), digest_size=16).hexdigest()


def _files(task: _Packing) -> list[Path]:
    folder = Path(task.folder)
    if task.format == "nemo-tar":
        return [folder / f"audio_{task.number}.tar"]
    return [folder / f"recording.{task.number:06d}.tar", folder / f"cuts.{task.number:06d}.jsonl.gz"]


def _clear_others(out: Path, format: Format, shards: int) -> None:
    """Remove the shards of an earlier run that do not belong to this one: a glob over the folder must not find them."""
    for path in [*out.glob("audio_*.tar"), *out.glob("recording.*.tar"), *out.glob("cuts.*.jsonl.gz")]:
        number = path.name.replace("_", ".").split(".")[1]
        of_format = path.name.startswith("audio_") == (format == "nemo-tar")
        if number.isdigit() and (not of_format or int(number) >= shards):
            path.unlink()
    for path in (out / "sharded_manifests").glob("manifest_*.json"):
        path.unlink()


# --- NeMo's layout


def _nemo_manifests(out: Path, packed: Sequence[_Packed]) -> dict[str, Any]:
    """Write one manifest per shard and one for all; return the config keys that name them."""
    for number, each in enumerate(packed):
        _write(out / "sharded_manifests" / f"manifest_{number}.json", each.rows)
    _write(out / "tarred_audio_manifest.json", (row for each in packed for row in each.rows))
    return {
        "is_tarred": True,
        "manifest_filepath": str(out / "tarred_audio_manifest.json"),
        "tarred_audio_filepaths": str(out / f"audio__OP_0..{len(packed) - 1}_CL_.tar"),
    }


def _pack_tar(task: _Packing) -> _Packed:
    packed = _Packed([], [])
    with (
        atomic_file(_files(task)[0], RunFailedError, REMEDY) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for line, row in task.rows:
            try:
                content, ending, duration = _content(row, task)
            except DataError as error:
                packed.skipped.append(_skipped(row, error))
                continue
            info = tarfile.TarInfo(f"{line:07d}-{_plain(Path(row['audio_filepath']).stem)}.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            kept = {key: value for key, value in row.items() if key not in ("offset", CHANNEL_KEY)}
            packed.rows.append({**kept, "audio_filepath": info.name, "duration": duration, "shard_id": task.number})
    return packed


def _plain(stem: str) -> str:
    """Return a name that is safe for tar, NeMo and every file system. NeMo would strip a suffix like "-sub1"."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in stem)
    return kept.replace("-sub", "_sub")[:60]


def _content(row: dict[str, Any], task: _Packing) -> tuple[bytes, str, float]:
    """Return the bytes of an utterance's tar member, its extension, and its duration in seconds."""
    path = row["audio_filepath"]
    try:
        with sf.SoundFile(path) as sound:
            untouched = (
                (sound.samplerate, sound.channels, sound.subtype) == (task.sample_rate, 1, "PCM_16")
                and not _channel(row)
                and sound.format in _AS_THEY_ARE
                and not row["offset"]
                and abs(sound.frames / sound.samplerate - row["duration"]) < 1e-4
            )
            frames, ending = sound.frames, sound.format.lower()
        if untouched:
            return Path(path).read_bytes(), ending, _seconds(frames, task.sample_rate)
    except (OSError, sf.LibsndfileError):
        pass  # load_audio reads more formats, and raises the right error
    samples = _samples(row, task)
    return _flac(samples, task.sample_rate), "flac", _seconds(len(samples), task.sample_rate)


def _samples(row: dict[str, Any], task: _Packing) -> Samples:
    return load_audio(
        row["audio_filepath"],
        sample_rate=task.sample_rate,
        offset=row["offset"],
        duration=row["duration"],
        channel=_channel(row),
    )


def _channel(row: dict[str, Any]) -> int | None:
    return kept_channel(parsed_channel(row.get(CHANNEL_KEY)), None)


def _flac(samples: Samples, rate: int) -> bytes:
    file = io.BytesIO()
    sf.write(file, samples, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _seconds(frames: int, rate: int) -> float:
    """Return the duration in seconds, rounded down to microseconds so that it never exceeds the file."""
    return frames * 1_000_000 // rate / 1e6


def _skipped(row: dict[str, Any], error: Exception) -> dict[str, Any]:
    return {"audio_filepath": row["audio_filepath"], "reason": reason_of(error), "detail": str(error)}


# --- Lhotse's Shar


def _pack_shar(task: _Packing) -> _Packed:
    from lhotse.shar import SharWriter

    packed = _Packed([], [])
    folder = Path(mkdtemp(prefix=".shar-", dir=task.folder))
    try:
        with SharWriter(str(folder), fields={"recording": "flac"}, shard_size=len(task.rows) + 1) as writer:
            for line, row in task.rows:
                try:
                    samples = _samples(row, task)
                except DataError as error:
                    packed.skipped.append(_skipped(row, error))
                    continue
                writer.write(_cut(line, row, samples, task.sample_rate))
                packed.rows.append({"audio_filepath": row["audio_filepath"]})
        _forget_time(folder / "cuts.000000.jsonl.gz")
        for target in _files(task):
            (folder / target.name.replace(f"{task.number:06d}", "000000")).replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return packed


def _forget_time(path: Path) -> None:
    """Zero the time in a gzip header, so that the same cuts give the same bytes whenever they are written."""
    with path.open("r+b") as file:
        file.seek(4)
        file.write(bytes(4))


def _cut(line: int, row: dict[str, Any], samples: Samples, rate: int) -> Any:
    """Return a Lhotse cut of an utterance, with all metadata of its row."""
    from lhotse import Recording, SupervisionSegment

    name = f"{line:07d}-{_plain(Path(row['audio_filepath']).stem)}"
    cut = Recording.from_bytes(_flac(samples, rate), recording_id=name).to_cut()
    cut.supervisions = [
        SupervisionSegment(
            name, name, 0.0, cut.duration, text=row.get("text"), language=row.get("lang"), speaker=row.get("speaker")
        )
    ]
    others = {key: value for key, value in row.items() if key not in _OWN_KEYS}
    cut.custom = {**others, "source": row["audio_filepath"]}
    return cut


_OWN_KEYS = ("audio_filepath", "duration", "offset", CHANNEL_KEY, "text", "lang", "speaker")
