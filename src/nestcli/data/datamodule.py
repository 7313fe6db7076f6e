"""From manifests to batches: the loader's processes, and the order that a resumed run continues.

Every draw depends on (seed, epoch, item) alone, so a run gives the same batches with any number of loader processes,
and after a resume. The batches of a run are one sequence; of `ranks` processes each takes every `ranks`-th.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, Sampler

from nestcli.config import TARGETS, section, seed_of
from nestcli.data.augmentation import AugmentationConfig, mix_one_speaker_or_noise, mix_speakers_and_noise
from nestcli.data.batch import NoiseBatch, Samples, Skipped, collate, empty
from nestcli.data.cores import available_cores
from nestcli.data.corpus import Corpus, noise_manifest, read_corpus
from nestcli.data.manifest import Manifest
from nestcli.data.noise import NoisePool
from nestcli.data.notes import Noted
from nestcli.data.order import Items
from nestcli.data.plan import BatchPlan
from nestcli.data.planning import plan_batches
from nestcli.data.reading import read_audio
from nestcli.data.ready import check_noise, check_speech, machine_notes
from nestcli.data.settings import DatasetConfig
from nestcli.data.skipping import SkipCounter
from nestcli.data.slabs import Placed, SlabLoader, Slabs
from nestcli.data.watch import Watch, WatchedLoader, explained
from nestcli.data.workers import led_by_main_process
from nestcli.errors import ConfigError, DataError, NestError

MIN_SECONDS = 1.0  # a clip that turns out shorter is repeated up to this length, as in NeMo
_PREFETCHED = 2  # batches that a loader process is ahead
_BYTES_A_SAMPLE, _LARGEST_SLAB = 8, 1 << 28  # of a batch on its way: clean and noisy audio
_REPLACEMENTS = 20  # lines tried in place of a batch of which nothing can be read
_MIXERS = {"multi_speaker_noise": mix_speakers_and_noise, "speaker_noise": mix_one_speaker_or_noise}
_DEFAULT_MIXER = "nestcli.MultiSpeakerNoiseAugmentation"


@dataclass(frozen=True)
class Place:
    """One batch of a run: its items in an epoch. A batch that does not count keeps processes in step."""

    epoch: int
    items: Items
    counts: bool = True


class NoisySpeech(Dataset[NoiseBatch | Placed | NestError]):
    """Batches by place: clean speech, noise and their mixture.

    Audio that cannot be read is left out of its batch and named there. An error that a user can mend is returned, not
    raised: a loader process would bury it in its own traceback.
    """

    def __init__(self, speech: Manifest, noise: NoisePool | None, seed: int, config: DictConfig, key: str) -> None:
        self.speech, self.noise, self.seed = speech, noise, seed
        self.sample_rate = section(DatasetConfig, config, key).sample_rate
        self.mix, self.augmentation = _mixer(config, key)
        self.slabs: Slabs | None = None

    def __getitem__(self, place: Place) -> NoiseBatch | Placed | NestError:
        if self.slabs is not None:
            self.slabs.begin()
        try:
            batch = self._batch(place)
        except NestError as error:
            return error
        return batch if self.slabs is None else self.slabs.put(batch)

    def _batch(self, place: Place) -> NoiseBatch:
        items, audios, skipped = self._speech_of(place.items)
        counts = place.counts
        if not audios:
            items, audios = self._replacement(int(place.items[0]), skipped)
            counts = False
        batch = self._noisy(place.epoch, items, audios)
        if self.noise is not None:
            skipped += self.noise.take_skipped()
        unneeded = torch.empty(0)  # the model looks at audio and noisy audio; a third less has to be sent
        return replace(batch, noise=unneeded, counts=counts, skipped=tuple(skipped))

    def _noisy(self, epoch: int, items: list[int], audios: list[Samples]) -> NoiseBatch:
        lines = [item % len(self.speech) for item in items]
        if self.mix is None or self.augmentation is None:
            batch = collate(audios, self._noises(epoch, items, audios), lines)
            return replace(batch, noisy_audio=batch.audio + batch.noise)  # as it was read: NeMo's way
        generator = self._generator("mix", epoch, items[0])
        if self.augmentation.nemo_exact:
            return self.mix(collate(audios, self._noises(epoch, items, audios), lines), self.augmentation, generator)

        def noise_of(place: int, count: int) -> Samples:  # the same draws, but only of what is mixed in
            return self._noise(epoch, items[place], len(audios[place]), count)

        make = empty if self.slabs is None else self.slabs.array
        return self.mix(collate(audios, None, lines, make), self.augmentation, generator, noise_of, None, make)

    def _noises(self, epoch: int, items: list[int], audios: list[Samples]) -> list[Samples]:
        return [self._noise(epoch, item, len(audio)) for item, audio in zip(items, audios, strict=True)]

    def _speech_of(self, wanted: Items) -> tuple[list[int], list[Samples], list[Skipped]]:
        """The items that can be read, their audio, and what is wrong with the others."""
        items, audios, skipped = [], [], []
        for item in wanted.tolist():
            try:
                audios.append(self._speech(item))
                items.append(item)
            except DataError as error:
                skipped.append(Skipped(self.speech.where(item % len(self.speech)), str(error)))
        return items, audios, skipped

    def _replacement(self, item: int, skipped: list[Skipped]) -> tuple[list[int], list[Samples]]:
        """The next line that can be read, to compute something on where nothing was left of a batch."""
        for step in range(1, _REPLACEMENTS + 1):
            line = (item + step) % len(self.speech)
            try:
                return [line], [self._speech(line)]
            except DataError:
                continue
        raise DataError(
            f"none of {_REPLACEMENTS + len(skipped)} utterances in a row can be read; the first: {skipped[0].why}"
        )

    def _speech(self, item: int) -> Samples:
        with Noted(self.speech, item % len(self.speech)) as entry:
            audio = read_audio(entry, sample_rate=self.sample_rate)
        shortest = int(MIN_SECONDS * self.sample_rate)
        return np.resize(audio, shortest) if len(audio) < shortest else audio

    def _noise(self, epoch: int, item: int, n_samples: int, keep: int | None = None) -> Samples:
        exact = self.augmentation is not None and self.augmentation.nemo_exact
        if self.noise is None:
            return np.zeros(n_samples if exact else 0, np.float32)
        generator = self._generator("noise", epoch, item)
        if exact:  # NeMo draws noise from NumPy's generator
            return self.noise.draw_like_nemo(n_samples, np.random.RandomState(generator.getrandbits(32))).samples
        return self.noise.draw(n_samples, generator, keep).samples

    def _generator(self, purpose: str, epoch: int, item: int) -> random.Random:
        return random.Random(f"{self.seed}/{purpose}/{epoch}/{item}")  # noqa: S311  # no secrets here


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `consumed` batches of all processes, the next is `number` of `epoch`."""

    consumed: int
    epoch: int
    number: int


