"""Translate between the configuration of a run and the `model_config.yaml` inside a .nemo file.

NeMo stores the `model` block with every interpolation resolved; for a missing key, its constructors' defaults apply.
`_BLOCKS` lists these defaults, read off the constructors of NeMo 3.0.0. Archives of older versions lack keys that were
added later, and have keys that were removed or that only NeMo needs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nestcli.checks import check_plain, odd_in_yaml
from nestcli.config import (
    config_from_dict,
    leaves,
    load_config,
    resolved,
    with_overrides,
)
from nestcli.errors import CheckpointError
from nestcli.keys import EXTRA_KEYS
from nestcli.targets import nemo_target

OURS = "nestcli"  # the block of settings that NeMo does not know; NeMo ignores unknown blocks
TARGET = "nemo.collections.asr.models.ssl_models.EncDecDenoiseMaskedTokenPredModel"
_CLASS_NAMES = ("EncDecDenoiseMaskedTokenPredModel", "EncDecMaskedTokenPredModel")
_TARGETS = frozenset(
    f"{package}.{name}"
    for package in ("nemo.collections.asr.models.ssl_models", "nemo.collections.asr.models", "nestcli")
    for name in _CLASS_NAMES
)

_REQUIRED: Any = object()  # NeMo's constructor has no default
_ANY: Any = object()  # any value; it has no effect here

# For each block: the keys that both sides know, with NeMo's default for a missing one; and the keys that only NeMo
# knows, with the values that do not change the model.
_BLOCKS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "preprocessor": (
        {
            "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.02, "window_stride": 0.01,
            "window": "hann", "features": 64, "n_fft": None, "log": True, "frame_splicing": 1, "dither": 1e-5,
            "pad_to": 16, "pad_value": 0.0,
        },
        {
            "n_window_size": (None,), "n_window_stride": (None,), "preemph": (0.97,), "lowfreq": (0,),
            "highfreq": (None,), "log_zero_guard_type": ("add",), "log_zero_guard_value": (2.0**-24,),
            "exact_pad": (False,), "mag_power": (2.0,), "rng": (None,), "nb_augmentation_prob": (0.0,),
            "nb_max_freq": (_ANY,), "mel_norm": ("slaney",), "use_torchaudio": (False,), "stft_exact_pad": (False,),
            "stft_conv": (False,),
        },
    ),
    "spec_augment": (
        {"freq_masks": 0, "time_masks": 0, "freq_width": 10, "time_width": 10},
        dict.fromkeys(
            ("rect_masks", "rect_time", "rect_freq", "rng", "mask_value", "use_vectorized_spec_augment",
             "use_numba_spec_augment"), (_ANY,),
        ),
    ),
    "masking": (
        {
            "block_size": 48, "mask_prob": 0.5, "feat_in": _REQUIRED, "freeze": True, "allow_overlap": False,
            "mask_value": None,
        },
        {"max_mask_ratio": (_ANY,)},  # NeMo accepts it but never uses it; ours is stored in the block OURS
    ),
    "quantizer": (
        {
            "feat_in": _REQUIRED, "code_dim": _REQUIRED, "num_books": _REQUIRED, "num_classes": _REQUIRED,
            "dist_fn": "cosine", "freeze": True, "squeeze_single": False, "combine_time_steps": 1,
        },
        {"time_ahead": (False,)},
    ),
    "encoder": (
        {
            "feat_in": _REQUIRED, "feat_out": -1, "n_layers": _REQUIRED, "d_model": _REQUIRED, "use_bias": True,
            "subsampling": "striding", "subsampling_factor": 4, "subsampling_conv_channels": -1,
            "causal_downsampling": False, "ff_expansion_factor": 4, "self_attention_model": "rel_pos", "n_heads": 4,
            "att_context_size": None, "att_context_style": "regular", "xscaling": True, "untie_biases": True,
            "pos_emb_max_len": 5000, "conv_kernel_size": 31, "conv_norm_type": "batch_norm",
            "conv_context_size": None, "dropout": 0.1, "dropout_pre_encoder": 0.1, "dropout_emb": 0.1,
            "dropout_att": 0.0, "stochastic_depth_drop_prob": 0.0, "stochastic_depth_mode": "linear",
            "stochastic_depth_start_layer": 1, "use_pytorch_sdpa": False,
        },
        {
            "subsampling_conv_chunking_factor": (_ANY,), "reduction": (None,), "reduction_position": (_ANY,),
            "reduction_factor": (_ANY,), "att_context_probs": (None,), "att_chunk_context_size": (None,),
            "conv_context_style": ("regular",), "global_tokens": (0,), "global_tokens_spacing": (_ANY,),
            "global_attn_separate": (_ANY,), "use_pytorch_sdpa_backends": (_ANY,), "sync_max_audio_length": (_ANY,),
        },
    ),
    "decoder": (
        {
            "feat_in": _REQUIRED, "num_classes": _REQUIRED, "num_decoders": 1, "squeeze_single": False,
            "use_bias": False,
        },
        {"init_mode": (_ANY,)},  # initialisation of weights that are replaced anyway
    ),
    "loss": ({"combine_time_steps": 1, "mask_threshold": 0.8, "num_decoders": 1, "squeeze_single": False}, {}),
}  # fmt: skip
_AUGMENTOR_KEYS = frozenset(
    f"{prefix}_{name}"
    for prefix in ("min", "max")
    for name in ("r_speech", "r_noise", "mix_rate", "num_segments", "num_speakers")
) | {"prob", "noise_ratio"}
# Keys of the model itself, and the key that holds the same value a second time.
_SCALARS = {
    "sample_rate": "preprocessor.sample_rate",
    "num_classes": "quantizer.num_classes",
    "num_books": "quantizer.num_books",
    "code_dim": "quantizer.code_dim",
    "squeeze_single": "quantizer.squeeze_single",
}
# Keys that NeMo stores beside the model, and keys that its parent classes read but this model never uses.
_INERT = frozenset(
    (
        "target", "nemo_version", "mask_position", "train_ds", "validation_ds", "test_ds", "optim", "model_defaults",
        "skip_nan_grad", "log_prediction",
    )
)  # fmt: skip
_ABSENT_IS_NONE = ("batch_augmentor", "noise_manifest")
_REMEDY = "Refused: without it, this would be a different model."


# ---- out -------------------------------------------------------------------------------------------------------


def to_nemo(config: DictConfig) -> dict[str, Any]:
    """Return the content of `model_config.yaml`: every key that NeMo knows, then ours in a block that NeMo ignores.

    Raises CheckpointError for settings with which NeMo cannot run the model.
    """
    model = copy.deepcopy(resolved(config)["model"])
    model["encoder"].pop("backend", None)  # says whose code trained the model; the model is the same
    if model["mask_position"] != "pre_conv":
        raise CheckpointError(
            f"model.mask_position={model['mask_position']} cannot go into a .nemo file: NeMo 3.0.0 builds such a model "
            "but cannot run it, and names its weights differently. Keep the .ckpt."
        )
    ours: dict[str, Any] = {}
    for name, (known, _) in _BLOCKS.items():
        model[name], ours[name] = _parted(model[name], known)
    for name in ("train_ds", "validation_ds"):
        augmentor = (model[name] or {}).get("batch_augmentor")  # a run without validation has no such block
        if augmentor:
            model[name]["batch_augmentor"], own = _parted(augmentor, _AUGMENTOR_KEYS)
            ours[name] = {"batch_augmentor": own} if own else {}
    ours = {name: block for name, block in ours.items() if block}
    return {**model, "target": TARGET, **({OURS: ours} if ours else {})}


def _parted(block: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a block into the keys that NeMo takes, and the settings that only we know, if they are in use."""
    theirs = {key: value for key, value in block.items() if key in known}
    if "_target_" in block:
        theirs = {"_target_": nemo_target(block["_target_"]), **theirs}
    own = {key: value for key, value in block.items() if key not in known and key != "_target_"}
    return theirs, {key: value for key, value in own.items() if value not in (None, False)}


