"""The weights that a new run starts from: NeMo's `init_from_...` keys and `init_from_encoder`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from nestcli.checkpoint.encoder import read_encoder
from nestcli.checkpoint.load import checkpoint_weights
from nestcli.checkpoint.weights import fitted_tensor
from nestcli.config import resolved
from nestcli.data.datamodule import NestDataModule
from nestcli.errors import CheckpointError, ConfigError, DataError
from nestcli.files import user_path
from nestcli.keys import START_KEYS
from nestcli.model.fitted_codes import fit_codes
from nestcli.model.nest import NestModel
from nestcli.model.target_statistics import Targets
from nestcli.training.target_check import read_sample

ENCODER_KEY = "init_from_encoder"
FIT_SECONDS = 3600.0  # amount of audio that the quantizer is fitted to
# Keys that change an encoder's function but not the shapes of its weights.
_FUNCTION = (
    *(f"model.preprocessor.{key}" for key in ("sample_rate", "window_size", "window_stride", "n_fft")),
    *(f"model.encoder.{key}" for key in ("xscaling", "att_context_size", "att_context_style", "conv_context_size")),
)


@dataclass(frozen=True)
class WeightSource:
    """A checkpoint to take weights from: the tensors whose name contains one of `include` and none of `exclude`."""

    key: str  # where the configuration names it
    path: str
    include: tuple[str, ...] = ("",)
    exclude: tuple[str, ...] = ()
    whole: bool = True  # the checkpoint and the model must have the same tensors

    @property
    def text(self) -> str:
        """The source as the command line names it."""
        return f"{self.key}={self.path}"

    def takes(self, name: str) -> bool:
        return any(part in name for part in self.include) and not any(part in name for part in self.exclude)


def weight_sources(config: DictConfig) -> list[WeightSource]:
    """Return the sources that the configuration names. Raises ConfigError for a form that is not supported."""
    given = {key: value for key in START_KEYS if (value := resolved(config).get(key)) is not None}
    if "init_from_pretrained_model" in given:
        raise ConfigError(
            "init_from_pretrained_model would download a model; nest downloads nothing. Fetch its .nemo file yourself "
            "and set init_from_nemo_model=FILE."
        )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both set; a run starts from one of them. Remove one.")
    return [source for key, value in given.items() for source in _sources(key, value)]


def _sources(key: str, value: Any) -> list[WeightSource]:
    if isinstance(value, str):
        return [WeightSource(key, user_path(value))]
    if key == ENCODER_KEY:
        raise ConfigError(f"{key}: {value!r} must be a path to a checkpoint or to a folder of transformers.")
    if not isinstance(value, Mapping) or not value or not all(isinstance(part, Mapping) for part in value.values()):
        raise ConfigError(f"{key}: {value!r}: give a path, or {{name: {{path: ..., include: [...], exclude: [...]}}}}.")
    return [_part(f"{key}.{name}", part) for name, part in value.items()]


def _part(key: str, part: Mapping[str, Any]) -> WeightSource:
    unknown = set(part) - {"path", "include", "exclude"}
    if unknown or not isinstance(part.get("path"), str):
        raise ConfigError(
            f"{key} needs a path, and may have include and exclude; it has {', '.join(part) or 'nothing'}."
        )
    include, exclude = (_texts(key, name, part.get(name)) for name in ("include", "exclude"))
    return WeightSource(key, user_path(part["path"]), include or ("",), exclude, whole=False)


def _texts(key: str, name: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, Sequence) and not isinstance(value, str) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{key}.{name}: {value!r} must be a list of parts of names, such as [encoder, decoder].")
    return tuple(texts)


def load_initial_weights(model: nn.Module, sources: Sequence[WeightSource], config: DictConfig) -> list[str]:
    """Load the weights into the model; return a line about each checkpoint. Raises CheckpointError, ConfigError."""
    lines = []
    for source in sources:
        ours = model.state_dict()
        if source.key == ENCODER_KEY:
            chosen, line = _encoder(source, ours, config)
        else:
            chosen = _chosen(source, ours)
            line = f"{source.path} ({len(chosen)} of {len(ours)} tensors)"
        model.load_state_dict(chosen, strict=False)
        lines.append(line)
    return lines


def fit_quantizer(model: NestModel, data: NestDataModule) -> str:
    """Fit the quantizer to a sample of the training data (`model.quantizer.init: kmeans`); return a line about it.

    Every process computes the same. Raises DataError if the data holds too little speech.
    """
    targets, audios = Targets(model), read_sample(data, FIT_SECONDS, math.inf, remote=True)
    try:
        fit_codes(model.quantizer, torch.cat([targets.stacks(audio_N) for audio_N in audios]))
    except ValueError as error:
        raise DataError(f"model.quantizer.init=kmeans: {error}. Use more speech, or init=random.") from None
    minutes = sum(map(len, audios)) / data.sample_rate / 60
    return f"quantizer fitted to {minutes:.0f} minutes of the training data (k-means of principal components)"


def _encoder(source: WeightSource, ours: Mapping[str, Tensor], config: DictConfig) -> tuple[dict[str, Tensor], str]:
    """Return the encoder's weights from any model with such an encoder, and a line about what was taken and left."""
    try:
        stored = read_encoder(source.path)
    except CheckpointError as error:
        raise CheckpointError(f"{source.key}: {error}") from None
    wanted = {name: value for name, value in ours.items() if name.startswith("encoder.")}
    remedy = f"For a model that fits it, name it as the configuration too: nest pretrain {source.path} {source.text}"
    for key in _FUNCTION:
        there, here = (OmegaConf.select(each, key) for each in (stored.config, config))
        if there != here:
            raise ConfigError(f"{source.text} was trained with {key}={there}; here it is {here}. {remedy}")
    lacking = [name for name in wanted if name not in stored.state_dict]
    surplus = [name for name in stored.state_dict if name.startswith("encoder.") and name not in wanted]
    _refuse(lacking, f"{source.text} lacks {{}} of this encoder.", remedy)
    _refuse(surplus, f"{source.text} holds {{}}, which this encoder lacks.", remedy)
    try:
        chosen = {
            name: fitted_tensor(name, stored.state_dict[name], like, source.text) for name, like in wanted.items()
        }
    except CheckpointError as error:
        raise ConfigError(f"{error} {remedy}") from None
    left, fresh = _counted(stored.left), _counted(Counter(n.partition(".")[0] for n in ours if n not in wanted))
    return (
        chosen,
        f"{source.path}: the encoder of its {stored.kind} ({len(chosen)} tensors); left: {left}; fresh: {fresh}",
    )


