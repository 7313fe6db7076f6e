"""Write the encoder as a folder that transformers' `ParakeetEncoder` loads, and read such folders, without pickle.

Neither direction needs transformers. Source: `ParakeetEncoderConfig` and `ParakeetFeatureExtractor` of transformers 5;
docs/export.md lists what they cannot express.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from nestcli.checkpoint.safetensors_file import safetensors_weights
from nestcli.errors import CheckpointError
from nestcli.files import new_folder
from nestcli.model.config import PER_FEATURE, EncoderConfig, NestConfig, PreprocessorConfig
from nestcli.model.features import PREEMPHASIS

CONFIG, WEIGHTS, INDEX, FEATURES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "preprocessor_config.json",
)  # fmt: skip
_MAX_JSON = 1 << 20  # bytes; the index of a large model has 200,000
_MAX_PARTS = 1_000
_MAX_NUMBER = 1 << 30
_KIND = "parakeet_encoder"
_WITH_ENCODER = {"parakeet_ctc": "ParakeetForCTC", "parakeet_rnnt": "ParakeetForRNNT", "parakeet_tdt": "ParakeetForTDT"}
# Parts of tensor names: ours -> theirs. All other names are the same.
_NAMES = {
    "pre_encode.conv.": "subsampling.layers.",
    "pre_encode.out.": "subsampling.linear.",
    ".conv.batch_norm.": ".conv.norm.",
    ".linear_q.": ".q_proj.",
    ".linear_k.": ".k_proj.",
    ".linear_v.": ".v_proj.",
    ".linear_out.": ".o_proj.",
    ".linear_pos.": ".relative_k_proj.",
    ".pos_bias_u": ".bias_u",
    ".pos_bias_v": ".bias_v",
}
# Fixed properties of their encoder, under NeMo's keys.
_FIXED = {
    "subsampling": "dw_striding", "causal_downsampling": False, "self_attention_model": "rel_pos",
    "att_context_size": [-1, -1], "att_context_style": "regular", "conv_norm_type": "batch_norm", "feat_out": -1,
    "conv_context_size": None, "untie_biases": True, "stochastic_depth_drop_prob": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """The configuration blocks in a folder, under NeMo's keys, and the class of its model."""

    kind: str
    preprocessor: dict[str, Any]
    encoder: dict[str, Any]


def is_transformers(path: str | os.PathLike[str]) -> bool:
    """Return True if this is a transformers folder."""
    return (Path(path) / CONFIG).is_file()


# ---- out -------------------------------------------------------------------------------------------------------


