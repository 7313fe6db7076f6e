"""Configuration keys beyond NeMo's file: those that nest adds, and those of NeMo or Lightning that it lacks."""

from __future__ import annotations

from typing import Any

# Keys that nest supports although NeMo's file does not have them. docs/configuration.md describes each.
_OF_DATASETS = (
    "batch_augmentor.nemo_exact", "max_failed_share", "read_timeout", "channel_selector",
    "concat_sampling_scale", "concat_sampling_probabilities", "concat_sampling_seed", "concat_shuffle",
    "bucketing_weights",
    "use_lhotse", "cuts_path", "shar_path", "input_cfg", "reweight_temperature", "use_bucketing", "batch_duration",
    "quadratic_duration", "num_buckets", "bucket_duration_bins", "bucket_batch_size", "shuffle_buffer_size",
)  # fmt: skip
_OF_TRAINING_DATA = (  # NeMo's file has these in train_ds only
    "drop_last", "trim_silence", "is_concat", "concat_sampling_technique", "concat_sampling_temperature", "is_tarred",
    "tarred_audio_filepaths", "shuffle_n", "bucketing_strategy", "bucketing_batch_size",
)  # fmt: skip
_OF_TRAINER = (
    "deterministic", "detect_anomaly", "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches",
    "max_time",
)  # fmt: skip
_OF_CHECKPOINTS = (
    "auto_insert_metric_name", "every_n_epochs", "every_n_train_steps", "filename", "save_last", "verbose",
)  # fmt: skip
_OF_WANDB = ("id", "resume", "entity", "group", "tags")
_OF_NEST = ("max_bad_steps", "explode_factor", "stop_on_collapse", "collapse_lines", "matmul_precision", "peak_flops")
START_KEYS = (
    "init_from_nemo", "init_from_nemo_model", "init_from_ptl_ckpt", "init_from_encoder", "init_from_pretrained_model",
)  # fmt: skip
START_PARTS = ("path", "include", "exclude")  # in NeMo's form init_from_...: {name: {path: ..., include: [...]}}
EXTRA_KEYS = frozenset(
    (
        "seed",
        *START_KEYS,
        "model.encoder.backend",
        "model.encoder.compile",
        "model.encoder.dropout_draws",
        "model.encoder.use_pytorch_sdpa",
        "model.encoder.conv_norm_ignore_padding",
        "model.loss.nemo_exact",
        "model.masking.mask_value",
        "model.masking.max_mask_ratio",
        "model.preprocessor.nemo_exact",
        "model.quantizer.init",
        *(f"model.{part}.{key}" for part in ("train_ds", "validation_ds") for key in _OF_DATASETS),
        *(f"model.validation_ds.{key}" for key in _OF_TRAINING_DATA),
        *(f"nest.{key}" for key in _OF_NEST),
        *(f"trainer.{key}" for key in _OF_TRAINER),
        *(f"exp_manager.checkpoint_callback_params.{key}" for key in _OF_CHECKPOINTS),
        *(f"exp_manager.wandb_logger_kwargs.{key}" for key in _OF_WANDB),
    )
)

