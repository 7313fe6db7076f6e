"""Every number of a configuration has bounds; keys without effect are refused or reported; masks cover tokens."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

from conftest import TINY_RUN, tiny_config
from nestcli.cli.app import app
from nestcli.config import _known_keys, load_config, resolved, section, unused_keys, with_overrides
from nestcli.data.corpus import DatasetConfig
from nestcli.data.mixing import AugmentationConfig
from nestcli.errors import ConfigError, NestError
from nestcli.model.config import (
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    MaskingConfig,
    OptimizerConfig,
    PreprocessorConfig,
    QuantizerConfig,
    ScheduleConfig,
)
from nestcli.model.module import NestModule
from nestcli.training.config_checks import check_masks, check_settings, without_effect
from nestcli.training.run import Pretraining
from nestcli.training.settings import CheckpointConfig, ManagerConfig, NestBlock, TrainerConfig, first_device
from training.test_run import Recorder

# Every key that takes a number, with numbers of the right type just outside of its range, or far beyond it.
NUMBERS: dict[str, tuple[Any, ...]] = {
    "seed": (-1, 2**63, 10**30),
    "model.sample_rate": (0, -1, 10**30),
    "model.num_classes": (0, 1, -5, 10**9),
    "model.num_books": (0, -1, 10**9),
    "model.code_dim": (0, -1, 10**9),
    "model.preprocessor.sample_rate": (0, -1, 10**30),
    "model.preprocessor.window_size": (0.0, -0.1, 1e-9, 100.0),
    "model.preprocessor.window_stride": (0.0, -0.1, 1e-9, 100.0),
    "model.preprocessor.features": (0, -1, 10**9),
    "model.preprocessor.n_fft": (0, -1, 1, 10**9),
    "model.preprocessor.frame_splicing": (0, 2),
    "model.preprocessor.dither": (-1e-5, 1e9),
    "model.preprocessor.pad_to": (0, -16, 3, 10**9),
    "model.preprocessor.pad_value": (1e30, -1e30),
    "model.masking.block_size": (0, -1, 10**9),
    "model.masking.mask_prob": (0.0, -0.1, 1.1),
    "model.masking.feat_in": (0, 79),
    "model.masking.mask_value": (1e30,),
    "model.masking.max_mask_ratio": (0.0, -0.1, 1.1),
    "model.quantizer.feat_in": (0, 79),
    "model.quantizer.code_dim": (0, -1, 10**9),
    "model.quantizer.num_books": (0, -1, 10**9),
    "model.quantizer.num_classes": (0, 1, -1, 10**9),
    "model.quantizer.combine_time_steps": (0, 3),
    "model.encoder.feat_in": (0, 79),
    "model.encoder.feat_out": (0, -2, 10**9),
    "model.encoder.n_layers": (0, -1, 10**9),
    "model.encoder.d_model": (0, -2, 90, 10**9),
    "model.encoder.subsampling_factor": (0, 1, 3, -2, 128),
    "model.encoder.subsampling_conv_channels": (0, -2, 10**9),
    "model.encoder.ff_expansion_factor": (0, -1, 10**9),
    "model.encoder.n_heads": (0, -1, 7, 10**9),
    "model.encoder.att_context_size": ([-2, 0], [0], [0, 10**9], None, [[70, 13], [70, 0]]),
    "model.encoder.pos_emb_max_len": (0, -1, 10**9),
    "model.encoder.conv_kernel_size": (0, 4, -3, 10**9),
    "model.encoder.conv_context_size": ([-1, 9], [1, 2], [4]),
    "model.encoder.dropout": (-0.1, 1.0),
    "model.encoder.dropout_pre_encoder": (-0.1, 1.0),
    "model.encoder.dropout_emb": (-0.1, 1.0),
    "model.encoder.dropout_att": (-0.1, 1.0),
    "model.encoder.stochastic_depth_drop_prob": (-0.1, 1.0),
    "model.encoder.stochastic_depth_start_layer": (0, -1, 10**9),
    "model.decoder.feat_in": (0, 3),
    "model.decoder.num_classes": (0, 3),
    "model.decoder.num_decoders": (0, 3),
    "model.loss.combine_time_steps": (0, 3),
    "model.loss.mask_threshold": (-0.1, 1.0),
    "model.loss.num_decoders": (0, 3),
    "model.optim.lr": (0.0, -1.0, 1e30),
    "model.optim.betas": ([0.9, 1.0], [-0.1, 0.9], [0.9], []),
    "model.optim.weight_decay": (-1e-3, 1e30),
    "model.optim.sched.d_model": (0, -1, 10**9),
    "model.optim.sched.warmup_steps": (-1, 10**30),
    "model.optim.sched.warmup_ratio": (-0.1, 1.1),
    "model.optim.sched.min_lr": (-1e-9, 1e30, 100.0),
    "trainer.devices": (0, -2, 10**30, [0, 0], [-1], []),
    "trainer.num_nodes": (0, -1, 10**30),
    "trainer.max_epochs": (0, -2, 10**30),
    "trainer.max_steps": (0, -2, 10**30),
    "trainer.val_check_interval": (0, -1, 1.5, -0.5, 0.0, 10**30),
    "trainer.check_val_every_n_epoch": (0, -1, 10**30),
    "trainer.accumulate_grad_batches": (0, -1, 10**30),
    "trainer.gradient_clip_val": (-1.0, 1e30),
    "trainer.log_every_n_steps": (0, -1, 10**30),
    "trainer.num_sanity_val_steps": (-2, 10**30),
    "trainer.limit_train_batches": (0, -1, 0.0, 1.5, 10**30),
    "trainer.limit_val_batches": (-1, -0.5, 1.5, 10**30),
    "exp_manager.checkpoint_callback_params.save_top_k": (-2, 10**30),
    "exp_manager.checkpoint_callback_params.every_n_epochs": (-1, 2),
    "exp_manager.checkpoint_callback_params.every_n_train_steps": (-1, 10**30),
    "nest.max_bad_steps": (0, -1, 101),
    "nest.explode_factor": (1.0, 0.0, -1.0, 1e30),
    "nest.collapse_lines": (0, -1, 10**30),
    "nest.matmul_precision": ("fp8", "", 1, True),
    "nest.peak_flops": (0.0, -1.0, 1e30),
    **{
        f"model.{part}.{key}": values
        for part in ("train_ds", "validation_ds")
        for key, values in {
            "sample_rate": (0, -1, 8000, 10**30),
            "batch_size": (0, -1, 10**30),
            "num_workers": (-1, 10**30),
            "max_duration": (0.0, -1.0, 0.5, 1e30),
            "min_duration": (-0.5, 1e5, 1e30),
            "concat_sampling_temperature": (0.0, -1.0, 1e30),
            "concat_sampling_scale": (0.0, -1.0, 1e30),
            "concat_sampling_probabilities": ([0.5, 0.6], [-0.5, 1.5], []),
            "concat_sampling_seed": (-1, 10**30),
            "shuffle_n": (-1, 10**30),
            "bucketing_batch_size": (0, -1, [1, 0], [], 10**30),
            "bucketing_weights": ([0], [-1], [], [10**30]),
            "reweight_temperature": (-1.0, 1e30, []),
            "batch_duration": (0.0, -1.0, 1e30),
            "quadratic_duration": (0.0, -1.0, 1e30),
            "num_buckets": (0, -1, 10**30),
            "bucket_duration_bins": ([4.0, 2.0], [0.0], [], [1e30]),
            "bucket_batch_size": ([1], [0], []),
            "shuffle_buffer_size": (0, -1, 10**30),
            "max_failed_share": (-0.1, 1.1),
            "read_timeout": (0.0, -1.0, 1e30),
            "batch_augmentor.prob": (-0.1, 1.1),
            "batch_augmentor.noise_ratio": (-0.1, 1.1),
            "batch_augmentor.min_r_speech": (-1e3, 1e3),
            "batch_augmentor.max_r_speech": (-1e3, 1e5),
            "batch_augmentor.min_r_noise": (-1e3, 1e5),
            "batch_augmentor.max_r_noise": (-1e3, 1e5),
            "batch_augmentor.min_mix_rate": (-0.1, 1.1),
            "batch_augmentor.max_mix_rate": (-0.1, 1.1),
            "batch_augmentor.min_num_segments": (0, -1, 10**30),
            "batch_augmentor.max_num_segments": (0, -1, 10**30),
            "batch_augmentor.min_num_speakers": (0, -1, 10**30),
            "batch_augmentor.max_num_speakers": (0, -1, 10**30),
        }.items()
    },
}
# What no number may be, wherever it stands.
NO_NUMBERS = (float("nan"), -float("inf"), True, "many", [True], {"a": 1}, 10**5000)
TEXTS = {  # keys that take no number
    "trainer.max_time": ("5 hours", "00:00:00:00", {"hours": -1}, {"fortnights": 1}, 5, [1]),
    "trainer.precision": (12, "64", True, None, [32]),
    "trainer.strategy": ("deepspeed", 1, None),
    "trainer.deterministic": ("often", 1),
    "trainer.gradient_clip_algorithm": ("foo", 1),
    "trainer.logger": (True, "tensorboard"),
    "trainer.enable_checkpointing": (True, None),
    "exp_manager.name": (1, None, ["x"]),
    "exp_manager.checkpoint_callback_params.save_last": ("maybe", 1),
    "model.mask_position": ("nowhere", 1, None),
    "model.encoder.conv_norm_type": ("group_norm7", "group_norm0", "foo"),
    "model.quantizer.freeze": (False,),
    "model.squeeze_single": ("x", 1),
}


# The dataclass that checks a block. Building one takes a hundredth of the time that a whole check does.
BLOCKS: dict[str, type] = {
    "trainer": TrainerConfig,
    "nest": NestBlock,
    "exp_manager": ManagerConfig,
    "exp_manager.checkpoint_callback_params": CheckpointConfig,
    "model.optim": OptimizerConfig,
    "model.optim.sched": ScheduleConfig,
    "model.preprocessor": PreprocessorConfig,
    "model.encoder": EncoderConfig,
    "model.masking": MaskingConfig,
    "model.quantizer": QuantizerConfig,
    "model.decoder": DecoderConfig,
    "model.loss": LossConfig,
    **{f"model.{part}": DatasetConfig for part in ("train_ds", "validation_ds")},
    **{f"model.{part}.batch_augmentor": AugmentationConfig for part in ("train_ds", "validation_ds")},
}


@pytest.fixture(scope="module")
def base() -> Any:
    return load_config("small", ["nest={max_bad_steps: 10}"])


@pytest.fixture(scope="module")
def plain(base: Any) -> dict[str, Any]:
    """Return the same without references to other keys; parsing those takes nine tenths of the time."""
    return resolved(base)


def refused(config: Any, block: str, *, whole: bool) -> str:
    """Return the message that refuses a configuration; check only its block if that is enough."""

    def check() -> None:
        if not whole and block in BLOCKS:
            section(BLOCKS[block], config, block)
        check_settings(config)

    with pytest.raises(NestError) as raised:
        check()
    assert raised.value.exit_code == 2
    return str(raised.value)


@pytest.mark.parametrize("key", [*NUMBERS, *TEXTS])
def test_what_is_out_of_bounds_names_its_key(base: Any, plain: dict[str, Any], key: str) -> None:
    block, _, name = key.rpartition(".")
    config = copy.deepcopy(base) if block == "model" else OmegaConf.create(plain)  # other blocks repeat keys of `model`
    above = OmegaConf.select(config, block) if block else config
    values = (*NUMBERS.get(key, ()), *TEXTS.get(key, ()), *(NO_NUMBERS if key in NUMBERS else ()))
    for number, value in enumerate(values):
        above[name] = value
        message = refused(config, block, whole=number == 0)
        assert name in message, (value, message)
        assert len(message) < 700


def test_every_number_is_in_the_table() -> None:
    """The table has every key that is a number in NeMo's file, and those of ours that may be one."""
    standard = load_config("large")
    numbers = {
        key
        for key in _known_keys()
        if isinstance(OmegaConf.select(standard, key, throw_on_missing=False), int | float)
        and not isinstance(OmegaConf.select(standard, key, throw_on_missing=False), bool)
    }
    others = {"trainer.precision"}
    assert numbers - set(NUMBERS) - others - {key for key in numbers if key.startswith("model.spec_augment.")} == set()


