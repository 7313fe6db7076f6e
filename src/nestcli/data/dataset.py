"""One batch: speech and noise are read, cut and mixed.

Every draw depends on (seed, epoch, item) alone, so a batch is the same in any process, and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from nestcli.audio.channel import Channel, parsed_channel
from nestcli.config import section
from nestcli.data.augmentation import AugmentationConfig, mix_one_speaker_or_noise, mix_speakers_and_noise
from nestcli.data.batch import Empty, NoiseBatch, Samples, Skipped, collate, empty
from nestcli.data.dataset_config import DatasetConfig
from nestcli.data.manifest import Manifest
from nestcli.data.noise_pool import NoisePool
from nestcli.data.order import Items
from nestcli.data.sampler import Place
from nestcli.data.utterance_audio import read_audio
from nestcli.errors import ConfigError, DataError, NestError
from nestcli.jobs.activity import Noted
from nestcli.targets import TARGETS

MIN_SECONDS = 1.0  # a clip that turns out shorter is repeated up to this length, as in NeMo
_REPLACEMENTS = 20  # lines tried in place of a batch of which nothing can be read
_MIXERS = {"multi_speaker_noise": mix_speakers_and_noise, "speaker_noise": mix_one_speaker_or_noise}
_DEFAULT_MIXER = "nestcli.MultiSpeakerNoiseAugmentation"


class NoisySpeech(Dataset[NoiseBatch | NestError]):
    """Batches by place: clean speech, noise and their mixture.

    Audio that cannot be read is left out of its batch and named there. An error that a user can mend is returned, not
    raised: it is raised in the batch's turn, when the trainer uses it.
    """

    def __init__(self, speech: Manifest, noise: NoisePool | None, seed: int, config: DictConfig, key: str) -> None:
        self.speech, self.noise, self.seed = speech, noise, seed
        settings = section(DatasetConfig, config, key)
        self.sample_rate, self.channel, self.channel_field = (
            settings.sample_rate,
            settings.channel,
            settings.channel_field,
        )
        self.mix, self.augmentation = _mixer(config, key)
        self.make_array: Empty = empty  # a loader process makes batches in the memory that it sends them in

    def __getitem__(self, place: Place) -> NoiseBatch | NestError:
        try:
            return self._batch(place)
        except NestError as error:
            return error

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

        clean = collate(audios, None, lines, self.make_array)
        return self.mix(clean, self.augmentation, generator, noise_of, None, self.make_array)

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
            field, line = self.channel_field, item % len(self.speech)
            channel = self.channel if field is None else self._named_channel(line, field)
            audio = read_audio(entry, sample_rate=self.sample_rate, channel=channel)
        shortest = int(MIN_SECONDS * self.sample_rate)
        return np.resize(audio, shortest) if len(audio) < shortest else audio

    def _named_channel(self, line: int, field: str) -> Channel | None:
        """The channel in the field that channel_selector names. Raises DataError for a line without one."""
        value = self.speech.row(line).get(field)
        try:
            if value is None:
                raise ValueError(f"there is no {field!r}, which channel_selector names")
            return parsed_channel(value)
        except ValueError as error:
            raise DataError(f"{self.speech.where(line)}: {error}") from None

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


def _mixer(config: DictConfig, key: str) -> tuple[Callable[..., NoiseBatch] | None, AugmentationConfig | None]:
    block = OmegaConf.select(config, f"{key}.batch_augmentor")
    if block is None:
        return None, None
    if "_target_" not in block:
        raise ConfigError(f"{key}.batch_augmentor._target_ is missing: name the augmentation, e.g. {_DEFAULT_MIXER}.")
    return _MIXERS[TARGETS[block["_target_"]]], section(AugmentationConfig, config, f"{key}.batch_augmentor")
