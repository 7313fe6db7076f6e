"""From manifests to batches: Lightning's data module, its loaders, and the position of a resumed run in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig

from nestcli.audio.load import Samples
from nestcli.config import section, seed_of
from nestcli.data.batch_plan import BatchPlan
from nestcli.data.corpus import Corpus, DatasetConfig, noise_manifest, read_corpus, wants_validation
from nestcli.data.dataset import MIN_SECONDS, NoiseBatch, NoisySpeech, SkipCounter
from nestcli.data.loader.device_copies import CudaStream, DeviceCopies
from nestcli.data.loader.loader import Loader, slots
from nestcli.data.loader.watch import Watch
from nestcli.data.preflight import check_noise, check_speech, machine_notes
from nestcli.data.sampler import OnePass, Place, Position, ResumableSampler, plan_batches
from nestcli.data.utterance_audio import NoisePool
from nestcli.errors import DataError, NestError
from nestcli.jobs.cores import available_cores

_BYTES_A_SAMPLE, _BYTES_AN_UTTERANCE = 8, 24  # of a batch: clean and noisy audio in float32; three lengths in int64


class NestDataModule(LightningDataModule):
    """The loaders of `model.train_ds` and `model.validation_ds`.

    `batches` is the length of the training loader: one epoch, unless the run sets the number for all its epochs.
    `tell` receives messages for the user: audio that was left out, data that changed since the checkpoint. Loaders take
    batches to `device` if it is a GPU; Lightning's trainer, if there is one, decides which.
    """

    def __init__(self, config: DictConfig, tell: Callable[[str], None] = lambda message: None) -> None:
        super().__init__()
        self.config, self.tell = config, tell
        self.batches: int | None = None
        self.device: torch.device | None = None
        self.seed = seed_of(config)
        self.train = read_corpus(config, "model.train_ds")
        self.train_noise = self._noise_pool("model.train_ds")
        self.val = read_corpus(config, "model.validation_ds") if wants_validation(config) else None
        self.val_noise = self._noise_pool("model.validation_ds") if self.val else None
        self.sample_rate = int(config.model.sample_rate)
        self.skipped = SkipCounter(self._settings("model.train_ds").max_failed_share, tell)
        self._val_skipped = SkipCounter(1.0, tell)
        self._plans: dict[tuple[str, int], BatchPlan] = {}
        self._sampler: ResumableSampler | None = None
        self._restored: Position | None = None
        self._restored_at = 0  # batches that each process had counted at the checkpoint
        self._loaders: WeakSet[Loader] = WeakSet()

    # ---- plans and single batches ----

    def train_plan(self, ranks: int = 1) -> BatchPlan:
        """Return the plan of training for `ranks` processes in total. Raises DataError if it has no batches."""
        plan = self._plan(self.train, "model.train_ds", ranks * self._accumulate())
        if len(plan.batches(0)) == 0:
            settings = self._settings("model.train_ds")
            raise DataError(
                f"model.train_ds: {len(self.train.speech)} utterances do not fill one batch of "
                f"{settings.batch_size}. Lower model.train_ds.batch_size, or set model.train_ds.drop_last=false."
            )
        return plan

    def train_batch(self, epoch: int, number: int) -> NoiseBatch:
        """Return one batch of training, made in this process. Raises NestError."""
        batch = self._data(self.train, self.train_noise, "model.train_ds")[
            Place(epoch, self.train_plan().batches(epoch)[number])
        ]
        return self._counted(batch, self.skipped)

    def readable_speech(self, lines: list[int]) -> list[Samples]:
        """Return the clean audio of lines of the training data, read in this process, without unreadable ones."""
        data = self._data(self.train, None, "model.train_ds")
        return data.speech_of(np.array(lines))[1]

    def check_validation_batch(self) -> None:
        """Make the first batch of validation, if there is validation data. Raises NestError."""
        if self.val is not None:
            batches = self._plan(self.val, "model.validation_ds").batches(0)
            data = self._data(self.val, self.val_noise, "model.validation_ds")
            self._counted(data[Place(0, batches[0])], self._val_skipped)

    def check_ready(self, ranks: int = 1, nodes: int = 1) -> None:
        """Check that the files exist, and warn if cores or memory are short for `ranks` processes. Raises DataError."""
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
                plan = self._plan(corpus, key, ranks * self._accumulate())
                n_bytes = _slot_bytes(plan, settings) * slots(_workers(settings))
                for told in machine_notes(key, settings.num_workers, n_bytes, ranks // nodes):
                    self.tell(told)

    # ---- Lightning's hooks ----

    def train_dataloader(self) -> Loader | InProcess:
        ranks, rank = self._ranks()
        plan = self.train_plan(ranks)
        length = self.batches or -(-len(plan.batches(0)) // ranks)
        self._sampler = ResumableSampler(
            plan, length, lambda: self._start(plan), ranks=ranks, rank=rank, used=self._counted_batches
        )
        data = self._data(self.train, self.train_noise, "model.train_ds")
        return self._loader(data, self._sampler, "model.train_ds")

    def val_dataloader(self) -> Loader | InProcess | list[Any]:
        if self.val is None:
            return []
        ranks, rank = self._ranks()
        sampler = OnePass(self._plan(self.val, "model.validation_ds"), ranks=ranks, rank=rank)
        data = self._data(self.val, self.val_noise, "model.validation_ds")
        return self._loader(data, sampler, "model.validation_ds")

    def teardown(self, stage: str) -> None:
        """Stop the loader processes at the end of the run."""
        for loader in self._loaders:
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("exception")

    def on_before_batch_transfer(self, batch: NoiseBatch | NestError, dataloader_idx: int) -> NoiseBatch:
        training = self.trainer is None or self.trainer.training
        return self._counted(batch, self.skipped if training else self._val_skipped)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the run and the fingerprint of its data; the same on every rank."""
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
                f"the run continues with epoch {self._restored.epoch} from its beginning."
            )

    # ---- parts ----

    def _tell_of_processes(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        """Report how a run continues after a change of the number of processes or of accumulated batches."""
        batches = [ranks * accumulate for ranks, accumulate in (before, now)]
        means = (
            f"A step still takes {batches[0]} batches, the same that it would have taken."
            if batches[0] == batches[1]
            else f"A step takes {batches[1]} batches in place of {batches[0]}; steps and learning rate are counted on. "
            f"For steps of {batches[0]}, keep processes x trainer.accumulate_grad_batches at that."
        )
        self.tell(
            f"The run continues with {now[0]} x {now[1]} batches (processes x trainer.accumulate_grad_batches), "
            f"before {before[0]} x {before[1]}. {means}"
        )

    def _start(self, plan: BatchPlan) -> Position:
        """Return the epoch of the run's next batch, and the batch's number in that epoch."""
        consumed = self._consumed()
        start = Position(0, 0, 0)  # from the beginning, or from a checkpoint without a position
        if self._restored is not None and self._restored.consumed <= consumed:
            start = self._restored
        epoch, number = start.epoch, start.number + consumed - start.consumed
        while number and number >= (length := len(plan.batches(epoch, consumed - number))):
            number -= length
            epoch += 1
        return Position(consumed, epoch, number)

    def _consumed(self) -> int:
        """Return the training batches that all processes have used in the run, including those before a resume."""
        before = 0 if self._restored is None else self._restored.consumed
        return before + (self._counted_batches() - self._restored_at) * self._ranks()[0]

    def _counted_batches(self) -> int:
        """Return the training batches that Lightning has counted in this process."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready) if self.trainer else 0

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _accumulate(self) -> int:
        return int(self.config.trainer.accumulate_grad_batches)

    def _settings(self, key: str) -> DatasetConfig:
        return section(DatasetConfig, self.config, key)

    def _plan(self, corpus: Corpus, key: str, batches_per_step: int = 1) -> BatchPlan:
        """Return the plan of a corpus, made once per number of batches in a step."""
        if (key, batches_per_step) not in self._plans:
            settings = self._settings(key)
            made = plan_batches(corpus, settings, key, seed=self.seed, batches_per_step=batches_per_step)
            self._plans[key, batches_per_step] = made
        return self._plans[key, batches_per_step]

    def _data(self, corpus: Corpus, noise: NoisePool | None, key: str) -> NoisySpeech:
        return NoisySpeech(corpus.speech, noise, self.seed, self.config, key)

    def _noise_pool(self, key: str) -> NoisePool | None:
        manifest = noise_manifest(self.config, key)
        return None if manifest is None else NoisePool(manifest, self._settings(key).sample_rate)

    def _counted(self, batch: NoiseBatch | NestError, counter: SkipCounter) -> NoiseBatch:
        if isinstance(batch, NestError):
            raise batch
        counter.add(len(batch.sample_ids) if batch.counts else 0, batch.skipped)
        return batch

    def _loader(self, data: NoisySpeech, sampler: ResumableSampler | OnePass, key: str) -> Loader | InProcess:
        settings = self._settings(key)
        if settings.num_workers == 0:
            return InProcess(data, sampler)
        workers = _workers(settings)
        device = self.device if self.trainer is None else self.trainer.strategy.root_device
        copies = None
        if device is not None and device.type == "cuda" and settings.pin_memory:
            copies = DeviceCopies(CudaStream(device))
        loader = Loader(
            data,
            sampler,
            workers=workers,
            watch=Watch(
                workers, key, settings.read_timeout, [data.speech, *([data.noise.manifest] if data.noise else [])]
            ),
            slot_bytes=_slot_bytes(sampler.plan, settings),
            copies=copies,
        )
        self._loaders.add(loader)
        return loader


class InProcess:
    """Iterates over the batches of `places`, a sampler, made by this process."""

    def __init__(self, data: NoisySpeech, places: ResumableSampler | OnePass) -> None:
        self.data, self.places = data, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[NoiseBatch | NestError]:
        return map(self.data.__getitem__, self.places)


def _workers(settings: DatasetConfig) -> int:
    return min(settings.num_workers, available_cores())


def _slot_bytes(plan: BatchPlan, settings: DatasetConfig) -> int:
    """Return the size of a slot for any batch of a plan. Only what batches really use of it takes memory."""
    seconds = plan.largest_batch(MIN_SECONDS) + MIN_SECONDS
    utterances = seconds / MIN_SECONDS
    return int(seconds * settings.sample_rate * _BYTES_A_SAMPLE + utterances * _BYTES_AN_UTTERANCE) + (1 << 16)


def recounted(batches: int, accumulated: int, accumulate: int) -> int:
    """Return the batches that a process would have counted if each optimizer step had taken `accumulate`."""
    return batches if accumulated == accumulate else batches // accumulated * accumulate