def test_the_command_says_it_in_one_message(corpus: dict[str, Path], tmp_path: Path) -> None:
    for word in ("model.optim.lr=nan", "model.encoder.dropout=1.0", "trainer.max_steps=0", "model.num_classes=1e99"):
        words = ["pretrain", "small", *TINY_RUN, f"exp_manager.exp_dir={tmp_path}", word, "--dry-run"]
        words += [f"model.{part}_ds.manifest_filepath={corpus['train']}" for part in ("train", "validation")]
        result = CliRunner().invoke(app, words)
        assert isinstance(result.exception, NestError)
        assert word.partition("=")[0].rpartition(".")[2] in str(result.exception)


def test_checkpoints_that_would_all_be_left_out(corpus: dict[str, Path]) -> None:
    words = [f"exp_manager.checkpoint_callback_params.{word}" for word in ("save_top_k=0", "save_last=false")]
    with pytest.raises(
        ConfigError, match=r"save_top_k: 0 with save_last=false writes no checkpoint.*create_checkpoint"
    ):
        Pretraining(tiny_config(corpus, *words), Recorder())
    callback = Pretraining(tiny_config(corpus, words[0], f"{words[1][:-5]}null"), Recorder()).checkpoint_callback()
    assert callback is not None
    assert callback.save_last


