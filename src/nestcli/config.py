"""Load configurations: read a preset or YAML file, apply overrides, check every key and `_target_`.

No name in a file is imported or called: `_target_` is looked up in `targets.TARGETS`, a table of strings.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nestcli.checks import (
    REFERENCE,
    check_digits,
    check_plain,
    check_references,
    check_sizes,
    coerced,
    is_within,
    read_yaml,
    short,
)
from nestcli.errors import ConfigError
from nestcli.keys import EXTRA_KEYS, START_KEYS, START_PARTS, foreign, is_off
from nestcli.targets import CLASSES, PLACES, TARGETS


def config_dir() -> Path:
    """Return the folder of the presets: inside the installed package, or at the top of the source tree."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


BASE = "nest_fast-conformer"
_SHIPPED = (BASE, "small", "medium", "large", "xlarge", "xxlarge", "demo")  # listed in this order, before others
PRESETS = (*_SHIPPED, *sorted({path.stem for path in config_dir().glob("[!.]*.yaml")} - {*_SHIPPED}))

# A standalone file (without `base:`) may omit these. Any other missing key is an error, because NeMo's own defaults
# differ from the values in this configuration.
_FILLED_FROM_BASE = ("name", "trainer", "exp_manager", "model.spec_augment", "model.train_ds", "model.validation_ds")
_NULL_IF_ABSENT = (
    "model.train_ds.noise_manifest", "model.train_ds.batch_augmentor", "model.validation_ds.noise_manifest",
    "model.validation_ds.batch_augmentor", "model.validation_ds.manifest_filepath",
)  # fmt: skip

NEMO_VARIABLE = "USE_NEMO_CONFORMER"  # sets model.encoder.backend

T = TypeVar("T")