class ResumableSampler(Sampler[Place]):
    """Places of a whole run, from where training stands: those of one of `ranks` processes, which are `length`.

    `used` is how many of these are behind; by default, its share of the position's.

    The run is one long sequence over all its epochs, because counts that start anew with each epoch are what
    Lightning loses when it resumes. So there is no last batch of an epoch that some process would have to go without.
    `at` tells where a number of consumed batches leads to, for the checkpoint.
    """

    def __init__(
        self,
        plan: BatchPlan,
        length: int,
        start: Callable[[], Position],
        *,
        ranks: int = 1,
        rank: int = 0,
        used: Callable[[], int] | None = None,
    ) -> None:
        self.plan, self.length, self.start, self.ranks, self.rank, self.used = plan, length, start, ranks, rank, used
        self._began: list[Position] = []  # where each epoch began that training has not left behind

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Place]:
        position = self.start()
        epoch, first = position.epoch, position.number
        self._began = [Position(position.consumed - first, epoch, 0)]
        consumed = position.consumed
        used = consumed // self.ranks if self.used is None else self.used()
        end = consumed + (self.length - used) * self.ranks
        while consumed < end:
            batches = self.plan.batches(epoch, consumed - first)
            if not len(batches):
                raise DataError(f"epoch {epoch} has no batch; lower batch_size, or give more data")
            mine = first + (self.rank - (consumed - position.consumed)) % self.ranks
            for number in range(mine, min(len(batches), first + end - consumed), self.ranks):
                yield Place(epoch, batches[number])
            consumed += len(batches) - first
            epoch, first = epoch + 1, 0
            self._began.append(Position(consumed, epoch, 0))

    def at(self, consumed: int) -> Position:
        """The position after `consumed` batches of the run, which is at or behind the one that was drawn last."""
        while len(self._began) > 1 and self._began[1].consumed <= consumed:
            del self._began[0]
        began = self._began[0] if self._began else self.start()
        return Position(consumed, began.epoch, consumed - began.consumed + began.number)