# ---- what is not set ----

EMPTY = [
    "model.train_ds.manifest_filepath", "model.train_ds.noise_manifest", "model.validation_ds.manifest_filepath",
    "model.validation_ds.noise_manifest", "model.train_ds.tarred_audio_filepaths", "model.train_ds.batch_size",
    "model.encoder.n_layers", "model.optim.lr", "model.optim.betas", "model.train_ds", "trainer", "exp_manager.exp_dir",
    "trainer.devices", "init_from_nemo", "seed", "+my.note",
]  # fmt: skip


@pytest.mark.parametrize("key", EMPTY)
@pytest.mark.parametrize("text", ["", " "])
def test_nothing_behind_a_key_is_not_set(base: Any, key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key.lstrip('+')} is not set: .* has no value"):
        with_overrides(base, [f"{key}={text}"], "small")  # refused before it is applied


@pytest.mark.parametrize("text", ["", "''"])
def test_an_empty_text_in_a_file_or_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: demo\nmodel:\n  train_ds:\n    noise_manifest: ''\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: model\.train_ds\.noise_manifest is not set: the value is empty"):
        load_config(str(path))
    monkeypatch.setenv("TRAIN", "")
    with pytest.raises(ConfigError, match=r"model\.train_ds\.manifest_filepath is not set"):
        load_config("demo", ["model.train_ds.manifest_filepath=${oc.env:TRAIN}"])


