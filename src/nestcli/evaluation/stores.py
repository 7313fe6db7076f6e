"""Formats of stored features: one array per utterance, combined at the end into what the format needs.

Axes: L layers, M model width, S frames.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestcli.audio.load import audio_header
from nestcli.data.manifest import Manifest
from nestcli.errors import DataError, MissingDependencyError
from nestcli.files import atomic_file
from nestcli.model.speech_encoder import Layers, SpeechEncoder

Array = npt.NDArray[np.floating[Any]]
Names = Callable[[], Iterable[tuple[int, str]]]  # yields the accepted lines, with the names of their arrays
Places = Callable[[str], dict[str, str]]  # the manifest keys that locate the array of a name

_LARGEST_HEADER = 100_000_000  # bytes; safetensors refuses to read a larger one


class Store:
    """Separate .npy files of (L, M, S), as NeMo's extract_features writes them; a thousand per folder."""

    folder = "features"

    def __init__(self, out: Path, encoder: SpeechEncoder, layers: Layers) -> None:
        self.out, self.encoder = out, encoder
        self.single = len(encoder.chosen(layers)) == 1

    @property
    def path(self) -> Path:
        return self.out / self.folder

    def file(self, name: str) -> Path:
        return self.out / self.folder / name[:5] / f"{name}.npy"

    def has(self, name: str) -> bool:
        return self.file(name).is_file()

    def put(self, name: str, features_LMS: Array) -> None:
        with atomic_file(self.file(name), DataError, "Run the same command again to continue.", sync=False) as file:
            np.save(file, self.arranged(features_LMS))

    def arranged(self, features_LMS: Array) -> Array:
        return np.ascontiguousarray(features_LMS)

    def finish(self, manifest: Manifest, names: Names) -> Places:
        """Combine all arrays as the format needs; return a function that gives each array's manifest keys."""
        return lambda name: {"feature_path": str(self.file(name).absolute())}

    def clean(self) -> None:
        """Remove files that the format does not need once the manifest exists."""
        if self.folder.startswith("."):
            shutil.rmtree(self.out / self.folder, ignore_errors=True)

    def _arrays(self, names: Names) -> Iterator[tuple[str, Array]]:
        for _, name in names():
            yield name, np.load(self.file(name), allow_pickle=False)


class SafetensorsStore(Store):
    """One safetensors file with a tensor (L, M, S) for each utterance."""

    folder = ".features"

    @property
    def path(self) -> Path:
        return self.out / "features.safetensors"

    def finish(self, manifest: Manifest, names: Names) -> Places:
        kinds = {"float32": "F32", "float16": "F16"}
        header: dict[str, Any] = {}
        end = 0
        for _, name in names():
            array = np.load(self.file(name), mmap_mode="r", allow_pickle=False)
            offsets = [end, end := end + array.nbytes]
            header[name] = {"dtype": kinds[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > _LARGEST_HEADER:
            raise DataError(
                f"{self.path}: {len(header):,} utterances are too many for one safetensors file, whose header is "
                "limited to 100 MB. Use --format npy or hdf5 with a new --out."
            )
        text += b" " * (-len(text) % 8)
        with atomic_file(self.path, DataError, "Run the same command again to continue.") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, array in self._arrays(names):
                file.write(array.tobytes())
        return lambda name: {"feature_path": str(self.path.absolute()), "feature_key": name}


class Hdf5Store(Store):
    """One HDF5 file with a data set (L, M, S) for each utterance."""

    folder = ".features"

    def __init__(self, out: Path, encoder: SpeechEncoder, layers: Layers) -> None:
        super().__init__(out, encoder, layers)
        try:
            import h5py
        except ImportError as error:
            message = f'--format hdf5 needs h5py ({error}). Install it: pip install "nestcli[hdf5]"'
            raise MissingDependencyError(message) from None
        self._library = h5py

    @property
    def path(self) -> Path:
        return self.out / "features.h5"

    def finish(self, manifest: Manifest, names: Names) -> Places:
        with (
            atomic_file(self.path, DataError, "Run the same command again to continue.") as file,
            self._library.File(file, "w") as content,
        ):
            for name, array in self._arrays(names):
                content.create_dataset(name, data=array, track_times=False)
        return lambda name: {"feature_path": str(self.path.absolute()), "feature_key": name}


class LhotseStore(Store):
    """Lhotse cuts with arrays: a single layer (S, M) as the cut's features, several as its field `layers` (S, L, M)."""

    @property
    def path(self) -> Path:
        return self.out / "cuts.jsonl.gz"

    def arranged(self, features_LMS: Array) -> Array:
        features_SLM = features_LMS.transpose(2, 0, 1)
        return np.ascontiguousarray(features_SLM[:, 0] if self.single else features_SLM)

    def finish(self, manifest: Manifest, names: Names) -> Places:
        from lhotse import CutSet

        temporary = self.path.with_name(f".{self.path.name.removesuffix('.gz')}.gz")  # Lhotse looks at the extension
        temporary.unlink(missing_ok=True)  # it may be a link
        with CutSet.open_writer(temporary, overwrite=True) as writer:
            for index, name in names():
                writer.write(self._cut(manifest, index, name))
        temporary.replace(self.path)
        return super().finish(manifest, names)

    def _cut(self, manifest: Manifest, index: int, name: str) -> Any:
        from lhotse import MonoCut, SupervisionSegment
        from lhotse.array import Array as Stored
        from lhotse.array import TemporalArray
        from lhotse.features import Features

        entry, row = manifest.entry(index), manifest.row(index)
        shape = np.load(self.file(name), mmap_mode="r", allow_pickle=False).shape
        place = {
            "storage_type": "numpy_files",
            "storage_path": str((self.out / self.folder).absolute()),
            "storage_key": f"{name[:5]}/{name}.npy",
        }
        step = self.encoder.frame_seconds
        recording = _recording(entry.audio_filepath) if entry.shard is None else None
        start = entry.offset if recording else 0.0
        left = recording.duration - start if recording else entry.duration
        cut = MonoCut(id=name, start=start, duration=min(entry.duration, left), channel=0, recording=recording)
        if any(row.get(key) for key in ("speaker", "text", "lang")):
            said = {"speaker": entry.speaker, "text": entry.text, "language": entry.lang}
            cut.supervisions = [
                SupervisionSegment(name, cut.recording_id if recording else name, 0.0, cut.duration, **said)
            ]
        if self.single:
            cut.features = Features(
                type="nest",
                num_frames=shape[0],
                num_features=shape[1],
                frame_shift=step,
                sampling_rate=self.encoder.sample_rate,
                start=start,
                duration=cut.duration,
                recording_id=cut.recording_id if recording else name,
                channels=0,
                **place,
            )
        else:
            cut.layers = TemporalArray(
                Stored(shape=list(shape), **place), temporal_dim=0, frame_shift=step, start=start
            )
        return cut


def _recording(path: str) -> Any:
    """Return a Lhotse recording of a file, from its header.

    Lhotse's own readers pass the names of .opus and .sph files to a shell.
    """
    from lhotse import AudioSource, Recording

    rate, channels, frames = audio_header(path)
    source = AudioSource(type="file", channels=list(range(channels)), source=path)
    return Recording(
        id=Path(path).stem, sources=[source], sampling_rate=rate, num_samples=frames, duration=frames / rate
    )


STORES: dict[str, type[Store]] = {
    "npy": Store,
    "safetensors": SafetensorsStore,
    "hdf5": Hdf5Store,
    "lhotse": LhotseStore,
}
