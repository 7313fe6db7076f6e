"""The data set: reads the speech and noise of one batch, cuts them and mixes them. Open this file first.

Every draw depends only on (seed, epoch, item), so a batch is the same in any process, and after a resume.

With `nemo_exact`, draws and result equal those of NeMo's `SpeakerNoiseAugmentation` and `MultiSpeakerNoiseAugmentation`
from the same seed. Without it, an item that is not augmented stays clean and complete, segments never run out, noise
mode falls back to speech if there is no noise, mixtures beyond full scale are scaled down, and the lengths of segments
are drawn in one step instead of sample by sample.

Axes: B batch, N samples, zero-padded to the longest item.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from nestcli.audio.load import Channel, Samples, parsed_channel
from nestcli.config import section
from nestcli.data.batch_plan import Items
from nestcli.data.corpus import DatasetConfig
from nestcli.data.manifest import Manifest
from nestcli.data.mixing import (
    AugmentationConfig,
    Given,
    Mixture,
    NoiseOf,
    Pieces,
    mix_in,
    one_stretch_of,
    scattered_segments,
)
from nestcli.data.sampler import Place
from nestcli.data.utterance_audio import NoisePool, Skipped, read_audio
from nestcli.errors import ConfigError, DataError, NestError
from nestcli.targets import TARGETS

MIN_SECONDS = 1.0  # a shorter clip is repeated up to this length, as in NeMo
_REPLACEMENTS = 20  # lines tried in place of a batch without any readable item
_JUDGED_FROM = 100  # utterances; with fewer, one corrupt file is a large share
_DEFAULT_MIXER = "nestcli.MultiSpeakerNoiseAugmentation"


@dataclass(frozen=True)
class NoiseBatch:
    """Clean speech, the noise or speech mixed into it, and the mixture. Source: NeMo `AudioNoiseBatch`.

    `sample_ids` are line numbers of the manifest. `counts` is False for a filler batch: all ranks need equally many.
    `skipped` lists the lines that belong to the batch but could not be read.
    """

    audio: Tensor  # (B, N) float32
    audio_len: Tensor  # (B,) int64, samples
    noise: Tensor  # (B, N)
    noise_len: Tensor  # (B,)
    noisy_audio: Tensor  # (B, N)
    noisy_audio_len: Tensor  # (B,)
    sample_ids: tuple[int, ...] = ()
    counts: bool = True
    skipped: tuple[Skipped, ...] = ()

    def to(self, device: torch.device) -> NoiseBatch:
        """Return the batch on a device, without a copy of tensors that it already holds."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


Empty = Callable[[tuple[int, ...]], Samples]  # allocates an array; its content is undefined


def empty(shape: tuple[int, ...]) -> Samples:
    return np.empty(shape, np.float32)


class NoisySpeech(Dataset[NoiseBatch | NestError]):
    """Data set that returns the batch of a place: clean speech, noise and their mixture.

    Audio that cannot be read is left out of its batch and named in it. An error that the user can fix is returned, not
    raised: it is raised in the batch's turn, when the trainer uses it.
    """

    def __init__(self, speech: Manifest, noise: NoisePool | None, seed: int, config: DictConfig, key: str) -> None:
        self.speech, self.noise, self.seed = speech, noise, seed
        settings = section(DatasetConfig, config, key)
        self.sample_rate, self.channel = settings.sample_rate, settings.channel
        self.channel_field = settings.channel_field
        self.mix, self.augmentation = _mixer(config, key)
        self.make_array: Empty = empty  # a loader process makes batches in the memory that it sends them in

    def __getitem__(self, place: Place) -> NoiseBatch | NestError:
        try:
            return self._batch(place)
        except NestError as error:
            return error

    def _batch(self, place: Place) -> NoiseBatch:
        items, audios, skipped = self.speech_of(place.items)
        counts = place.counts
        if not audios:
            items, audios = self._replacement(int(place.items[0]), skipped)
            counts = False
        batch = self._noisy(place.epoch, items, audios)
        if self.noise is not None:
            skipped += self.noise.take_skipped()
        unneeded = torch.empty(0)  # the model uses only audio and noisy audio; this saves a third of what is sent
        return replace(batch, noise=unneeded, counts=counts, skipped=tuple(skipped))

    def _noisy(self, epoch: int, items: list[int], audios: list[Samples]) -> NoiseBatch:
        lines = [item % len(self.speech) for item in items]
        if self.mix is None or self.augmentation is None:
            batch = collate(audios, self._noises(epoch, items, audios), lines)
            return replace(batch, noisy_audio=batch.audio + batch.noise)  # without mixing, as in NeMo
        generator = self._generator("mix", epoch, items[0])
        if self.augmentation.nemo_exact:
            return self.mix(collate(audios, self._noises(epoch, items, audios), lines), self.augmentation, generator)

        def noise_of(
            place: int, count: int
        ) -> Samples:  # draws as the pool does, but reads only the part that is mixed in
            return self._noise(epoch, items[place], len(audios[place]), count)

        clean = collate(audios, None, lines, self.make_array)
        return self.mix(clean, self.augmentation, generator, noise_of, None, self.make_array)

    def _noises(self, epoch: int, items: list[int], audios: list[Samples]) -> list[Samples]:
        return [self._noise(epoch, item, len(audio)) for item, audio in zip(items, audios, strict=True)]

    def speech_of(self, wanted: Items) -> tuple[list[int], list[Samples], list[Skipped]]:
        """Return the readable items, their audio, and the faults of the others."""
        items, audios, skipped = [], [], []
        for item in wanted.tolist():
            try:
                audios.append(self._speech(item))
                items.append(item)
            except DataError as error:
                skipped.append(Skipped(self.speech.where(item % len(self.speech)), str(error)))
        return items, audios, skipped

    def _replacement(self, item: int, skipped: list[Skipped]) -> tuple[list[int], list[Samples]]:
        """Return the next readable line, to compute something on if no item of a batch is readable."""
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
        field, line = self.channel_field, item % len(self.speech)
        with self.speech.reading(line) as entry:
            channel = self.channel if field is None else self._named_channel(line, field)
            audio = read_audio(entry, sample_rate=self.sample_rate, channel=channel)
        shortest = int(MIN_SECONDS * self.sample_rate)
        return np.resize(audio, shortest) if len(audio) < shortest else audio

    def _named_channel(self, line: int, field: str) -> Channel | None:
        """Return the channel from the field that channel_selector names. Raises DataError for a line without it."""
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