@pytest.mark.parametrize("value", ["null", "[]", "['']", "[a.json, '']", ",", "[[a.json], []]"])
@pytest.mark.parametrize("key", ["train_ds.manifest_filepath", "validation_ds.manifest_filepath"])
def test_a_manifest_without_a_name(corpus: dict[str, Path], key: str, value: str) -> None:
    if value == "null" and key.startswith("validation"):
        return  # no validation
    with pytest.raises(ConfigError, match=rf"model\.{key} is not set"):
        Pretraining(tiny_config(corpus, f"model.{key}={value}"), Recorder())


@pytest.mark.parametrize("value", ["['']", "[a.json, '']"])
def test_noise_without_a_name(corpus: dict[str, Path], value: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.train_ds\.noise_manifest is not set"):
        Pretraining(tiny_config(corpus, f"model.train_ds.noise_manifest={value}"), Recorder())


# ---- keys of others ----


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("exp_manager.ema.enable", "Remove it"),
        ("exp_manager.create_early_stopping_callback", "save_top_k"),
        ("exp_manager.version", "exp_manager.name"),
        ("exp_manager.checkpoint_callback_params.dirpath", "exp_manager.exp_dir"),
        ("trainer.overfit_batches", "a few lines"),
        ("trainer.profiler", "nest bench"),
        ("trainer.min_steps", "trainer.max_steps"),
        ("model.optim.eps", "Remove it"),
        ("model.optim.sched.max_steps", "trainer.max_steps"),
        ("model.encoder.reduction", "Remove it"),
        ("model.preprocessor.preemph", "Remove it"),
        ("model.test_ds.manifest_filepath", "model.validation_ds"),
        ("model.train_ds.perturb_speed", "Remove it"),
        ("model.train_ds.seed", "Set `seed`"),
        ("hydra.run.dir", "Remove it"),
    ],
)
def test_keys_of_others_are_refused_with_a_plus_too(base: Any, tmp_path: Path, key: str, instead: str) -> None:
    path = tmp_path / "x.yaml"
    whole: Any = 1
    for part in reversed(key.split(".")):
        whole = {part: whole}
    path.write_text(json.dumps({"base": "small"} | whole))
    block, _, name = key.rpartition(".")
    words = (f"{key}=1", f"+{key}=1", f"++{key}=1", f"+{block}={{{name}: 1}}")
    calls = [partial(with_overrides, base, [word], "small") for word in words]  # refused before it is applied
    for call in (*calls, partial(load_config, str(path))):
        with pytest.raises(ConfigError) as raised:
            call()
        message = str(raised.value)
        assert f"nest does not support {key}" in message
        assert instead in message
        assert f"+{key}" not in message