def load_config(name_or_path: str = BASE, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a preset or YAML file, apply `key=value` words and check every key, interpolation and `_target_`.

    Values of `???` stay unchanged; `require` asks for them when they are used. Raises ConfigError.
    """
    config = with_overrides(_load_named(name_or_path), overrides, name_or_path)
    for key, value in leaves(resolved(config)):
        if value == "" and key in _known_keys():
            raise ConfigError(f"{name_or_path}: {key} is not set: the value is empty. Write a value, or null for none.")
    return config


def unused_keys(config: DictConfig) -> list[str]:
    """Return a message for each key that nest does not read."""
    known = _known_keys() | _blocks()
    return [
        f"+{key} has no effect in nest.{_nearest(key)}"
        for key, value in leaves(OmegaConf.to_container(config, resolve=False))
        if not (key in known or _is_part(key) or is_off(key, value))
        and not key.startswith("exp_manager.wandb_logger_kwargs.")
    ]


def with_overrides(config: DictConfig, overrides: Iterable[str], source: str) -> DictConfig:
    """Apply `key=value` words to the configuration and check every interpolation and `_target_`.

    A word that sets initial weights (a key of START_KEYS) removes those that the configuration sets by another key.
    """
    overrides = list(overrides)
    given = {_start_named(word) for word in overrides} - {None}
    for key in START_KEYS:
        if given and key not in given:
            config.pop(key, None)
    for word in overrides:
        _apply_override(config, word)
    _check(config, source)
    return config


def _start_named(word: str) -> str | None:
    """Return the key of START_KEYS that an override sets to a value, or None."""
    key, _, value = word.lstrip("+").partition("=")
    start = key.partition(".")[0]
    return start if start in START_KEYS and value not in ("", "null") else None


def load_training_config(name_or_path: str = BASE, overrides: Iterable[str] = ()) -> DictConfig:
    """Load a configuration for training: USE_NEMO_CONFORMER chooses the encoder's code, unless an override does.

    Commands that only inspect a model ignore the variable: the model is the same. Raises ConfigError.
    """
    return load_config(name_or_path, [*words_of_environment(), *overrides])


def words_of_environment() -> list[str]:
    """Return the overrides that environment variables ask for. Raises ConfigError."""
    value = os.environ.get(NEMO_VARIABLE, "").strip()
    if not value:
        return []
    backend = {"true": "nemo", "1": "nemo", "false": "nest", "0": "nest"}.get(value.lower())
    if backend is None:
        raise ConfigError(
            f"the environment variable {NEMO_VARIABLE} is {value!r}. Set it to true (or 1) to train with NeMo's "
            "encoder, to false (or 0) to train with nest's, or unset it."
        )
    return [f"model.encoder.backend={backend}"]


def config_from_dict(content: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> DictConfig:
    """Check a configuration from a checkpoint as `load_config` does, and refuse resolvers such as `${oc.env:...}`."""
    check_plain(content, source)
    # Keys that the run added (+key=value) are accepted.
    return with_overrides(OmegaConf.create(_without_surroundings(content)), overrides, source)


def _without_surroundings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Drop settings of the machine that trained a checkpoint: the encoder's backend, the folder, W&B."""
    kept, model, manager = dict(content), content.get("model"), content.get("exp_manager")
    encoder = model.get("encoder") if isinstance(model, Mapping) else None
    if isinstance(model, Mapping) and isinstance(encoder, Mapping):
        kept["model"] = {**model, "encoder": {key: value for key, value in encoder.items() if key != "backend"}}
    if isinstance(manager, Mapping):
        kept["exp_manager"] = {**manager, "exp_dir": None, "create_wandb_logger": False}
    return kept


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command's words into the configuration's name, if one comes first, and its overrides."""
    if not words or _is_override(words[0]):
        return BASE, list(words)
    for word in words[1:]:
        if not _is_override(word):
            raise ConfigError(f"{word!r} is neither an option nor key=value. Give one configuration, then overrides.")
    return words[0], list(words[1:])


def _is_override(word: str) -> bool:
    """Return True if a word is key=value. Checkpoint names contain `=` too, as in NAME--val_loss=8.1-step=9.ckpt."""
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key and "--" not in key


def require(config: DictConfig, key: str, why: str) -> Any:
    """Return the value at `key`. Raises ConfigError naming the key if it is still `???` or empty."""
    block, _, name = key.rpartition(".")
    if OmegaConf.is_missing(parent := OmegaConf.select(config, block), name) or parent.get(name) in (None, "", []):
        raise ConfigError(f"{key} is not set: {why}. Add {key}=... to the command.")
    return OmegaConf.select(config, key)


def section(cls: type[T], config: DictConfig, key: str) -> T:
    """Build the dataclass `cls` from the block at `key`. Raises ConfigError if a value does not fit its field."""
    block = OmegaConf.select(config, key)
    if not isinstance(block, DictConfig):
        raise ConfigError(f"{key} is missing from the configuration, or is not a block of keys.")
    hints = _hints(typing.cast(typing.Hashable, cls))
    content = typing.cast("dict[str, Any]", OmegaConf.to_container(block, resolve=True))
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # cls is a dataclass by contract
        if field.name in content:
            values[field.name] = coerced(content[field.name], hints[field.name], f"{key}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{key}.{field.name} is missing from the configuration.")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from None


@functools.cache
def _hints(cls: typing.Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def seed_of(config: DictConfig) -> int:
    """Return the `seed` key, 0 by default. Raises ConfigError."""
    seed = config.get("seed")
    if seed is not None and not (isinstance(seed, int) and is_within(seed, 0, (1 << 63) - 1)):
        raise ConfigError(f"seed: {short(seed)} must be an integer from 0 to 2^63 - 1.")
    return seed or 0


def raw_config(preset: str) -> dict[str, Any]:
    """Read a preset's file unchanged: not merged with a base, interpolations unresolved."""
    return _read_yaml(config_dir() / f"{preset}.yaml")


def resolved(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain dictionaries with interpolations resolved."""
    return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))


# ---- reading ---------------------------------------------------------------------------------------------------


def _load_named(name_or_path: str) -> DictConfig:
    if name_or_path in PRESETS:
        return _load_file(config_dir() / f"{name_or_path}.yaml")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"{name_or_path}: configuration file not found.")
        return _load_file(path)
    close = difflib.get_close_matches(name_or_path, PRESETS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{name_or_path!r} is not a configuration.{hint} Give a preset ({', '.join(PRESETS)}) or a .yaml file."
    )


def _load_file(path: Path) -> DictConfig:
    config = _laid_over_base(path, _read_yaml(path))
    check_references(typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False)), str(path))
    return config


def _laid_over_base(path: Path, own: dict[str, Any]) -> DictConfig:
    base_name = own.pop("base", None)
    if path.resolve() == (config_dir() / f"{BASE}.yaml").resolve():
        return OmegaConf.create(own)
    base = raw_config(BASE)
    if base_name is None:
        return OmegaConf.create(_completed(own, base, path))
    if base_name not in PRESETS:
        raise ConfigError(f"{path}: base: {base_name!r} is not a preset. Known: {', '.join(PRESETS)}.")
    _check_known(leaves(own), str(path))
    merged = OmegaConf.merge(_load_named(base_name), own)
    assert isinstance(merged, DictConfig)
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration must be a mapping of keys, not a {type(content).__name__}.")
    for key in _own_keys(content):
        if "." in key:
            raise ConfigError(f"{path}: {key}: keys in a file must not contain dots. Write nested blocks instead.")
    return typing.cast("dict[str, Any]", content)


def _own_keys(content: Mapping[Any, Any]) -> Iterator[str]:
    for key, value in content.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from _own_keys(value)


def _completed(own: dict[str, Any], base: dict[str, Any], path: Path) -> dict[str, Any]:
    """Fill in the keys that a standalone file may omit. Raises ConfigError for any other missing key."""
    _check_known(leaves(own), str(path))
    config, given = OmegaConf.create(own), dict(leaves(own))
    for key in _NULL_IF_ABSENT:
        if not any(known == key or known.startswith(f"{key}.") for known in given):
            OmegaConf.update(config, key, None)
            given[key] = None
    missing = []
    for key, value in leaves(base):
        if key in given or any(key.startswith(f"{known}.") for known, content in given.items() if content is None):
            continue
        if any(key == prefix or key.startswith(f"{prefix}.") for prefix in _FILLED_FROM_BASE):
            OmegaConf.update(config, key, value)
        else:
            missing.append(key)
    if missing:
        raise ConfigError(
            f"{path} lacks {', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}. "
            f"To change single keys of the standard configuration, put `base: {BASE}` on the file's first line."
        )
    return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


# ---- overrides -------------------------------------------------------------------------------------------------


def _apply_override(config: DictConfig, word: str) -> None:
    key, equals, text = word.partition("=")
    adds = key.startswith("+")
    key = key.lstrip("+")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"{word!r} is not an override. Write key=value, such as model.encoder.n_layers=4.")
    if not text.strip():
        raise ConfigError(f"{key} is not set: {word.strip()!r} has no value. Write a value, or null for none.")
    value = _parse_value(text, word)
    for path, leaf in leaves({key: value}):
        for repeated in _repeated_keys():
            if path.startswith(f"{repeated}.") or (path == repeated and isinstance(leaf, list | dict)):
                raise ConfigError(f"{word!r} cannot be applied: {repeated} takes one value, which other keys repeat.")
    for path in [leaf for leaf, _ in leaves({key: value})] if isinstance(value, dict) else [key]:
        if not adds or foreign(path):
            _check_known([(path, value)], "the command line", blocks_allowed=True)
    try:
        OmegaConf.update(config, key, value, merge=isinstance(value, dict), force_add=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{word!r} cannot be applied: {_one_line(error)}") from None


def _parse_value(text: str, word: str) -> Any:
    """Parse the value of an override as YAML. Plain text, such as a path that contains `#`, is taken literally."""
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"v={text}"]))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        if text.lstrip()[:1] in ("[", "{"):
            raise ConfigError(f"{word!r}: the value is not valid YAML: {_one_line(error)}") from None
        return text
    parsed = typing.cast("dict[str, Any]", value)["v"]
    if isinstance(parsed, str) and text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1:
        return parsed  # quoted twice: the shell removed the outer quotes
    is_block = isinstance(parsed, dict | list) and text.lstrip()[:1] in ("[", "{")
    return text if isinstance(parsed, str | dict | list) and not is_block else parsed


# ---- checks ----------------------------------------------------------------------------------------------------


def _check(config: DictConfig, source: str) -> None:
    check_digits(OmegaConf.to_container(config, resolve=False), source)
    try:
        content = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{source}: an interpolation cannot be resolved: {_one_line(error)}") from None
    check_sizes(typing.cast("dict[str, Any]", content), source)
    for key, value in leaves(typing.cast("dict[str, Any]", content)):
        place, _, name = key.rpartition(".")
        if name != "_target_":
            continue
        if place not in PLACES:
            raise ConfigError(f"{source}: {key} names a class where no class is allowed. Remove it.")
        if not isinstance(value, str) or TARGETS.get(value) not in PLACES[place]:
            allowed = ", ".join(CLASSES[kind][0] for kind in sorted(PLACES[place]))
            raise ConfigError(f"{source}: {key}: {value!r} is not a supported class. Supported here: {allowed}.")


def _check_known(leaves: Iterable[tuple[str, Any]], source: str, *, blocks_allowed: bool = False) -> None:
    known, blocks = _known_keys(), _blocks()
    for key, value in leaves:
        if key in known or (key in blocks and (blocks_allowed or value is None or value == {})):
            continue
        if _is_part(key) or is_off(key, value):
            continue
        if (instead := foreign(key)) is not None:
            raise ConfigError(f"{source}: nest does not support {key}, a key of NeMo, Lightning or PyTorch. {instead}")
        if key in blocks:
            raise ConfigError(f"{source}: {key}: {short(value)} must be a block of keys. Remove it, or set its keys.")
        added = f" To add a new key, write +{key}=..."
        add = added if source == "the command line" else " Remove it; give keys of your own as +key=value words."
        raise ConfigError(f"{source}: unknown key {key}.{_nearest(key)}{add}")


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


@functools.cache
def _blocks() -> frozenset[str]:
    return frozenset(key[:i] for key in _known_keys() for i, letter in enumerate(key) if letter == ".")


def _is_part(key: str) -> bool:
    """Return True if a key belongs to a value that may be a block: initial weights, or trainer.max_time."""
    start, *name = key.split(".")
    if start in START_KEYS:
        return len(name) == 2 and name[1] in START_PARTS
    return key.rpartition(".")[0] == "trainer.max_time"


@functools.cache
def _known_keys() -> frozenset[str]:
    return frozenset(key for key, _ in _base_leaves()) | EXTRA_KEYS


@functools.cache
def _repeated_keys() -> frozenset[str]:
    """Return the keys whose value others repeat as `${a.b}`."""
    return frozenset(name for _, value in _base_leaves() for name in REFERENCE.findall(str(value)))


@functools.cache
def _base_leaves() -> tuple[tuple[str, Any], ...]:
    return tuple(leaves(raw_config(BASE)))


def leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf; an empty block counts as a leaf."""
    for key, value in content.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from leaves(value, path)
        else:
            yield path, value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