# ---- padding items into a batch ----


def collate(
    audios: Sequence[Samples], noises: Sequence[Samples] | None, sample_ids: Sequence[int], empty: Empty = empty
) -> NoiseBatch:
    """Zero-pad items to the longest one, and cut or pad the noise to the same width. Does not mix anything."""
    longest = max(len(audio) for audio in audios)
    audio = torch.from_numpy(_stacked(audios, longest, empty))
    audio_len = torch.tensor([len(item) for item in audios])
    noise = torch.empty(len(audios), 0) if noises is None else torch.from_numpy(_stacked(noises, longest, empty))
    return NoiseBatch(
        audio=audio,
        audio_len=audio_len,
        noise=noise,
        noise_len=torch.tensor([0] * len(audios) if noises is None else [min(len(item), longest) for item in noises]),
        noisy_audio=audio,
        noisy_audio_len=audio_len,
        sample_ids=tuple(sample_ids),
    )


def _stacked(items: Sequence[Samples], width: int, empty: Empty) -> Samples:
    stacked = empty((len(items), width))
    for row, item in zip(stacked, items, strict=True):
        kept = item[:width]
        row[: len(kept)] = kept
        row[len(kept) :] = 0
    return stacked


# ---- mixing noise and other speech into a batch ----


def _mixed(
    batch: NoiseBatch,
    config: AugmentationConfig,
    rng: random.Random,
    noise_of: NoiseOf | None = None,
    record: list[Mixture | None] | None = None,
    empty: Empty = empty,
    *,
    choose: Callable[[int, Given], Pieces | None],
) -> NoiseBatch:
    """Mix what `choose` picks into each item with probability `prob`.

    The noise is that of the batch, or comes from `noise_of`; then the result has none of its own. `record` receives
    what was done to each item, `empty` allocates the noisy audio.
    """
    raw = batch.noise.numpy()
    raw_lengths = batch.noise_len.tolist()
    audio = batch.audio.numpy()
    given = Given(
        [row[:length] for row, length in zip(audio, batch.audio_len.tolist(), strict=True)],
        audio.shape[1],
        noise_of or (lambda item, count: raw[item, : min(count, raw_lengths[item])]),
        config,
        rng,
    )
    # in NeMo, an item without augmentation keeps its raw noise and the length of that
    noise: Samples | None = None
    if noise_of is None:
        noise = raw.copy() if config.nemo_exact else np.zeros_like(audio)
    noisy = empty(audio.shape)
    noisy[:] = audio
    noise_len = batch.noise_len.clone() if config.nemo_exact else batch.audio_len
    for item in range(len(noisy)):
        pieces = None if rng.random() > config.prob else choose(item, given)
        done = None
        if pieces is not None:
            done = mix_in(item, given, pieces, noise, noisy)
            if config.nemo_exact:
                noise_len[item] = len(given.speech[item])
        elif config.nemo_exact and noise is not None:
            noisy[item] += noise[item]
        if record is not None:
            record.append(done)
    return replace(
        batch,
        noise=torch.empty(len(noisy), 0) if noise is None else torch.from_numpy(noise),
        noise_len=noise_len,
        noisy_audio=torch.from_numpy(noisy),
        noisy_audio_len=noise_len,
    )


# Segments of noise, or of several other speakers of the batch. The ratio in dB is that of the item to the segments,
# over the whole item. Source: arXiv:2408.13106 section 2.4; NeMo `MultiSpeakerNoiseAugmentation`.
mix_speakers_and_noise = partial(_mixed, choose=scattered_segments)

# One stretch of noise, or of one other speaker. The ratio is that of the item to the whole noise. Source: NeMo
# `SpeakerNoiseAugmentation`.
mix_one_speaker_or_noise = partial(_mixed, choose=one_stretch_of)

_MIXERS = {"multi_speaker_noise": mix_speakers_and_noise, "speaker_noise": mix_one_speaker_or_noise}


# ---- utterances that cannot be read during training ----


class SkipCounter:
    """Counts the utterances that were left out. `tell` hears about each line once."""

    def __init__(self, max_share: float, tell: Callable[[str], None]) -> None:
        self.max_share, self.tell = max_share, tell
        self.skipped = self.read = 0
        self._told: set[str] = set()

    def add(self, n_read: int, skipped: tuple[Skipped, ...]) -> None:
        """Count a batch. Raises DataError if more than `max_share` of all utterances could not be read."""
        self.read += n_read
        self.skipped += len(skipped)
        for each in skipped:
            if each.line not in self._told:
                self._told.add(each.line)
                self.tell(f"left out: {each.why}")
        asked = self.read + self.skipped
        if asked >= _JUDGED_FROM and self.skipped > self.max_share * asked:
            raise DataError(
                f"{self.skipped} of {asked} utterances could not be read, more than the share of {self.max_share:g} "
                f"that model.train_ds.max_failed_share allows. The last: {skipped[-1].why}"
            )