def test_other_keys_are_told_once(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ["+my.note=1", "+trainer.max_step=4", "+trainer.max_steps=2", "+exp_manager.wandb_logger_kwargs.entity=me"]
    assert unused_keys(load_config("small", words)) == [
        "+trainer.max_step has no effect in nest. Did you mean trainer.max_steps?", "+my.note has no effect in nest."
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["count-params", "small", "+my.note=1", "--json"])
    assert result.stderr.count("+my.note has no effect in nest.") == 1
    Pretraining(tiny_config(corpus, *words, f"exp_manager.exp_dir={tmp_path}"), Recorder()).trainer([])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.train_ds.batch_duration=100"],
         ["model.train_ds.batch_duration=100 has no effect: use_lhotse is false."]),
        (["model.train_ds.num_buckets=4", "model.train_ds.use_lhotse=true", "model.train_ds.use_bucketing=false"],
         ["model.train_ds.num_buckets=4 has no effect: use_bucketing is false."]),
        (["model.train_ds.use_start_end_token=true"],
         ["model.train_ds.use_start_end_token=true has no effect: it belongs to NeMo's text data sets."]),
        (["model.spec_augment.freq_masks=2"],
         ["model.spec_augment.freq_masks=2 has no effect: NEST, as in NeMo, does not use SpecAugment."]),
        (["model.encoder.pos_emb_max_len=100"],
         ["model.encoder.pos_emb_max_len=100 has no effect: the table of positions grows as needed."]),
        (["model.optim.sched.warmup_ratio=0.1", "model.optim.sched.warmup_steps=100"],
         ["model.optim.sched.warmup_steps=100 has no effect: model.optim.sched.warmup_ratio is set "
          "and takes precedence."]),
        (["trainer.check_val_every_n_epoch=2"],
         ["trainer.check_val_every_n_epoch=2 has no effect: trainer.val_check_interval is a number of batches."]),
        (["trainer.gradient_clip_algorithm=value"],
         ["trainer.gradient_clip_algorithm=value has no effect: trainer.gradient_clip_val is 0."]),
        (["model.train_ds.concat_sampling_technique=random"],
         ["model.train_ds.concat_sampling_technique=random has no effect: is_concat is false."]),
        (["model.train_ds.tarred_audio_filepaths=a.tar"],
         ["model.train_ds.tarred_audio_filepaths=a.tar has no effect: is_tarred is false."]),
        (["exp_manager.wandb_logger_kwargs.project=x"],
         ["exp_manager.wandb_logger_kwargs.project=x has no effect: exp_manager.create_wandb_logger is false."]),
    ],
)  # fmt: skip
def test_what_is_set_and_not_used_is_told(words: list[str], told: list[str]) -> None:
    assert (
        without_effect(load_config("large", words))[-len(told) :] == told
        or without_effect(load_config("large", words)) == told
    )