def write_transformers(
    folder: str | os.PathLike[str], config: DictConfig, state_dict: Mapping[str, Tensor], *, force: bool = False
) -> None:
    """Write the encoder and its feature extractor atomically, for `ParakeetEncoder.from_pretrained`.

    Raises CheckpointError for an encoder that the class cannot express (it names the key), and, without `force`, for a
    folder that exists.
    """
    nest = NestConfig.from_config(config)
    description = _described(nest.encoder, nest.preprocessor)
    state = {
        their_name(name): value.detach().cpu().contiguous().clone()
        for name, value in state_dict.items()
        if name.startswith("encoder.")
    }
    with new_folder(folder, CheckpointError, force=force) as path:
        (path / CONFIG).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        extractor = _extractor(nest.preprocessor)
        (path / FEATURES).write_text(json.dumps(extractor, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(state, path / WEIGHTS, {"format": "pt"})


def their_name(name: str) -> str:
    """Return the name that a tensor of our encoder has in a `ParakeetEncoder`."""
    return _renamed(name.removeprefix("encoder."), _NAMES)


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def _described(encoder: EncoderConfig, preprocessor: PreprocessorConfig) -> dict[str, Any]:
    """Return the transformers configuration of our encoder. Raises CheckpointError."""
    _check_expressible(encoder, preprocessor)
    return {
        "architectures": ["ParakeetEncoder"],
        "model_type": _KIND,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": encoder.d_model,
        "num_hidden_layers": encoder.n_layers,
        "num_attention_heads": encoder.n_heads,
        "num_key_value_heads": encoder.n_heads,
        "intermediate_size": encoder.d_model * encoder.ff_expansion_factor,
        "conv_kernel_size": encoder.conv_kernel_size,
        "num_mel_bins": encoder.feat_in,
        "subsampling_factor": encoder.subsampling_factor,
        "subsampling_conv_channels": encoder.subsampling_channels,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "attention_bias": encoder.use_bias,
        "convolution_bias": encoder.use_bias,
        "scale_input": encoder.xscaling,
        "dropout": encoder.dropout_pre_encoder,
        "activation_dropout": encoder.dropout,
        "attention_dropout": encoder.dropout_att,
        "dropout_positions": encoder.dropout_emb,
        "layerdrop": 0.0,
        "max_position_embeddings": 5000,
    }


def _check_expressible(encoder: EncoderConfig, preprocessor: PreprocessorConfig) -> None:
    half = (encoder.conv_kernel_size - 1) // 2
    bins = encoder.feat_in
    for _ in range(encoder.subsampling_factor.bit_length() - 1):
        bins = -(-bins // 2)
    for key, value, fits, only in (
        ("encoder.att_context_size", list(encoder.att_context_size), max(encoder.att_context_size) < 0, "[-1, -1]"),
        ("encoder.conv_norm_type", encoder.conv_norm_type, encoder.conv_norm_type == "batch_norm", "batch_norm"),
        ("encoder.conv_context_size", encoder.conv_context_size, encoder.conv_padding == (half, half), "null"),
        ("encoder.feat_out", encoder.feat_out, encoder.feat_out in (-1, 0, encoder.d_model), "-1"),
        ("encoder.feat_in", encoder.feat_in, bins == encoder.feat_in // encoder.subsampling_factor, "a multiple of it"),
        ("preprocessor.features", preprocessor.features, preprocessor.features == encoder.feat_in, "encoder.feat_in"),
        ("preprocessor.normalize", preprocessor.normalize, preprocessor.normalize == PER_FEATURE, PER_FEATURE),
    ):
        if not fits:
            raise CheckpointError(
                f"model.{key}={value} cannot go into transformers: its ParakeetEncoder knows only {only}. "
                "Export it as nemo, safetensors or onnx."
            )


def _extractor(preprocessor: PreprocessorConfig) -> dict[str, Any]:
    return {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": preprocessor.features,
        "sampling_rate": preprocessor.sample_rate,
        "hop_length": preprocessor.hop_length,
        "win_length": preprocessor.window_length,
        "n_fft": preprocessor.n_fft,
        "preemphasis": PREEMPHASIS,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


# ---- in --------------------------------------------------------------------------------------------------------


def transformers_blocks(folder: Path) -> Blocks:
    """Read config.json and preprocessor_config.json. Raises CheckpointError for another kind of model."""
    content, source = _read_json(folder / CONFIG), str(folder / CONFIG)
    model_type = str(content.get("model_type"))
    if model_type == _KIND:
        kind, encoder = "ParakeetEncoder", content
    elif model_type in _WITH_ENCODER and isinstance(content.get("encoder_config"), dict):
        kind, encoder = _WITH_ENCODER[model_type], content["encoder_config"]
    else:
        known = ", ".join([_KIND, *_WITH_ENCODER])
        raise CheckpointError(f"{source}: the model_type {model_type[:60]!r} is not supported. Known: {known}.")
    features = _read_json(folder / FEATURES) if (folder / FEATURES).is_file() else {}
    bins = _number(encoder, "num_mel_bins", 80, source)
    return Blocks(kind, _preprocessor(features, bins, str(folder / FEATURES)), _encoder(encoder, bins, source))


def _encoder(theirs: Mapping[str, Any], bins: int, source: str) -> dict[str, Any]:
    """Return the encoder's block; missing keys have the defaults of transformers' class."""
    width = _number(theirs, "hidden_size", 1024, source)
    inner = _number(theirs, "intermediate_size", 4096, source)
    bias = theirs.get("attention_bias", True)
    for key, value, only in (
        ("hidden_act", theirs.get("hidden_act", "silu"), "silu"),
        ("subsampling_conv_kernel_size", theirs.get("subsampling_conv_kernel_size", 3), 3),
        ("subsampling_conv_stride", theirs.get("subsampling_conv_stride", 2), 2),
        ("convolution_bias", theirs.get("convolution_bias", True), bias),
        ("intermediate_size", inner, inner // width * width),
        ("num_mel_bins", bins, bins // (factor := _number(theirs, "subsampling_factor", 8, source)) * factor),
    ):
        if value != only:
            raise CheckpointError(f"{source}: {key} is {repr(value)[:60]}; an encoder of nest needs {only!r}.")
    return {
        **_FIXED,
        "feat_in": bins,
        "d_model": width,
        "n_layers": _number(theirs, "num_hidden_layers", 24, source),
        "n_heads": _number(theirs, "num_attention_heads", 8, source),
        "ff_expansion_factor": inner // width,
        "conv_kernel_size": _number(theirs, "conv_kernel_size", 9, source),
        "subsampling_factor": factor,
        "subsampling_conv_channels": _number(theirs, "subsampling_conv_channels", 256, source),
        "use_bias": bias,
        "xscaling": theirs.get("scale_input", True),
        "dropout": _share(theirs, "activation_dropout", 0.1, source),
        "dropout_pre_encoder": _share(theirs, "dropout", 0.1, source),
        "dropout_emb": _share(theirs, "dropout_positions", 0.0, source),
        "dropout_att": _share(theirs, "attention_dropout", 0.1, source),
    }


def _preprocessor(theirs: Mapping[str, Any], bins: int, source: str) -> dict[str, Any]:
    rate = _number(theirs, "sampling_rate", 16_000, source)
    for key, value, only in (
        ("preemphasis", theirs.get("preemphasis", PREEMPHASIS), PREEMPHASIS),
        ("feature_size", theirs.get("feature_size", bins), bins),
    ):
        if value != only:
            raise CheckpointError(f"{source}: {key} is {repr(value)[:60]}; nest's features have {only!r}.")
    return {
        "sample_rate": rate,
        "window_size": _number(theirs, "win_length", 400, source) / rate,
        "window_stride": _number(theirs, "hop_length", 160, source) / rate,
        "n_fft": _number(theirs, "n_fft", 512, source),
        "features": bins,
        "dither": 1e-5,
        "normalize": PER_FEATURE,
    }


def read_transformers(folder: Path) -> dict[str, Tensor]:
    """Read all weights in a folder: the encoder's under our names, others under their own. Raises CheckpointError."""
    stored = {name: value for part in _files(folder) for name, value in safetensors_weights(folder / part).items()}
    alone = transformers_blocks(folder).kind == "ParakeetEncoder"
    ours = {theirs: ours for ours, theirs in _NAMES.items()}
    return {
        f"encoder.{_renamed(name.removeprefix('encoder.'), ours)}"
        if alone or name.startswith("encoder.")
        else name: value
        for name, value in stored.items()
    }


def _files(folder: Path) -> list[str]:
    """Return the files that hold the weights: a single one, or those that an index names. Raises CheckpointError."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} has no {WEIGHTS}: save the model with safe_serialization, which is the default."
        )
    table = _read_json(folder / INDEX).get("weight_map")
    named = list(table.values()) if isinstance(table, dict) else []
    odd = [name for name in named if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]
    if odd or not 0 < len(set(named)) <= _MAX_PARTS:
        named_odd = f": {str(odd[0])[:60]!r}" if odd else ""
        raise CheckpointError(f"{folder / INDEX} must name files in its own folder{named_odd}.")
    return sorted(set(named))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, more than {_MAX_JSON:,}. Refused.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be valid JSON: {str(error)[:100]}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a mapping of keys, not a {type(content).__name__}.")
    return content


def _number(block: Mapping[str, Any], key: str, default: int, source: str) -> int:
    value = block.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_NUMBER:
        raise CheckpointError(f"{source}: {key} is {repr(value)[:60]}; it must be a number from 1 to {_MAX_NUMBER:,}.")
    return value


def _share(block: Mapping[str, Any], key: str, default: float, source: str) -> float:
    value = block.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise CheckpointError(f"{source}: {key} is {repr(value)[:60]}; it must be a share from 0 to 1.")
    return float(value)
