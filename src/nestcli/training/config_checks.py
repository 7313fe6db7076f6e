"""Checks of a run's configuration: its blocks, masks that mask nothing, and keys without effect."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import DictConfig, OmegaConf

from nestcli.checks import as_written, check_digits
from nestcli.config import leaves, raw_config, section, seed_of
from nestcli.data.corpus import DatasetConfig
from nestcli.data.dataset import MIN_SECONDS
from nestcli.data.mixing import AugmentationConfig
from nestcli.errors import ConfigError
from nestcli.model.config import NestConfig, OptimizerConfig, ScheduleConfig
from nestcli.model.loss import MaskedTokenLoss
from nestcli.model.masking import draw_mask
from nestcli.training.settings import CheckpointConfig, ManagerConfig, NestBlock, TrainerConfig

_TRIED, _AT_A_TIME = 4096, 64  # utterances for trial masks, until one has a masked token
_BLOCKS = ("model.train_ds", "model.validation_ds")


def check_settings(config: DictConfig) -> None:
    """Check every block that a run reads, but no data. Raises ConfigError that names the key."""
    check_digits(OmegaConf.to_container(config, resolve=False), "the configuration")
    seed_of(config)
    section(TrainerConfig, config, "trainer")
    section(ManagerConfig, config, "exp_manager")
    section(CheckpointConfig, config, "exp_manager.checkpoint_callback_params")
    for key in ("exp_manager.wandb_logger_kwargs", "model.spec_augment"):
        if not isinstance(block := OmegaConf.select(config, key), DictConfig | None):
            raise ConfigError(
                f"{key}: {as_written(block)} must be a block of keys. Leave it out, or set single keys of it."
            )
    NestBlock.of(config)
    optim = section(OptimizerConfig, config, "model.optim")
    sched = section(ScheduleConfig, config, "model.optim.sched")
    if sched.min_lr > optim.lr:
        raise ConfigError(f"model.optim.sched.min_lr: {sched.min_lr} is above model.optim.lr={optim.lr}.")
    nest = NestConfig.from_config(config)
    if nest.masking.mask_prob == 0:
        raise ConfigError("model.masking.mask_prob: 0 masks nothing, so the model would learn nothing. Raise it.")
    if not nest.quantizer.freeze:
        raise ConfigError(
            "model.quantizer.freeze: false has no effect: tokens are looked up, so the loss has no gradient for the "
            "projection and the codebooks (the same holds in NeMo). Set it to true."
        )
    for key in _BLOCKS:
        if (block := OmegaConf.select(config, key)) is None:
            continue
        settings = section(DatasetConfig, config, key)
        if settings.sample_rate != nest.preprocessor.sample_rate:
            raise ConfigError(
                f"{key}.sample_rate is {settings.sample_rate}, but model.preprocessor.sample_rate is "
                f"{nest.preprocessor.sample_rate}. Set model.sample_rate alone."
            )
        if block.get("batch_augmentor") is not None:
            section(AugmentationConfig, config, f"{key}.batch_augmentor")


# ---- masks ----


def check_masks(config: DictConfig, key: str, durations: npt.NDArray[np.float64], note: Callable[[str], None]) -> None:
    """Check that masks fall on the utterances, whose durations are in seconds.

    Raises ConfigError if no token of the training data is ever masked. Reports validation data without masked tokens,
    and utterances that are too short for a block, if they are many.
    """
    nest = NestConfig.from_config(config)
    preprocessor, masking = nest.preprocessor, nest.masking
    frames = (np.maximum(durations, MIN_SECONDS) * preprocessor.sample_rate).astype(np.int64) // preprocessor.hop_length
    per_token = nest.encoder.subsampling_factor
    if nest.mask_after_subsampling:
        frames = -(-frames // per_token)
    if not _any_token_masked(nest, frames):
        given = config.model.masking.block_size
        if masking.allow_overlap and int(frames.max()) < masking.block_size:
            problem = f"model.masking.block_size: a block of {given} frames is longer than every utterance"
            remedy = "Lower it, or leave short utterances out (min_duration)."
        else:
            problem = "model.masking: in trial draws no token had enough of its frames masked"
            remedy = "Raise mask_prob, block_size or max_mask_ratio, or lower model.loss.mask_threshold."
        message = f"{problem} in {key} (the longest utterance lasts {durations.max():.2f} s)"
        if key == _BLOCKS[0]:
            raise ConfigError(f"{message}: nothing is masked, so the model would learn nothing. {remedy}")
        note(f"{message}: nothing is masked, so there will be no validation loss. {remedy}")
    elif masking.allow_overlap and 2 * (short := int((frames < masking.block_size).sum())) >= len(frames):
        note(
            f"{short:,} of the {len(frames):,} utterances of {key} are shorter than a block of "
            f"model.masking.block_size, so nothing of them is masked."
        )


def _any_token_masked(nest: NestConfig, frames: npt.NDArray[np.int64]) -> bool:
    """Return True if trial masks of the longest and of random utterances mask enough of any token."""
    masking, steps = nest.masking, nest.loss.combine_time_steps
    loss = MaskedTokenLoss(nest.loss)
    rng, longest = np.random.default_rng(0), np.sort(frames)[-_AT_A_TIME:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for start in range(0, _TRIED, _AT_A_TIME):
            lengths = torch.from_numpy(longest if start == 0 else rng.choice(frames, _AT_A_TIME))
            n_frames = -(-int(lengths.max()) // steps) * steps
            if bool(loss.select(draw_mask(lengths, n_frames, masking)).any()):
                return True
    return False


# ---- keys without effect ----


def without_effect(config: DictConfig) -> list[str]:
    """Return a line for each key that is set but has no effect in this run."""
    standard = dict(leaves(raw_config("nest_fast-conformer")))
    found = []
    for key, why in _unused(config):
        value = OmegaConf.select(config, key)
        usual = standard.get(key, _USUAL.get(key.rpartition(".")[2]))
        if value is not None and value != usual:
            found.append(f"{key}={as_written(value)} has no effect: {why}.")
    return found


_USUAL = {
    "concat_sampling_scale": 1.0,
    "concat_shuffle": True,
    "use_bucketing": False,
}  # defaults that NeMo's file does not have
_CONCAT = (
    "concat_sampling_technique", "concat_sampling_temperature", "concat_sampling_scale",
    "concat_sampling_probabilities", "concat_sampling_seed", "concat_shuffle",
)  # fmt: skip
_OF_LHOTSE = (
    "cuts_path", "shar_path", "input_cfg", "reweight_temperature", "use_bucketing", "batch_duration",
    "quadratic_duration", "num_buckets", "bucket_duration_bins", "bucket_batch_size", "shuffle_buffer_size",
)  # fmt: skip
_OF_BUCKETS = ("num_buckets", "bucket_duration_bins", "bucket_batch_size")


def _unused(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys that this run does not use, whatever their value, and the reason."""
    for name in ("freq_masks", "time_masks", "freq_width", "time_width"):
        yield f"model.spec_augment.{name}", "NEST, as in NeMo, does not use SpecAugment"
    model, encoder, trainer = config.model, config.model.encoder, config.trainer
    if encoder.get("backend", "nest") == "nest":
        yield "model.encoder.pos_emb_max_len", "the table of positions grows as needed"
    if not encoder.stochastic_depth_drop_prob:
        for name in ("mode", "start_layer"):
            yield f"model.encoder.stochastic_depth_{name}", "model.encoder.stochastic_depth_drop_prob is 0"
    if model.masking.get("mask_value") is not None:
        yield "model.masking.freeze", "model.masking.mask_value is set and is not trained"
    if model.optim.sched.get("warmup_ratio") is not None:
        yield "model.optim.sched.warmup_steps", "model.optim.sched.warmup_ratio is set and takes precedence"
    if isinstance(trainer.val_check_interval, int):
        yield "trainer.check_val_every_n_epoch", "trainer.val_check_interval is a number of batches"
    if not trainer.gradient_clip_val:
        yield "trainer.gradient_clip_algorithm", "trainer.gradient_clip_val is 0"
    if not config.exp_manager.create_wandb_logger:
        for name, _ in leaves(config.exp_manager.get("wandb_logger_kwargs") or {}):
            yield f"exp_manager.wandb_logger_kwargs.{name}", "exp_manager.create_wandb_logger is false"
    if (config.get("nest") or {}).get("max_bad_steps", 10) is None:
        yield "nest.explode_factor", "nest.max_bad_steps is null, so no step is skipped"
    for key in _BLOCKS:
        if OmegaConf.select(config, key) is not None:
            yield from (
                (f"{key}.{name}", why)
                for name, why in _unused_of_data(section(DatasetConfig, config, key), config, key)
            )