class OnePass(Sampler[Place]):
    """One process's share of the batches of one epoch; what is missing for the last round does not count."""

    def __init__(self, plan: BatchPlan, *, ranks: int = 1, rank: int = 0) -> None:
        self.plan, self.ranks, self.rank = plan, ranks, rank

    def __len__(self) -> int:
        return -(-len(self.plan.batches(0)) // self.ranks)

    def __iter__(self) -> Iterator[Place]:
        batches = self.plan.batches(0)
        for number in range(self.rank, len(self) * self.ranks, self.ranks):
            own = number < len(batches)
            yield Place(0, batches[number]) if own else Place(0, batches.items[:1], counts=False)


class NestDataModule(LightningDataModule):
    """The loaders of `model.train_ds` and `model.validation_ds`.

    `batches` is the length of the training loader: one epoch, unless a run sets that of all its epochs. `tell` hears
    what a person should know: audio that was left out, data that changed since the checkpoint.
    """

    def __init__(self, config: DictConfig, tell: Callable[[str], None] = lambda message: None) -> None:
        super().__init__()
        self.config, self.tell = config, tell
        self.batches: int | None = None
        self.seed = seed_of(config)
        self.train = read_corpus(config, "model.train_ds")
        self.train_noise = self._noise_pool("model.train_ds")
        self.val = read_corpus(config, "model.validation_ds") if _wants_validation(config) else None
        self.val_noise = self._noise_pool("model.validation_ds") if self.val else None
        self.sample_rate = int(config.model.sample_rate)
        self.skipped = SkipCounter(self._settings("model.train_ds").max_failed_share, tell)
        self._val_skipped = SkipCounter(1.0, tell)
        self._watches: list[Watch] = []
        self._sampler: ResumableSampler | None = None
        self._restored: Position | None = None
        self._restored_at = 0  # batches that each process counts there

    # ---- plans and single batches ----

    def train_plan(self, ranks: int = 1) -> BatchPlan:
        """The batches of training, for `ranks` processes in all. Raises DataError if there are none."""
        plan = self._plan(self.train, "model.train_ds", ranks * self._accumulate())
        if len(plan.batches(0)) == 0:
            settings = self._settings("model.train_ds")
            raise DataError(
                f"model.train_ds: {len(self.train.speech)} utterances do not fill one batch of "
                f"{settings.batch_size}. Lower model.train_ds.batch_size, or set model.train_ds.drop_last=false."
            )
        return plan

    def train_batch(self, epoch: int, number: int) -> NoiseBatch:
        """One batch of training, made in this process. Raises NestError."""
        batch = self._data(self.train, self.train_noise, "model.train_ds")[
            Place(epoch, self.train_plan().batches(epoch)[number])
        ]
        return self._counted(batch, self.skipped)

    def check_validation_batch(self) -> None:
        """Make the first batch of validation, if there is any. Raises NestError."""
        if self.val is not None:
            batches = self._plan(self.val, "model.validation_ds").batches(0)
            data = self._data(self.val, self.val_noise, "model.validation_ds")
            self._counted(data[Place(0, batches[0])], self._val_skipped)

    def check_ready(self, processes: int = 1) -> None:
        """Look for the files, and at what the machine has for `processes` of the run. Raises DataError."""
        for key, corpus, noise in (
            ("model.train_ds", self.train, self.train_noise),
            ("model.validation_ds", self.val, self.val_noise),
        ):
            if corpus is None:
                continue
            settings = self._settings(key)
            check_speech(corpus.speech, key, settings.max_failed_share)
            if noise is not None and (told := check_noise(noise.manifest, key, settings.max_failed_share)):
                self.tell(told)
            if corpus is self.train:
                n_bytes = _slab_bytes(self._plan(corpus, key), settings) * (_PREFETCHED + 1) * _workers(settings)
                for told in machine_notes(key, settings.num_workers, n_bytes, processes):
                    self.tell(told)

    def losses_explained(self) -> AbstractContextManager[None]:
        """A context in which PyTorch's error about a lost loader process becomes a RunFailedError that says more."""
        return explained(self._watches)

    # ---- Lightning's hooks ----

    def train_dataloader(self) -> DataLoader[Any]:
        ranks, rank = self._ranks()
        plan = self.train_plan(ranks)
        length = self.batches or -(-len(plan.batches(0)) // ranks)
        self._sampler = ResumableSampler(
            plan, length, lambda: self._start(plan), ranks=ranks, rank=rank, used=self._counted_batches
        )
        data = self._data(self.train, self.train_noise, "model.train_ds")
        return led_by_main_process(self._loader(data, self._sampler, "model.train_ds"))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.val is None:
            return []
        ranks, rank = self._ranks()
        sampler = OnePass(self._plan(self.val, "model.validation_ds"), ranks=ranks, rank=rank)
        data = self._data(self.val, self.val_noise, "model.validation_ds")
        return led_by_main_process(self._loader(data, sampler, "model.validation_ds"))

    def on_before_batch_transfer(self, batch: NoiseBatch | Placed | NestError, dataloader_idx: int) -> NoiseBatch:
        training = self.trainer is None or self.trainer.training
        return self._counted(batch, self.skipped if training else self._val_skipped)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands in which data; the same on every rank."""
        if self._sampler is None:
            return {}
        position = self._sampler.at(self._consumed())
        return {
            "consumed": position.consumed,
            "epoch": position.epoch,
            "number": position.number,
            "data": self._sampler.plan.fingerprint,
            "skipped": self.skipped.skipped,
            "read": self.skipped.read,
            "ranks": self._sampler.ranks,
            "accumulate": self._accumulate(),
            "counted": self._counted_batches(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self.skipped.skipped, self.skipped.read = state_dict["skipped"], state_dict["read"]
        self._restored = Position(*(state_dict[key] for key in ("consumed", "epoch", "number")))
        ranks, accumulate = self._ranks()[0], self._accumulate()
        before = (state_dict.get("ranks", ranks), state_dict.get("accumulate", accumulate))
        self._restored_at = state_dict.get("counted", self._restored.consumed)
        if before != (ranks, accumulate):
            self._restored_at = recounted(self._restored_at, before[1], accumulate)
            self._tell_of_processes(before, (ranks, accumulate))
        if state_dict["data"] != self.train_plan(ranks).fingerprint:
            self._restored = replace(self._restored, epoch=self._restored.epoch + 1, number=0)
            self.tell(
                "The training data or their batches are not those of the checkpoint: "
                f"the run goes on with epoch {self._restored.epoch} from its beginning."
            )

    # ---- parts ----

    def _tell_of_processes(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        """What becomes of a run that had another number of processes, or of batches accumulated in each."""
        batches = [ranks * accumulate for ranks, accumulate in (before, now)]
        means = (
            f"A step still takes {batches[0]} batches, the same that it would have taken."
            if batches[0] == batches[1]
            else f"A step takes {batches[1]} batches in place of {batches[0]}; steps and learning rate are counted on. "
            f"For steps of {batches[0]}, keep processes x trainer.accumulate_grad_batches at that."
        )
        self.tell(
            f"The run goes on with {now[0]} x {now[1]} batches (processes x trainer.accumulate_grad_batches), "
            f"before {before[0]} x {before[1]}. {means}"
        )

    def _start(self, plan: BatchPlan) -> Position:
        """Where the next batch is in the data."""
        consumed = self._consumed()
        start = Position(0, 0, 0)  # from the beginning, or a checkpoint that does not say
        if self._restored is not None and self._restored.consumed <= consumed:
            start = self._restored
        epoch, number = start.epoch, start.number + consumed - start.consumed
        while number and number >= (length := len(plan.batches(epoch, consumed - number))):
            number -= length
            epoch += 1
        return Position(consumed, epoch, number)

    def _consumed(self) -> int:
        """Training batches that all processes used so far in the run, those before a resume included."""
        before = 0 if self._restored is None else self._restored.consumed
        return before + (self._counted_batches() - self._restored_at) * self._ranks()[0]

    def _counted_batches(self) -> int:
        """The training batches that Lightning counts in this process."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready) if self.trainer else 0

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _accumulate(self) -> int:
        return int(self.config.trainer.accumulate_grad_batches)

    def _settings(self, key: str) -> DatasetConfig:
        return section(DatasetConfig, self.config, key)

    def _plan(self, corpus: Corpus, key: str, together: int = 1) -> BatchPlan:
        return plan_batches(corpus, self._settings(key), key, seed=self.seed, together=together)

    def _data(self, corpus: Corpus, noise: NoisePool | None, key: str) -> NoisySpeech:
        return NoisySpeech(corpus.speech, noise, self.seed, self.config, key)

    def _noise_pool(self, key: str) -> NoisePool | None:
        manifest = noise_manifest(self.config, key)
        return None if manifest is None else NoisePool(manifest, self._settings(key).sample_rate)

    def _counted(self, batch: NoiseBatch | Placed | NestError, counter: SkipCounter) -> NoiseBatch:
        if isinstance(batch, NestError):
            raise batch
        assert isinstance(batch, NoiseBatch)  # slabs are the loader's own business
        counter.add(len(batch.sample_ids) if batch.counts else 0, batch.skipped)
        return batch

    def _loader(self, data: NoisySpeech, sampler: ResumableSampler | OnePass, key: str) -> DataLoader[Any]:
        settings = self._settings(key)
        workers = _workers(settings)
        options: dict[str, Any] = {
            "sampler": cast("Sampler[int]", sampler),  # places, not numbers: the data set takes them as they are
            "batch_size": None,
            "num_workers": workers,
            "persistent_workers": workers > 0,
        }
        if workers == 0:
            return DataLoader(data, **options)
        manifests = [data.speech, *([data.noise.manifest] if data.noise else [])]
        options["watch"] = Watch(workers, key, settings.read_timeout, manifests)
        self._watches.append(options["watch"])
        device = None if self.trainer is None else self.trainer.strategy.root_device
        on_gpu = device is not None and device.type == "cuda"
        if on_gpu and not settings.pin_memory:
            return WatchedLoader(data, **options)  # PyTorch's way, should ours fail on some machine
        data.slabs = Slabs(workers, _PREFETCHED, _slab_bytes(sampler.plan, settings))
        ahead: dict[str, Any] = {"device": device, "pin_slabs": True} if on_gpu else {}
        return SlabLoader(data, slabs=data.slabs, prefetch_factor=_PREFETCHED, **ahead, **options)


def _workers(settings: DatasetConfig) -> int:
    return min(settings.num_workers, available_cores())


def _slab_bytes(plan: BatchPlan, settings: DatasetConfig) -> int:
    n_samples = (plan.largest_batch() + MIN_SECONDS) * settings.sample_rate
    return min(int(n_samples) * _BYTES_A_SAMPLE + (1 << 16), _LARGEST_SLAB)


def recounted(batches: int, accumulated: int, accumulate: int) -> int:
    """Batches of a process as it would count them, had each step of the optimiser taken `accumulate`."""
    return batches if accumulated == accumulate else batches // accumulated * accumulate


def _wants_validation(config: DictConfig) -> bool:
    block = config.model.validation_ds
    if block is None:
        return False
    if any(block.get(key) is not None for key in ("input_cfg", "shar_path", "cuts_path")):
        return True
    return OmegaConf.is_missing(block, "manifest_filepath") or block.manifest_filepath is not None


def _mixer(config: DictConfig, key: str) -> tuple[Callable[..., NoiseBatch] | None, AugmentationConfig | None]:
    block = OmegaConf.select(config, f"{key}.batch_augmentor")
    if block is None:
        return None, None
    if "_target_" not in block:
        raise ConfigError(f"{key}.batch_augmentor._target_ is missing: name the augmentation, e.g. {_DEFAULT_MIXER}.")
    return _MIXERS[TARGETS[block["_target_"]]], section(AugmentationConfig, config, f"{key}.batch_augmentor")