# Keys that NeMo, Lightning or PyTorch support and nest does not.
_NAMES = {
    "trainer": (
        "callbacks fast_dev_run min_epochs min_steps limit_test_batches limit_predict_batches overfit_batches "
        "enable_model_summary inference_mode use_distributed_sampler profiler barebones plugins default_root_dir "
        "reload_dataloaders_every_n_epochs enable_autolog_hparams model_registry resume_from_checkpoint gpus tpu_cores "
        "replace_sampler_ddp auto_lr_find auto_scale_batch_size amp_level amp_backend track_grad_norm num_processes "
        "weights_summary weights_save_path checkpoint_callback progress_bar_refresh_rate terminate_on_nan "
        "strategy"
    ),
    "exp_manager": (
        "explicit_log_dir version use_datetime_version resume_past_end resume_from_checkpoint summary_writer_kwargs "
        "create_mlflow_logger mlflow_logger_kwargs create_dllogger_logger dllogger_logger_kwargs create_clearml_logger "
        "clearml_logger_kwargs create_neptune_logger neptune_logger_kwargs create_early_stopping_callback "
        "early_stopping_callback_params create_ipl_epoch_stopper_callback ipl_epoch_stopper_callback_params "
        "create_preemption_callback files_to_copy log_step_timing log_delta_step_timing step_timing_kwargs ema "
        "disable_validation_on_resume max_time_per_run seconds_to_sleep create_straggler_detection_callback "
        "straggler_detection_params create_fault_tolerance_callback fault_tolerance log_tflops_per_sec_per_gpu "
        "model_parallel_size"
    ),
    "exp_manager.checkpoint_callback_params": (
        "filepath dirpath save_weights_only train_time_interval prefix postfix save_best_model "
        "save_nemo_on_train_end model_parallel_size save_on_train_epoch_end async_save save_last_n_optim_states period "
        "enable_version_counter save_on_exception"
    ),
    "model": (
        "test_ds predict_ds freeze_encoder freeze_updates variational_noise skip_nan_grad adapter adapters access "
        "interctc loss_list feature_penalty dropout_features dropout_features_q nsys_profile memory_profile "
        "log_prediction optim_param_groups spec_augmentation tokenizer labels "
        "init_from_nemo_model init_from_ptl_ckpt init_strict"
    ),
    "model.optim": (
        "eps amsgrad maximize foreach capturable differentiable fused momentum dampening nesterov rho alpha centered "
        "args param_groups exclude_from_weight_decay weight_decay_ratio"
    ),
    "model.optim.sched": (
        "max_steps last_epoch monitor reduce_on_plateau interval frequency args hold_steps hold_ratio constant_steps "
        "constant_ratio power cycle gamma step_size T_max T_0 eta_min factor patience decay_rate"
    ),
    "model.preprocessor": (
        "n_window_size n_window_stride preemph lowfreq highfreq log_zero_guard_type log_zero_guard_value exact_pad "
        "mag_power rng nb_augmentation_prob nb_max_freq mel_norm use_torchaudio stft_exact_pad stft_conv"
    ),
    "model.encoder": (
        "subsampling_conv_chunking_factor reduction reduction_position reduction_factor att_context_probs "
        "att_chunk_context_size conv_context_style global_tokens global_tokens_spacing global_attn_separate "
        "use_pytorch_sdpa_backends sync_max_audio_length adapter"
    ),
    "model.quantizer": "time_ahead",
    "model.decoder": "init_mode",
}  # fmt: skip
_DATASET_NAMES = (
    "labels parser augmentor return_sample_id int_values tarred_shard_strategy tarred_audio_index_filepaths "
    "shard_manifests max_utts unk_index blank_index normalize_transcripts use_dali code_switched is_code_switched "
    "force_monochannel seed shard_seed skip_missing_manifest_entries tarred_random_access "
    "num_cuts_for_bins_estimate bucket_buffer_size concurrent_bucketing bucketing_2d_strict_mode max_open_streams "
    "cuda_expandable_segments multi_config sampler_fusion sampler_weights pretokenize prompt_format "
    "use_multimodal_sampling audio_locator_tag token_equivalent_duration batch_tokens quadratic_factor "
    "cut_text_into_windows_tokens min_tps max_tps min_tokens max_tokens measure_total_length min_tpt max_tpt max_cer "
    "min_context_speaker_similarity keep noise_path noise_snr noise_mix_prob perturb_speed concatenate_samples "
    "concatenate_gap_seconds concatenate_duration_factor concatenate_merge_supervisions db_norm truncate_duration "
    "truncate_offset_type cut_into_windows_duration cut_into_windows_hop keep_excessive_supervisions rir_enabled "
    "rir_path rir_prob pad_min_duration pad_direction lowpass_enabled lowpass_frequencies_interval lowpass_prob "
    "compression_enabled compression_prob compression_level_interval compression_codecs compression_codec_weights "
    "compression_enable_for_custom_fields clipping_enabled clipping_gain_db clipping_normalize clipping_oversampling "
    "clipping_prob_hard clipping_prob text_field lang_field metadata_only force_finite force_map_dataset "
    "force_iterable_dataset slice_length defer_setup dataset dataloader_params collate_fn"
)
_ELSEWHERE = {  # the equivalent in nest
    "trainer.callbacks": "exp_manager configures the callbacks.",
    "trainer.fast_dev_run": "Use --dry-run.",
    "trainer.overfit_batches": "Give model.train_ds.manifest_filepath a manifest with a few lines.",
    "trainer.min_steps": "Set trainer.max_steps.",
    "trainer.min_epochs": "Set trainer.max_epochs.",
    "trainer.default_root_dir": "Set exp_manager.exp_dir.",
    "trainer.resume_from_checkpoint": "A run resumes by itself: exp_manager.resume_if_exists. "
    "To start from other weights, set init_from_ptl_ckpt.",
    "trainer.gpus": "Set trainer.devices.",
    "trainer.num_processes": "Set trainer.devices.",
    "trainer.strategy": "Write only the name: trainer.strategy: ddp.",
    "trainer.profiler": "`nest bench` measures the parts of a step.",
    "exp_manager.explicit_log_dir": "Set exp_manager.exp_dir and exp_manager.name.",
    "exp_manager.version": "Set another exp_manager.name.",
    "exp_manager.use_datetime_version": "Set another exp_manager.name.",
    "exp_manager.resume_from_checkpoint": "A run resumes from the newest checkpoint in its folder. "
    "To start from other weights, set init_from_ptl_ckpt.",
    "exp_manager.max_time_per_run": "Set trainer.max_time.",
    "exp_manager.create_preemption_callback": "A run always saves on SIGTERM and SIGUSR1.",
    "exp_manager.log_step_timing": "metrics.jsonl always contains the seconds per step.",
    "exp_manager.create_early_stopping_callback": "checkpoint_callback_params.save_top_k keeps the best model.",
    "exp_manager.early_stopping_callback_params": "checkpoint_callback_params.save_top_k keeps the best model.",
    "exp_manager.checkpoint_callback_params.dirpath": "Set exp_manager.exp_dir and exp_manager.name.",
    "exp_manager.checkpoint_callback_params.filepath": "Set checkpoint_callback_params.filename.",
    "exp_manager.checkpoint_callback_params.prefix": "Set checkpoint_callback_params.filename.",
    "exp_manager.checkpoint_callback_params.save_nemo_on_train_end": "Set always_save_nemo.",
    "model.init_from_nemo_model": "Write it without `model.`.",
    "model.init_from_ptl_ckpt": "Write it without `model.`.",
    "model.skip_nan_grad": "nest.max_bad_steps skips such steps.",
    "model.test_ds": "Give its manifest to model.validation_ds.",
    "model.optim.sched.max_steps": "Set trainer.max_steps.",
    "model.preprocessor.n_window_size": "Set window_size, in seconds.",
    "model.preprocessor.n_window_stride": "Set window_stride, in seconds.",
    "seed": "Set `seed` at the top level of the configuration.",
    "shard_seed": "Set `seed` at the top level of the configuration.",
    "noise_path": "Set noise_manifest and batch_augmentor.",
    "noise_snr": "Set batch_augmentor.min_r_noise and max_r_noise.",
    "noise_mix_prob": "Set batch_augmentor.prob.",
    "augmentor": "Set batch_augmentor.",
    "bucket_buffer_size": "nest forms buckets from all lines.",
    "num_cuts_for_bins_estimate": "nest computes bins from all lines.",
}
_FOREIGN = frozenset(
    (
        *(f"{block}.{name}" for block, names in _NAMES.items() for name in names.split()),
        *(f"model.{part}.{name}" for part in ("train_ds", "validation_ds") for name in _DATASET_NAMES.split()),
        "hydra",
        "defaults",
    )
)

# For these keys, false does not mean "off": it asks for behaviour that nest does not have.
_NOT_OFF = frozenset(("create_preemption_callback", "log_step_timing", "init_strict"))
_NEUTRAL = {  # the values in NeMo's own files, which match what nest does
    "model.encoder.reduction_factor": (1,),
    "model.encoder.subsampling_conv_chunking_factor": (1, -1),
}


def is_off(key: str, value: Any) -> bool:
    """Return True if a key that nest lacks asks for nothing: it is null, false, or the value in NeMo's own files."""
    if foreign(key) is None:
        return False
    off = value is None or (value is False and key.rpartition(".")[2] not in _NOT_OFF)
    return off or value in _NEUTRAL.get(key, ())


def foreign(key: str) -> str | None:
    """Return the remedy for a key, or its parent, that NeMo, Lightning or PyTorch support and nest lacks; else None."""
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        whole = ".".join(parts[:count])
        if whole in _FOREIGN:
            other = _ELSEWHERE.get(whole) or _ELSEWHERE.get(parts[count - 1] if whole.startswith("model.") else whole)
            return other or "Remove it; docs/from-nemo.md lists the features that nest does not have."
    return None
