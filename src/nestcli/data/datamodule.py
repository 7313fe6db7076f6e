"""From manifests to batches: the plan of an epoch, the loader's processes, the order that a resumed run continues.

Every draw depends on (seed, epoch, place in the plan) alone, so a run gives the same batches with any number of
loader processes, and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler

from nestcli.config import TARGETS, require, section, seed_of
from nestcli.data.audio import load_audio
from nestcli.data.augmentation import AugmentationConfig, mix_one_speaker_or_noise, mix_speakers_and_noise
from nestcli.data.batch import NoiseBatch, Samples, collate
from nestcli.data.cores import available_cores
from nestcli.data.manifest import Manifest, read_manifests
from nestcli.data.noise import NoisePool
from nestcli.errors import ConfigError, DataError, NestError

MIN_SECONDS = 1.0  # a clip that turns out shorter is repeated up to this length, as in NeMo
_MIXERS = {"multi_speaker_noise": mix_speakers_and_noise, "speaker_noise": mix_one_speaker_or_noise}
_DEFAULT_MIXER = "nestcli.MultiSpeakerNoiseAugmentation"
_UNSUPPORTED = {
    "is_tarred": "tarred data cannot be read yet: give a manifest of loose files",
    "is_concat": "several weighted data sets cannot be read yet: give their manifests as one list",
    "trim_silence": "silence is not trimmed here: trim the files beforehand",
}


@dataclass(frozen=True)
class DatasetConfig:
    """What `model.train_ds` and `model.validation_ds` say beside their manifests. Durations in seconds."""

    sample_rate: int
    batch_size: int
    shuffle: bool
    num_workers: int
    pin_memory: bool
    max_duration: float | None
    min_duration: float | None
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} is not a number of utterances, give at least 1.")
        if self.num_workers < 0:
            raise ValueError(f"num_workers: {self.num_workers} is not a number of processes.")


@dataclass(frozen=True)
class BatchPlan:
    """Which items form which batch. Ranks take turns: batch b of an epoch is for rank b % ranks."""

    n_items: int
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    ranks: int = 1
    rank: int = 0

    def __len__(self) -> int:
        """Batches of an epoch for each rank, the same for all of them."""
        if self.drop_last:
            return self.n_items // (self.batch_size * self.ranks)
        return -(-self.n_items // (self.batch_size * self.ranks))

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The items of an epoch in their order."""
        if not self.shuffle:
            return np.arange(self.n_items)
        return np.random.default_rng((self.seed, epoch)).permutation(self.n_items)

    def items(self, order: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
        """The items of this rank's batch `number`; empty where only other ranks have one left."""
        first = (number * self.ranks + self.rank) * self.batch_size
        return order[first : first + self.batch_size]


class NoisySpeech(Dataset[NoiseBatch | NestError]):
    """Batches by (epoch, number): clean speech, noise and their mixture.

    An error that a user can mend is returned, not raised: a loader process would bury it in its own traceback.
    """

    def __init__(
        self, speech: Manifest, noise: NoisePool | None, plan: BatchPlan, config: DictConfig, key: str
    ) -> None:
        self.speech, self.noise, self.plan = speech, noise, plan
        self.sample_rate = section(DatasetConfig, config, key).sample_rate
        self.mix, self.augmentation = _mixer(config, key)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, place: tuple[int, int]) -> NoiseBatch | NestError:
        epoch, number = place
        try:
            return self._batch(epoch, number)
        except NestError as error:
            return error

    def _batch(self, epoch: int, number: int) -> NoiseBatch:
        items = self.plan.items(self._order_of(epoch), number)
        counts = len(items) > 0
        items = items if counts else self._order_of(epoch)[:1]
        audios = [self._speech(int(item)) for item in items]
        noises = [self._noise(epoch, int(item), len(audio)) for item, audio in zip(items, audios, strict=True)]
        batch = collate(audios, noises, tuple(map(int, items)))
        if self.mix is not None and self.augmentation is not None:
            batch = self.mix(batch, self.augmentation, self._generator("mix", epoch, int(items[0])))
        elif self.noise is not None:
            batch = replace(batch, noisy_audio=batch.audio + batch.noise)  # as it was read: NeMo's way
        return replace(batch, counts=counts)

    def _speech(self, item: int) -> Samples:
        entry = self.speech.entry(item)
        audio = load_audio(
            entry.audio_filepath, sample_rate=self.sample_rate, offset=entry.offset, duration=entry.duration
        )
        shortest = int(MIN_SECONDS * self.sample_rate)
        return np.resize(audio, shortest) if len(audio) < shortest else audio

    def _noise(self, epoch: int, item: int, n_samples: int) -> Samples:
        if self.noise is None:
            exact = self.augmentation is not None and self.augmentation.nemo_exact
            return np.zeros(n_samples if exact else 0, np.float32)
        return self.noise.draw(n_samples, self._generator("noise", epoch, item))

    def _generator(self, purpose: str, epoch: int, item: int) -> random.Random:
        return random.Random(f"{self.plan.seed}/{purpose}/{epoch}/{item}")  # noqa: S311  # no secrets here

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.plan.order(epoch))
        return self._order[1]