@pytest.mark.parametrize("preset", ["small", "medium", "large", "xlarge", "xxlarge", "demo"])
def test_presets_have_nothing_to_tell(preset: str) -> None:
    config = load_config(preset)
    check_settings(config)
    assert without_effect(config) == []
    assert unused_keys(config) == []


# ---- masks ----

ONE_TO_THREE = np.linspace(1.0, 3.0, 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.masking.block_size=400"], "a block of 400 frames is longer than every utterance"),
        (["model.masking.block_size=301"], "a block of 301 frames is longer than every utterance"),
        (["model.masking.block_size=320", "model.mask_position=post_conv"], "a block of 320 frames is longer"),
        (["model.masking.max_mask_ratio=0.05"], "no token had enough of its frames masked"),
        (["model.masking.block_size=2", "model.masking.mask_prob=0.001"], "no token had enough"),
        (["model.masking.mask_prob=1e-9"], "no token had enough"),
        (["model.masking.allow_overlap=false", "model.masking.block_size=1", "model.masking.mask_prob=0.01"],
         "no token"),
    ],
)  # fmt: skip
def test_masks_that_fall_on_nothing_are_refused(words: list[str], message: str) -> None:
    config = load_config("small", words)
    with pytest.raises(ConfigError, match=f"{message}.*the model would learn nothing"):
        check_masks(config, "model.train_ds", ONE_TO_THREE, lambda told: None)
    notes: list[str] = []
    check_masks(config, "model.validation_ds", ONE_TO_THREE, notes.append)
    assert len(notes) == 1
    assert "there will be no validation loss" in notes[0]


def test_masks_that_fall_on_something_are_taken() -> None:
    notes: list[str] = []
    before = torch.random.get_rng_state()
    for words in (
        [], ["model.masking.block_size=300"], ["model.mask_position=post_conv"], ["model.masking.max_mask_ratio=0.5"],
        ["model.masking.allow_overlap=false", "model.masking.mask_prob=0.3", "model.masking.block_size=400"],
    ):  # fmt: skip
        check_masks(load_config("small", words), "model.train_ds", ONE_TO_THREE, notes.append)
    assert torch.equal(before, torch.random.get_rng_state())
    assert notes == [
        "19 of the 20 utterances of model.train_ds are shorter than a block of model.masking.block_size, so nothing "
        "of them is masked."
    ]


