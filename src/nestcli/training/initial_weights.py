"""The weights that a run starts from in place of random ones: NeMo's `init_from_...` keys, and `init_from_encoder`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from nestcli.checkpoint.encoder import read_encoder
from nestcli.checkpoint.load import checkpoint_weights
from nestcli.checkpoint.weights import fitted_tensor
from nestcli.config import resolved
from nestcli.errors import CheckpointError, ConfigError
from nestcli.files import user_path
from nestcli.keys import START_KEYS

ENCODER_KEY = "init_from_encoder"
# What changes an encoder's function and none of its shapes.
_FUNCTION = (
    *(f"model.preprocessor.{key}" for key in ("sample_rate", "window_size", "window_stride", "n_fft")),
    *(f"model.encoder.{key}" for key in ("xscaling", "att_context_size", "att_context_style", "conv_context_size")),
)


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from, and which tensors: those whose name holds one of `include` and none of `exclude`."""

    key: str  # where the configuration names it
    path: str
    include: tuple[str, ...] = ("",)
    exclude: tuple[str, ...] = ()
    whole: bool = True  # every tensor of the checkpoint must fit, and every one of the model must be in it

    def takes(self, name: str) -> bool:
        return any(part in name for part in self.include) and not any(part in name for part in self.exclude)


def starts_of(config: DictConfig) -> list[Start]:
    """What the configuration wants to start from. Raises ConfigError for what cannot be."""
    given = {key: value for key in START_KEYS if (value := resolved(config).get(key)) is not None}
    if "init_from_pretrained_model" in given:
        raise ConfigError(
            "init_from_pretrained_model would download a model; nest downloads nothing. Fetch its .nemo file yourself "
            "and set init_from_nemo_model=FILE."
        )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both set; a run starts from one of them. Remove one.")
    return [start for key, value in given.items() for start in _starts(key, value)]


def _starts(key: str, value: Any) -> list[Start]:
    if isinstance(value, str):
        return [Start(key, user_path(value))]
    if key == ENCODER_KEY:
        raise ConfigError(f"{key}: {value!r} is no path. Name a checkpoint, or a folder of transformers.")
    if not isinstance(value, Mapping) or not value or not all(isinstance(part, Mapping) for part in value.values()):
        raise ConfigError(f"{key}: {value!r}: give a path, or {{name: {{path: ..., include: [...], exclude: [...]}}}}.")
    return [_part(f"{key}.{name}", part) for name, part in value.items()]


def _part(key: str, part: Mapping[str, Any]) -> Start:
    unknown = set(part) - {"path", "include", "exclude"}
    if unknown or not isinstance(part.get("path"), str):
        raise ConfigError(
            f"{key} needs a path, and may have include and exclude; it has {', '.join(part) or 'nothing'}."
        )
    include, exclude = (_texts(key, name, part.get(name)) for name in ("include", "exclude"))
    return Start(key, user_path(part["path"]), include or ("",), exclude, whole=False)


def _texts(key: str, name: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, Sequence) and not isinstance(value, str) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{key}.{name}: {value!r} is no list of parts of names, such as [encoder, decoder].")
    return tuple(texts)


def start_from(model: nn.Module, starts: Sequence[Start], config: DictConfig) -> list[str]:
    """Put the weights into the model; a line for a person on each checkpoint. Raises CheckpointError, ConfigError."""
    lines = []
    for start in starts:
        ours = model.state_dict()
        if start.key == ENCODER_KEY:
            chosen, line = _encoder(start, ours, config)
        else:
            chosen = _chosen(start, ours)
            line = f"{start.path} ({len(chosen)} of {len(ours)} tensors)"
        model.load_state_dict(chosen, strict=False)
        lines.append(line)
    return lines


def _encoder(start: Start, ours: Mapping[str, Tensor], config: DictConfig) -> tuple[dict[str, Tensor], str]:
    """The encoder's weights out of any model that has such an encoder, and what was taken and left, in words."""
    try:
        stored = read_encoder(start.path)
    except CheckpointError as error:
        raise CheckpointError(f"{start.key}: {error}") from None
    source = f"{start.key}={start.path}"
    wanted = {name: value for name, value in ours.items() if name.startswith("encoder.")}
    remedy = f"For a model that fits it, name it as the configuration too: nest pretrain {start.path} {source}"
    for key in _FUNCTION:
        there, here = (OmegaConf.select(each, key) for each in (stored.config, config))
        if there != here:
            raise ConfigError(f"{source} was trained with {key}={there}; here it is {here}. {remedy}")
    lacking = [name for name in wanted if name not in stored.state_dict]
    surplus = [name for name in stored.state_dict if name.startswith("encoder.") and name not in wanted]
    for names, text in ((lacking, "lacks {} of this encoder"), (surplus, "holds {}, which this encoder lacks")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(f"{source} {text.format(names[0] + more)}. {remedy}")
    try:
        chosen = {name: fitted_tensor(name, stored.state_dict[name], like, source) for name, like in wanted.items()}
    except CheckpointError as error:
        raise ConfigError(f"{error} {remedy}") from None
    left, fresh = _counted(stored.left), _counted(Counter(n.partition(".")[0] for n in ours if n not in wanted))
    return (
        chosen,
        f"{start.path}: the encoder of its {stored.kind} ({len(chosen)} tensors); left: {left}; fresh: {fresh}",
    )


def _counted(parts: Mapping[str, int]) -> str:
    """Parts of a model by name with their number of tensors; the preprocessor has nothing to learn."""
    named = [f"{name} ({count})" for name, count in parts.items() if name != "preprocessor"]
    return ", ".join(named) or "nothing"


def _chosen(start: Start, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    source = f"{start.key}={start.path}"
    try:
        stored = checkpoint_weights(start.path)
    except CheckpointError as error:
        raise CheckpointError(f"{start.key}: {error}") from None
    chosen = {name: value for name, value in stored.items() if start.takes(name)}
    if not chosen:
        raise ConfigError(f"{source}: none of its {len(stored)} tensors is chosen by include and exclude.")
    try:
        fitted = {name: fitted_tensor(name, chosen[name], ours[name], source) for name in chosen if name in ours}
    except CheckpointError as error:
        raise ConfigError(f"{error} {_remedy(start)}") from None
    absent = [name for name in chosen if name not in ours]
    missing = [name for name in ours if start.whole and name not in chosen]
    for names, text in ((absent, "holds {}, which this model lacks"), (missing, "lacks {} of this model")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ConfigError(f"{source} {text.format(names[0] + more)}. {_remedy(start)}")
    return fitted


def _remedy(start: Start) -> str:
    key = start.key.split(".")[0]
    part = f"{key}={{a: {{path: {start.path}, include: [encoder], exclude: [...]}}}}"
    return f"For its encoder alone: {ENCODER_KEY}={start.path}. To take any part of it: {part}"