class ResumableSampler(Sampler[tuple[int, int]]):
    """Places (epoch, number) of a whole run, from where training stands: `consumed` tells how many were used.

    The run is one long sequence over all its epochs, because counts that start anew with each epoch are what
    Lightning loses when it resumes.
    """

    def __init__(self, batches_per_epoch: int, batches: int, consumed: Callable[[], int]) -> None:
        self.batches_per_epoch, self.batches, self.consumed = batches_per_epoch, batches, consumed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for place in range(self.consumed(), self.batches):
            yield divmod(place, self.batches_per_epoch)


class NestDataModule(LightningDataModule):
    """The loaders of `model.train_ds` and `model.validation_ds`.

    `batches` is the length of the training loader: one epoch, unless a run sets that of all its epochs.
    """

    def __init__(self, config: DictConfig) -> None:
        super().__init__()
        self.config = config
        self.batches: int | None = None
        self.seed = seed_of(config)
        self.train_speech = _speech_manifest(config, "model.train_ds")
        self.train_noise = _noise_pool(config, "model.train_ds")
        self.val_speech: Manifest | None = None
        if _wants_validation(config):
            self.val_speech = _speech_manifest(config, "model.validation_ds")
        self.val_noise = _noise_pool(config, "model.validation_ds") if self.val_speech else None
        self.sample_rate = int(config.model.sample_rate)

    def train_plan(self, ranks: int = 1, rank: int = 0) -> BatchPlan:
        """The batches of a training epoch for one of `ranks` processes. Raises DataError if there are none."""
        plan = self._plan(self.train_speech, section(DatasetConfig, self.config, "model.train_ds"), ranks, rank)
        if len(plan) == 0:
            raise DataError(
                f"model.train_ds: {len(self.train_speech)} utterances do not fill one batch of "
                f"{plan.batch_size} on each of {ranks} devices. Lower model.train_ds.batch_size, "
                "or set model.train_ds.drop_last=false."
            )
        return plan

    def train_batch(self, epoch: int, number: int) -> NoiseBatch:
        """One batch of training, made in this process. Raises NestError."""
        data = NoisySpeech(self.train_speech, self.train_noise, self.train_plan(), self.config, "model.train_ds")
        return _raised(data[epoch, number])

    def check_validation_batch(self) -> None:
        """Make the first batch of validation, if there is any. Raises NestError."""
        if self.val_speech is not None:
            plan = self._plan(self.val_speech, section(DatasetConfig, self.config, "model.validation_ds"), 1, 0)
            _raised(NoisySpeech(self.val_speech, self.val_noise, plan, self.config, "model.validation_ds")[0, 0])

    def train_dataloader(self) -> DataLoader[NoiseBatch | NestError]:
        settings = section(DatasetConfig, self.config, "model.train_ds")
        plan = self.train_plan(*self._ranks())
        data = NoisySpeech(self.train_speech, self.train_noise, plan, self.config, "model.train_ds")
        sampler = ResumableSampler(len(plan), self.batches or len(plan), self._consumed)
        return self._loader(data, sampler, settings)

    def val_dataloader(self) -> DataLoader[NoiseBatch | NestError] | list[Any]:
        if self.val_speech is None:
            return []
        settings = section(DatasetConfig, self.config, "model.validation_ds")
        plan = self._plan(self.val_speech, settings, *self._ranks())
        data = NoisySpeech(self.val_speech, self.val_noise, plan, self.config, "model.validation_ds")
        return self._loader(data, ResumableSampler(len(plan), len(plan), lambda: 0), settings)

    def on_before_batch_transfer(self, batch: NoiseBatch | NestError, dataloader_idx: int) -> NoiseBatch:
        return _raised(batch)

    def _consumed(self) -> int:
        """Training batches used so far in the run, those before a resume included."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready) if self.trainer else 0

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _plan(self, speech: Manifest, settings: DatasetConfig, ranks: int, rank: int) -> BatchPlan:
        return BatchPlan(
            n_items=len(speech),
            batch_size=settings.batch_size,
            shuffle=settings.shuffle,
            drop_last=settings.drop_last,
            seed=self.seed,
            ranks=ranks,
            rank=rank,
        )

    def _loader(
        self, data: NoisySpeech, sampler: ResumableSampler, settings: DatasetConfig
    ) -> DataLoader[NoiseBatch | NestError]:
        workers = min(settings.num_workers, available_cores())
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            data,
            sampler=cast("Sampler[int]", sampler),  # places, not numbers: the data set takes them as they are
            batch_size=None,
            num_workers=workers,
            pin_memory=settings.pin_memory and on_gpu,
            persistent_workers=workers > 0,
        )


def _raised(batch: NoiseBatch | NestError) -> NoiseBatch:
    if isinstance(batch, NestError):
        raise batch
    return batch


def _wants_validation(config: DictConfig) -> bool:
    block = config.model.validation_ds
    if block is None:
        return False
    return OmegaConf.is_missing(block, "manifest_filepath") or block.manifest_filepath is not None


def _speech_manifest(config: DictConfig, key: str) -> Manifest:
    settings = section(DatasetConfig, config, key)
    for option, why in _UNSUPPORTED.items():
        if OmegaConf.select(config, key).get(option):
            raise ConfigError(f"{key}.{option}: {why}.")
    none = "; null means no validation" if key == "model.validation_ds" else ""
    why = f"the manifest of the speech, as `nest prepare-data` writes it{none}"
    paths = require(config, f"{key}.manifest_filepath", why)
    speech = read_manifests(_paths(paths))
    longest = np.inf if settings.max_duration is None else settings.max_duration
    shortest = 0.0 if settings.min_duration is None else settings.min_duration
    kept = speech.select((speech.durations >= shortest) & (speech.durations <= longest))
    if len(kept) == 0:
        raise DataError(
            f"{key}: none of the {len(speech)} utterances lasts between {shortest:g} and {longest:g} s "
            f"(theirs: {speech.durations.min():.2f} to {speech.durations.max():.2f} s). "
            f"Change {key}.min_duration or {key}.max_duration."
        )
    return kept


def _noise_pool(config: DictConfig, key: str) -> NoisePool | None:
    paths = OmegaConf.select(config, f"{key}.noise_manifest")
    return (
        NoisePool(read_manifests(_paths(paths)), int(OmegaConf.select(config, f"{key}.sample_rate"))) if paths else None
    )


def _paths(value: Any) -> str | list[str]:
    paths = [str(Path(path).expanduser()) for path in ([value] if isinstance(value, str) else value)]
    return paths[0] if isinstance(value, str) else paths


def _mixer(config: DictConfig, key: str) -> tuple[Any, AugmentationConfig | None]:
    block = OmegaConf.select(config, f"{key}.batch_augmentor")
    if block is None:
        return None, None
    if "_target_" not in block:
        raise ConfigError(f"{key}.batch_augmentor._target_ is missing: name the augmentation, e.g. {_DEFAULT_MIXER}.")
    return _MIXERS[TARGETS[block["_target_"]]], section(AugmentationConfig, config, f"{key}.batch_augmentor")