def test_a_run_whose_blocks_are_too_long(corpus: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(corpus, "model.masking.block_size=400", f"exp_manager.exp_dir={tmp_path / 'x'}")
    with pytest.raises(ConfigError, match=r"a block of 400 frames is longer than every utterance in model\.train_ds"):
        Pretraining(config, Recorder())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_the_masked_share_of_a_dry_run(corpus: dict[str, Path], position: str) -> None:
    words = ["model.masking.mask_prob=0.1", "model.masking.block_size=32", f"model.mask_position={position}"]
    trial = Pretraining(tiny_config(corpus, *words), Recorder()).dry_run()
    if position == "pre_conv":  # 1 - 0.9^32 is 97% inside, less at both ends
        assert 0.7 < trial.masked_share < 1
    else:  # blocks of 4 sub-sampled frames: 1 - 0.9^4 is 34% inside
        assert 0.1 < trial.masked_share < 0.45


# ---- gradients ----


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.mask_position=post_conv"],
        ["model.masking.freeze=false"],
        ["model.masking.freeze=false", "model.mask_position=post_conv"],
        ["model.masking.freeze=false", "model.masking.mask_value=0.5"],
        ["model.encoder.feat_out=24", "model.decoder.feat_in=24"],
        ["model.encoder.untie_biases=false", "model.encoder.use_bias=false", "model.decoder.use_bias=false"],
        ["model.encoder.att_context_size=[0,0]", "model.encoder.conv_norm_type=layer_norm"],
        ["model.encoder.conv_norm_type=group_norm4", "model.encoder.xscaling=false", "model.num_books=2"],
        ["model.encoder.stochastic_depth_drop_prob=0.9"],
    ],
)
def test_everything_that_is_trained_has_a_gradient(corpus: dict[str, Path], words: list[str]) -> None:
    config = tiny_config(corpus, *words)
    check_settings(config)
    model = NestModule(config).model
    audio, lengths = torch.randn(2, 24000), torch.tensor([24000, 20000])
    model(audio, lengths, audio, lengths).loss.backward()
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []


# ---- what NeMo and Lightning take ----


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.max_time={minutes: 5}"],
        ["trainer.max_time={days: 1, hours: 2}"],
        ["trainer.val_check_interval=null", "trainer.enable_progress_bar=null", "trainer.num_sanity_val_steps=null"],
        ["trainer.limit_val_batches=0"],
        ["trainer.limit_val_batches=0.0"],
        ["trainer.devices=-1", "trainer.max_steps=-1", "trainer.gradient_clip_val=0.0", "trainer.precision=bf16"],
        ["model.train_ds.shuffle_n=0", "model.train_ds.num_workers=0", "model.train_ds.max_duration=null"],
        ["model.train_ds.min_duration=-1", "model.train_ds.max_duration=.inf"],
        ["model.preprocessor.dither=0", "model.masking.mask_prob=0.65", "model.optim.weight_decay=0"],
        ["model.optim.sched.warmup_steps=0", "model.train_ds.batch_size=1"],
        ["trainer.callbacks=null", "exp_manager.version=null", "exp_manager.ema=null", "trainer.fast_dev_run=false"],
        ["model.encoder.reduction=null", "model.encoder.reduction_factor=1", "model.encoder.reduction_position=null"],
        ["model.encoder.subsampling_conv_chunking_factor=1", "exp_manager.create_mlflow_logger=false"],
        ["model.encoder.att_context_size=[70,13]", "model.encoder.att_context_style=chunked_limited"],
        ["model.encoder.att_context_size=[-1,13]", "model.encoder.att_context_style=chunked_limited"],
        ["model.preprocessor.window='hann'", 'trainer.precision="bf16-mixed"'],
    ],
)
def test_what_nemo_takes_is_taken(words: list[str]) -> None:
    config = load_config("small", words)
    check_settings(config)
    assert unused_keys(config) == []


