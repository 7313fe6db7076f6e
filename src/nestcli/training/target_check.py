"""Check of the targets before training: statistics of a sample of the data, and a judgement in one sentence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from nestcli.data.datamodule import NestDataModule
from nestcli.files import is_remote
from nestcli.model.nest import NestModel
from nestcli.model.target_statistics import TargetStatistics, target_statistics

_SAMPLE, _SAMPLE_POST_CONV = 300.0, 100.0  # seconds of audio; post_conv also computes the sub-sampling
_LONGEST = 10.0  # seconds of one utterance, so that the sample holds many
_GOLDEN = (math.sqrt(5) - 1) / 2
# Share of a hidden target that the visible frames explain, measured on 15 h of speech: 0.09 for NeMo's blocks of
# 400 ms, which stay on the plateau for 800 steps and more; 0.12 for the demo preset, which leaves it after a hundred;
# 0.20 to 0.25 for blocks of 160 ms and 4 books of 256, below the loss of guessing from step 150 on (docs/training.md).
_LITTLE, _ENOUGH = 0.10, 0.17
_FEW_CODES = 10.0  # perplexity below which the targets hardly tell one sound from another
_UNTRAINED = (
    "They come from the untrained sub-sampling and change while it trains; model.mask_position=pre_conv has fixed ones."
)
_SHORT_BLOCK, _MANY_CODES, _SHORT_TOKEN = 16, 1024, 4  # settings of runs that learned early


@dataclass(frozen=True)
class TargetCheck:
    """The statistics of a run's targets, and a sentence about the start of training."""

    statistics: TargetStatistics
    judgement: str


def check_targets(
    config: DictConfig,
    data: NestDataModule,
    model: NestModel,
    note: Callable[[str], None],
    *,
    patience: float,
    remote: bool = False,
) -> TargetCheck | None:
    """Examine the targets of a sample of the training data; `note` tells the reason if that is impossible.

    Stops reading after `patience` seconds, and reads remote audio only on request. Never raises: a run does not need
    this check.
    """
    try:
        audios = read_sample(data, _SAMPLE_POST_CONV if model.mask_after_subsampling else _SAMPLE, patience, remote)
        statistics = target_statistics(model, audios)
    except Exception as error:
        note(f"targets    not examined: {error or type(error).__name__}")
        return None
    return TargetCheck(statistics, judgement(statistics, config))


def read_sample(data: NestDataModule, seconds: float, patience: float, remote: bool) -> list[Tensor]:
    """Return clean audio (N,) of utterances, spread evenly over the training set, `seconds` in total.

    Utterances that cannot be read are left out. Raises ValueError if none can be read.
    """
    speech, end = data.train.speech, time.monotonic() + patience
    longest = int(max(_LONGEST, seconds / len(speech)) * data.sample_rate)
    mean = float(np.minimum(speech.durations, longest / data.sample_rate).mean())
    count = min(len(speech), math.ceil(seconds / mean))
    lines = np.linspace(0, len(speech) - 1, count).astype(int)
    audios: list[Tensor] = []
    # Steps of the golden ratio: the first few lines are spread evenly too, if time runs out.
    for line in lines[np.argsort(np.arange(count) * _GOLDEN % 1)].tolist():
        entry = speech.entry(line)
        if is_remote(entry.shard or entry.audio_filepath) and not remote:
            raise ValueError("the audio is remote; --dry-run reads it and examines them")
        audios += [torch.from_numpy(audio[:longest]) for audio in data.readable_speech([line])]
        if time.monotonic() > end:
            break
    if not audios:
        raise ValueError(f"no audio of model.train_ds could be read within {patience:g} s")
    return audios


def judgement(statistics: TargetStatistics, config: DictConfig) -> str:
    """Return a sentence about the plateau at the loss of guessing by frequency, and the changes that shorten it."""
    share, distance = statistics.explained_by_visible, statistics.nearest_visible
    if statistics.perplexity < _FEW_CODES:
        cause = _UNTRAINED if config.model.mask_position == "post_conv" else "Check the audio for silence and copies."
        return (
            f"The targets hold little: a perplexity of {statistics.perplexity:.1f} codes in {statistics.tokens:,} "
            f"tokens. {cause}"
        )
    if math.isnan(share):
        return "The sample is too small to tell how much of a hidden target the visible frames explain."
    measured = (
        f"a hidden token is {distance:.1f} tokens from the nearest visible frames on average, and the visible frames "
        f"explain {share:.0%} of its target"
    )
    if share >= _ENOUGH:
        codes = config.model.quantizer.num_classes
        known = f" (Runs that did had at most {_MANY_CODES:,} codes; this one has {codes:,}.)"
        return (
            f"Expect the loss to fall below guessing by frequency within a few hundred steps: {measured}."
            f"{known if codes > _MANY_CODES else ''}"
        )
    length = "a long plateau" if share < _LITTLE else "a plateau of a hundred steps or more"
    changes = remedies(config)
    advice = f" To shorten it, use {', '.join(changes)}." if changes else ""
    return f"Expect {length} at the loss of guessing by frequency: {measured}.{advice}"


def remedies(config: DictConfig) -> list[str]:
    """Return the changes of the targets and masks that help a run to leave the plateau, the strongest first."""
    masking, changes = config.model.masking, []
    if masking.block_size > _SHORT_BLOCK:
        shares = f"model.masking.block_size={_SHORT_BLOCK}"
        if masking.allow_overlap and masking.mask_prob < 1:  # the same share of frames is masked
            prob = 1 - (1 - masking.mask_prob) ** (masking.block_size / _SHORT_BLOCK)
            shares += f" model.masking.mask_prob={prob:.2g}"
        changes.append(f"shorter blocks ({shares})")
    if config.model.encoder.subsampling_factor > _SHORT_TOKEN:
        changes.append(f"shorter tokens (model.encoder.subsampling_factor={_SHORT_TOKEN})")
    if config.model.quantizer.num_classes > _MANY_CODES:
        changes.append("fewer codes (model.num_classes=256 model.num_books=4)")
    return changes