def yaml_of(content: Mapping[str, Any]) -> bytes:
    """Return a configuration as YAML, in NeMo's style."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(content))).encode()


# ---- in --------------------------------------------------------------------------------------------------------


def plain_yaml(text: bytes, source: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Parse untrusted YAML into plain values: no tags, no anchors, no references, and a bounded size.

    With `keys`, only those blocks are checked and returned. Raises CheckpointError and ConfigError.
    """
    try:
        if odd := odd_in_yaml(text.decode("utf-8")):
            raise CheckpointError(f"{source}: its configuration has {odd}. Refused: NeMo does not write such files.")
        content = OmegaConf.to_container(OmegaConf.create(text.decode("utf-8")), resolve=False)
    except AssertionError:  # OmegaConf raises it for a single number
        raise CheckpointError(f"{source}: its configuration must be a mapping of keys, not a single value.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, RecursionError) as error:
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: its configuration is not YAML as NeMo writes it: {message}.") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{source}: its configuration must be a mapping of keys, not a {kind}.")
    if keys is not None:
        content = {key: value for key, value in content.items() if key in keys}
    check_plain(content, source)
    return {str(key): value for key, value in content.items()}


def from_nemo(content: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the complete configuration of a model from a .nemo file; everything outside `model` is the base file's.

    Raises CheckpointError, which names a key without a counterpart here, and ConfigError for impossible values.
    """
    wrapped = content.get("model")
    given = dict(wrapped if isinstance(wrapped, Mapping) else content)
    _check_kind(given, source)
    base = copy.deepcopy(_base())
    model = base["model"]
    for name in _BLOCKS:
        model[name] = _block_from_nemo(name, given.pop(name, None), model[name], source)
    for key, where in _SCALARS.items():
        block, _, second = where.partition(".")
        value = given.pop(key, None)
        model[key] = model[block][second] if value is None else value
    for name in ("train_ds", "validation_ds", "optim"):
        model[name] = _inert_from_nemo(model[name], given.get(name), f"model.{name}")
    for key, value in leaves(given.pop(OURS, None) or {}):
        _put(model, key, value, source)
    for key, value in given.items():
        if key not in _INERT and not _is_neutral(value):
            raise CheckpointError(f"{source}: {key}: {str(value)[:60]!r} has no counterpart here. {_REMEDY}")
    return config_from_dict(base, source, overrides)


def is_nest(content: Mapping[str, Any]) -> bool:
    """Return True if this describes a NEST of any NeMo version, rather than another NeMo model."""
    return content.get("target") in _TARGETS or "quantizer" in content


def config_around(preprocessor: Any, encoder: Any, source: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return a NEST configuration with standard settings around the preprocessor and encoder of another NeMo model.

    Keys that the blocks leave out have the defaults of NeMo's constructors. Raises CheckpointError and ConfigError.
    """
    config = load_config()
    for name, block in (("preprocessor", preprocessor), ("encoder", encoder)):
        ours = _base()["model"][name]
        filled = _block_from_nemo(name, block, ours, source)
        if name == "preprocessor":  # only pretraining needs padding to whole tokens; it changes no valid frame
            filled["pad_to"] = ours["pad_to"]
        config.model[name] = OmegaConf.create(filled)
    config.model.sample_rate = config.model.preprocessor.sample_rate  # the preprocessor's value is the real one
    return with_overrides(config, overrides, source)


@functools.cache
def _base() -> dict[str, Any]:
    return resolved(load_config())


def _check_kind(given: Mapping[str, Any], source: str) -> None:
    target = given.get("target")
    if target is not None and not (isinstance(target, str) and target in _TARGETS):
        raise CheckpointError(
            f"{source} holds a {str(target)[:100]!r}, not a NEST. Known: {', '.join(sorted(_CLASS_NAMES))}. Refused."
        )
    if given.get("mask_position") not in (None, "pre_conv"):
        raise CheckpointError(
            f"{source}: mask_position is {str(given['mask_position'])[:60]!r}. NeMo 3.0.0 cannot run such models, and "
            "names their weights differently: only pre_conv can be read."
        )


def _block_from_nemo(name: str, block: Any, ours: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a block with every key of `ours`: the given value, or the default of NeMo's constructor."""
    if block is None and name == "spec_augment":
        block = {}
    if not isinstance(block, Mapping):
        raise CheckpointError(f"{source}: its configuration has no block {name}: it is not a NEST model.")
    known, theirs = _BLOCKS[name]
    for key, value in block.items():
        if key not in known and key != "_target_" and not _is_neutral(value, theirs.get(key)):
            raise CheckpointError(f"{source}: {name}.{key}: {str(value)[:60]!r} has no counterpart here. {_REMEDY}")
    filled = {key: known.get(key, ours[key]) for key in ours}
    filled |= {key: value for key, value in block.items() if key in known or key == "_target_"}
    missing = [key for key, value in filled.items() if value is _REQUIRED]
    if missing:
        raise CheckpointError(f"{source}: {name}.{missing[0]} is missing from its configuration.")
    if name == "preprocessor" and filled["n_fft"] is None:
        filled["n_fft"] = _n_fft(filled)
    if name == "encoder":
        filled["att_context_size"] = _att_context_size(filled["att_context_size"], source)
    return filled


def _is_neutral(value: Any, allowed: Sequence[Any] | None = None) -> bool:
    """Return True if the value of a key that we do not know leaves the model unchanged.

    `allowed` lists such values; None is for a key that NeMo 3.0.0 does not know either, which must be empty.
    """
    if allowed is None:
        return value in (None, False, 0, "") or value == {} or value == []
    return any(option is _ANY or value == option for option in allowed)


def _n_fft(preprocessor: Mapping[str, Any]) -> int | None:
    """Return NeMo's default: the smallest power of 2 that is not below the window's length in samples."""
    size, rate = preprocessor["window_size"], preprocessor["sample_rate"]
    if not isinstance(size, int | float) or not isinstance(rate, int) or not 1 <= size * rate < 1 << 20:
        return None  # the checks of the model report it
    return 1 << (int(size * rate) - 1).bit_length()


def _att_context_size(value: Any, source: str) -> Any:
    """Return [left, right] in frames; NeMo also accepts null, and a list of pairs among which training alternates.

    Raises CheckpointError for more than one pair.
    """
    if value is None:
        return [-1, -1]
    pairs = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    if len(pairs) > 1:
        raise CheckpointError(f"{source}: encoder.att_context_size has {len(pairs)} sizes; only one is supported.")
    return pairs[0]


def _inert_from_nemo(ours: dict[str, Any], given: Any, place: str) -> dict[str, Any]:
    """Return a block that describes the original run, limited to keys that we know; it does not affect the weights."""
    if not isinstance(given, Mapping):
        return ours
    known = {**ours, **dict.fromkeys(key for key in given if f"{place}.{key}" in EXTRA_KEYS)}
    block: dict[str, Any] = {}
    for key, value in known.items():
        if isinstance(value, Mapping) and isinstance(given.get(key), Mapping):
            block[key] = _inert_from_nemo(dict(value), given[key], f"{place}.{key}")
        elif key in given and (given[key] is None or not isinstance(given[key], Mapping)):
            block[key] = given[key]
        else:
            block[key] = None if key in _ABSENT_IS_NONE else value
    return block


def _put(model: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set a key that only we know. Raises CheckpointError."""
    if f"model.{key}" not in EXTRA_KEYS:
        raise CheckpointError(f"{source}: {OURS}.{key} is unknown to this version. Update nestcli.")
    *blocks, last = key.split(".")
    block: Any = model
    for name in blocks:
        block = block.get(name)
        if not isinstance(block, dict):
            raise CheckpointError(f"{source}: {OURS}.{key} belongs to a block that is missing.")
    block[last] = value