def _counted(parts: Mapping[str, int]) -> str:
    """Describe the parts of a model by their numbers of tensors, without the preprocessor, which learns nothing."""
    named = [f"{name} ({count})" for name, count in parts.items() if name != "preprocessor"]
    return ", ".join(named) or "nothing"


def _chosen(source: WeightSource, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        stored = checkpoint_weights(source.path)
    except CheckpointError as error:
        raise CheckpointError(f"{source.key}: {error}") from None
    chosen = {name: value for name, value in stored.items() if source.takes(name)}
    if not chosen:
        raise ConfigError(f"{source.text}: none of its {len(stored)} tensors is selected by include and exclude.")
    try:
        fitted = {name: fitted_tensor(name, chosen[name], ours[name], source.text) for name in chosen if name in ours}
    except CheckpointError as error:
        raise ConfigError(f"{error} {_remedy(source)}") from None
    absent = [name for name in chosen if name not in ours]
    missing = [name for name in ours if source.whole and name not in chosen]
    _refuse(absent, f"{source.text} holds {{}}, which this model lacks.", _remedy(source))
    _refuse(missing, f"{source.text} lacks {{}} of this model.", _remedy(source))
    return fitted


def _refuse(names: Sequence[str], problem: str, remedy: str) -> None:
    """Raise ConfigError about tensors by their names, if there are any; `{}` in the problem stands for them."""
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise ConfigError(f"{problem.replace('{}', names[0] + more)} {remedy}")


def _remedy(source: WeightSource) -> str:
    key = source.key.split(".")[0]
    part = f"{key}={{a: {{path: {source.path}, include: [encoder], exclude: [...]}}}}"
    return f"For its encoder alone: {ENCODER_KEY}={source.path}. To take any part of it: {part}"