def test_a_time_limit_in_a_file_reaches_lightning(corpus: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("base: small\ntrainer:\n  max_time: {minutes: 5}\nexp_manager:\n  version: null\n")
    config = load_config(str(path))
    check_settings(config)
    assert OmegaConf.to_container(config.trainer.max_time) == {"minutes": 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer.max_time={fortnights: 1}"], "trainer.max_time: .* must be a time such as"),
        (["exp_manager.create_preemption_callback=false"], "A run always saves on SIGTERM"),
        (["trainer.fast_dev_run=true"], "Use --dry-run"),
        (["model.encoder.reduction_factor=2"], "nest does not support model.encoder.reduction_factor"),
        (["trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy}"], "Write only the name: .*ddp"),
        (["trainer.max_steps=1e6"], r"trainer.max_steps: 1000000.0 is not of type int or null. Write 1000000\."),
        (["model.encoder.att_context_size=null"], "att_context_size: None is not of type list"),
        (["model.encoder.att_context_size=[[70,13],[70,0]]"], r"att_context_size: \[70, 13\] is not of type int"),
        (["model.encoder.att_context_size=[70,12]", "model.encoder.att_context_style=chunked_limited"],
         r"att_context_size: .* \[70, 12\] must be a multiple of a chunk's 13 frames"),
        (["model.encoder.att_context_size=[70,-1]", "model.encoder.att_context_style=chunked_limited"],
         r"att_context_size: .* \[70, -1\] must be at least 0"),
        (["exp_manager.wandb_logger_kwargs=5"], "exp_manager.wandb_logger_kwargs: 5 must be a block of keys"),
        (["model.spec_augment=[1]"], r"model.spec_augment: \[1\] must be a block of keys"),
    ],
)  # fmt: skip
def test_what_asks_for_something_else_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config("small", words))


@pytest.mark.parametrize("key", ["model", "model.encoder", "trainer", "model.train_ds.batch_augmentor", "nest"])
@pytest.mark.parametrize("value", [5, "text", [1, 2], True])
def test_a_block_that_is_none(tmp_path: Path, key: str, value: Any) -> None:
    path, whole = tmp_path / "x.yaml", value
    for part in reversed(key.split(".")):
        whole = {part: whole}
    path.write_text(json.dumps({"base": "small"} | whole))
    with pytest.raises(ConfigError, match=rf"x\.yaml: {key}: .* must be a block of keys"):
        load_config(str(path))


@pytest.mark.parametrize("value", ["5", "true", "1.5", "[5]", "[true]", "[[5]]"])
@pytest.mark.parametrize("key", ["manifest_filepath", "noise_manifest", "shar_path", "cuts_path"])
def test_a_path_that_is_no_text(corpus: dict[str, Path], key: str, value: str) -> None:
    words = [f"model.train_ds.{key}={value}", f"model.train_ds.use_lhotse={str(key.endswith('path')).lower()}"]
    with pytest.raises(ConfigError, match=rf"model\.train_ds\.{key}: .* must be a path"):
        Pretraining(tiny_config(corpus, *words), Recorder())


def test_no_batch_of_validation_is_no_validation(corpus: dict[str, Path]) -> None:
    run = Pretraining(tiny_config(corpus, "trainer.limit_val_batches=0"), Recorder())
    assert run.data.val is None
    assert run.plan.val_utterances == 0
    assert Pretraining(tiny_config(corpus, "trainer.limit_val_batches=1"), Recorder()).plan.val_utterances == 3


def test_without_an_interval_a_run_validates_once_an_epoch(corpus: dict[str, Path]) -> None:
    run = Pretraining(tiny_config(corpus, "trainer.val_check_interval=null"), Recorder())
    assert run.length.validate_every == run.length.batches_per_epoch == 3


@pytest.mark.parametrize(("chosen", "tf32"), [("highest", False), ("high", True)])
def test_the_precision_of_products_is_chosen(chosen: str, tf32: bool, corpus: dict[str, Path], tmp_path: Path) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = not tf32
        words = [f"nest.matmul_precision={chosen}", f"exp_manager.exp_dir={tmp_path}"]
        Pretraining(tiny_config(corpus, *words), Recorder()).trainer([])
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (chosen, tf32)
        torch.set_float32_matmul_precision("medium")
        NestBlock().use_matmul_precision()  # null changes nothing
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_first_device_is_the_first_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_device(load_config("small", ["trainer.accelerator=cpu"])) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for devices, first in (("[1,3]", 1), ("2", 0), ("-1", 0)):
        config = load_config("small", ["trainer.accelerator=gpu", f"trainer.devices={devices}"])
        assert first_device(config) == torch.device("cuda", first)