def _unused_of_data(settings: DatasetConfig, config: DictConfig, key: str) -> Iterator[tuple[str, str]]:
    yield "use_start_end_token", "it belongs to NeMo's text data sets"
    if not settings.is_concat:
        yield from ((name, "is_concat is false") for name in _CONCAT)
    elif settings.concat_sampling_technique != "temperature":
        yield "concat_sampling_temperature", f"concat_sampling_technique is {settings.concat_sampling_technique}"
    if settings.is_concat and settings.concat_sampling_technique != "random":
        yield "concat_sampling_probabilities", f"concat_sampling_technique is {settings.concat_sampling_technique}"
    block = OmegaConf.select(config, key)
    if not settings.use_lhotse:
        yield from ((name, "use_lhotse is false") for name in _OF_LHOTSE)
        if not settings.is_tarred:
            yield "tarred_audio_filepaths", "is_tarred is false"
            yield "shuffle_n", "is_tarred is false"
    else:
        yield "shuffle_n", "use_lhotse is true: set shuffle_buffer_size"
        if settings.use_bucketing is False:
            yield from ((name, "use_bucketing is false") for name in _OF_BUCKETS)
        elif settings.bucket_duration_bins is not None:
            yield "num_buckets", "bucket_duration_bins are given"
        if settings.batch_duration is None:
            yield "quadratic_duration", "batch_duration is not set"
        if settings.buckets and settings.bucket_batch_size is not None:
            yield "batch_duration", "bucket_batch_size is set"
        if block.get("input_cfg") is None:
            yield "reweight_temperature", "input_cfg is not set"
        for first, names in (
            ("input_cfg", ("shar_path", "cuts_path", "manifest_filepath", "tarred_audio_filepaths")),
            ("shar_path", ("cuts_path", "manifest_filepath", "tarred_audio_filepaths")),
            ("cuts_path", ("manifest_filepath", "tarred_audio_filepaths")),
        ):
            if block.get(first) is not None:
                yield from (
                    (name, f"{first} is read instead") for name in names if not OmegaConf.is_missing(block, name)
                )
                break
    in_buckets = _is_nested(OmegaConf.select(block, "manifest_filepath", throw_on_missing=False))
    if settings.is_concat or settings.use_lhotse or not in_buckets:
        for name in ("bucketing_strategy", "bucketing_batch_size", "bucketing_weights"):
            yield name, "manifest_filepath names no buckets ([[SHORT], [LONG], ...])"


def _is_nested(paths: Any) -> bool:
    plain = OmegaConf.to_container(paths) if OmegaConf.is_config(paths) else paths
    return isinstance(plain, list) and any(isinstance(each, list) for each in plain)
