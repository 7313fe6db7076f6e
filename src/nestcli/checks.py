"""Checks of configurations: plain values, their sizes, types and ranges, and nothing that can call code."""

from __future__ import annotations

import math
import os
import re
import reprlib
import stat
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nestcli.errors import ConfigError
from nestcli.targets import TARGETS

MAX_YAML = 1 << 18  # bytes; NeMo's own configuration has 10,000 with comments, 4,000 in a .nemo
MOST_EVENTS = 40_000  # in a YAML file: about two per value
# Limits for configurations inside checkpoints, far above NeMo's own, which have 5 levels and 150 values.
_DEEPEST, _MOST_VALUES = 32, 20_000
CALLING = frozenset(("_instantiator", "_class_path", "class_path", "_recursive_", "_partial_", "_args_", "_convert_"))
_HUGE = 10**300  # larger integers do not fit into a float
_MOST_BITS = 4096  # maximum size of an integer
_MOST_LETTERS = 1 << 18  # letters in all values, once references are resolved
# Limits far above any real model, but low enough that checking a configuration takes little time and memory.
_LARGEST = {
    "model.encoder.n_layers": 512,
    "model.encoder.d_model": 1 << 16,
    "model.encoder.feat_out": 1 << 16,
    "model.encoder.ff_expansion_factor": 64,
    "model.encoder.conv_kernel_size": 1 << 12,
    "model.encoder.subsampling_factor": 64,
    "model.encoder.subsampling_conv_channels": 1 << 14,
    "model.encoder.pos_emb_max_len": 1 << 20,
    "model.quantizer.num_classes": 1 << 24,
    "model.quantizer.num_books": 1 << 12,
    "model.quantizer.code_dim": 1 << 14,
    "model.masking.block_size": 1 << 16,
    "model.preprocessor.features": 1 << 10,
    "model.preprocessor.n_fft": 1 << 14,
    "model.preprocessor.pad_to": 1 << 16,
    "model.preprocessor.sample_rate": 1 << 20,
}
REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\}", re.ASCII)
# The C parser is ten times as fast, but not every build of PyYAML has it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Return the digits of a number; Python refuses to print more than 4,300."""
        return repr(x) if abs(x) < 1 << 64 else "a number of many digits"


_SHORT = _Short()
_SHORT.maxlevel = _SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def short(value: Any, longest: int = 60) -> str:
    """Return a value as short text for a message, quickly even if a pickle made it refer to itself many times."""
    return _SHORT.repr(value)[:longest]


def odd_in_yaml(text: str) -> str | None:
    """Name what a configuration's YAML must not have (anchor, alias, tag, too many or too deep keys), or return None.

    No objects are built from the text. Raises yaml.YAMLError.
    """
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_LOADER)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if odd := getattr(event, "anchor", None) or getattr(event, "tag", None):
            return f"an anchor, alias or tag, {str(odd)[:60]!r}"
        if depth > _DEEPEST or number > MOST_EVENTS:
            return "too many keys, or keys nested too deeply"
    return None


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values; references stay unresolved. Raises ConfigError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # does not hang on a FIFO
        with open(descriptor, "rb") as file:  # noqa: PTH123  # a descriptor
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is a folder, a pipe or a device. Give the path of a file.")
            content = file.read(MAX_YAML + 1)
        if len(content) > MAX_YAML:
            raise ConfigError(f"{path} has more than {MAX_YAML:,} bytes, which is too long for a configuration.")
        text = content.decode("utf-8")
        if odd := odd_in_yaml(text):
            raise ConfigError(f"{path} has {odd}. Refused: write plain values, and ${{a.b}} to repeat another key's.")
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except AssertionError:  # OmegaConf raises it for a single number
        raise ConfigError(f"{path}: a configuration must be a mapping of keys, not a single value.") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {' '.join(str(error).split())}") from None


def check_plain(content: Any, source: str) -> None:
    """Refuse what a configuration inside a checkpoint must not hold: references, objects, endless nesting, classes.

    Every key and list is checked; a value counts as often as it is referred to. Raises ConfigError.
    """
    waiting, seen = [("", content)], 0
    while waiting:
        path, value = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES or path.count(".") > _DEEPEST:
            raise ConfigError(f"{source}: its configuration is too large or nested too deeply. Refused.")
        if isinstance(value, Mapping):
            _check_keys(value, path, source)
            waiting += [(f"{path}.{key}" if path else key, inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{path}.{number}", inner) for number, inner in enumerate(value)]
        elif isinstance(value, str) and "${" in value:
            raise ConfigError(
                f"{source}: its configuration calls a resolver at {path}, or refers to another key: "
                f"{value[:60]!r}. Refused."
            )
        elif value is not None and not isinstance(value, str | int | float):
            raise ConfigError(f"{source}: its configuration holds a {type(value).__name__} at {path}. Refused.")


def _check_keys(block: Mapping[Any, Any], path: str, source: str) -> None:
    for key, value in block.items():
        if isinstance(key, str) and "${" in key:
            raise ConfigError(f"{source}: its configuration calls a resolver in the key {key[:60]!r}. Refused.")
        if not isinstance(key, str):
            raise ConfigError(
                f"{source}: its configuration has the key {short(key)} in {path!r}, which is not a string. Refused."
            )
        if key in CALLING or (key == "_target_" and (not isinstance(value, str) or value not in TARGETS)):
            what = f"{path}.{key}: {short(value, 100)}".lstrip(".")
            raise ConfigError(f"{source}: its configuration names code to call, at {what}. Refused.")


def check_sizes(config: Mapping[str, Any], source: str) -> None:
    """Refuse the first size that is larger than any model needs, whoever wrote it. Raises ConfigError."""
    for key, largest in _LARGEST.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int) and abs(value) > largest:
            shown = f"{value:,}" if abs(value) < 1 << 64 else "a number of many digits"
            raise ConfigError(f"{source}: {key} is {shown}, more than the {largest:,} that is allowed. Refused.")


def check_digits(content: Any, source: str) -> None:
    """Refuse integers of more than 4,096 bits: Python prints no more than 4,300 digits. Raises ConfigError."""
    waiting = [("", content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value]
        elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ConfigError(f"{source}: {path[1:201]} is a number of many digits. Refused.")


def check_references(content: Mapping[str, Any], source: str) -> None:
    """Refuse every reference except `${a.b}` to a key with a single value, alone or within text. Raises ConfigError.

    `${oc.env:HOME}` would read things that do not concern the file. References to blocks or to other references can
    grow without limit, or form circles. OmegaConf reports keys that do not exist: an override may still add them.
    """
    check_digits(content, source)
    if _letters(content, source) > _MOST_LETTERS:
        raise ConfigError(f"{source}: its references (${{...}}) grow beyond {_MOST_LETTERS:,} letters. Refused.")


def _letters(content: Mapping[str, Any], source: str) -> int:
    """Return an upper bound for the letters of all values once their references are resolved."""
    letters = 0
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}.{number}", inner) for number, inner in enumerate(value)]
        else:
            text = str(value)
            targets = [_value_at(content, name) for name in REFERENCE.findall(text)]
            odd = any(isinstance(target, Mapping | list) or "${" in str(target) for target in targets)
            if odd or "${" in REFERENCE.sub("", text):
                raise ConfigError(
                    f"{source}: {path[1:201]}: {text[:60]!r} calls a resolver, or refers to more than a single value. "
                    "Refused: ${a.b} may name a key that holds one value, not a block or another reference. Write the "
                    "value, or give it on the command line, where resolvers such as ${oc.env:NAME} work."
                )
            letters += len(text) + sum(len(str(target)) for target in targets)
    return letters


def _value_at(content: Any, name: str) -> Any:
    """Return the value at a dotted name, or None if the name leads nowhere."""
    for part in name.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


# ---- ranges ----


def within(block: Any, low: float, high: float, *keys: str, above: bool = False, below: bool = False) -> None:
    """Check that attributes of a settings block lie between two numbers. None passes; every element of a tuple counts.

    `above` excludes `low` itself, `below` excludes `high`. Raises ValueError; its message begins with the key.
    """
    for key in keys:
        value = getattr(block, key)
        elements = value if isinstance(value, tuple) else (value,)
        if not elements:
            raise ValueError(f"{key}: the list is empty. Give at least one number, or null.")
        for each in elements:
            if each is not None and not is_within(each, low, high, above=above, below=below):
                raise ValueError(f"{key}: {short(each)} must be {range_of(low, high, above, below)}.")


def one_of(block: Any, key: str, *choices: Any) -> None:
    """Check that an attribute of a block is one of the choices. Raises ValueError that begins with the key."""
    value, names = getattr(block, key), " or ".join(map(as_written, choices))
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        advice = f"only {names} is" if len(choices) == 1 else f"use {names}"
        raise ValueError(f"{key}: {short(value)} is not supported, {advice}.")


def is_within(value: Any, low: float, high: float, *, above: bool = False, below: bool = False) -> bool:
    """Return True if a value is a finite number between two others; True and False do not count as numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and not (above and value == low) and not (below and value == high)


def range_of(low: float, high: float, above: bool = False, below: bool = False) -> str:
    """Return a range in words, such as `from 0 to 1`."""
    if above or below:
        return f"{'above' if above else 'at least'} {_plain(low)} and {'below' if below else 'at most'} {_plain(high)}"
    return f"from {_plain(low)} to {_plain(high)}"


def as_written(value: Any, longest: int = 60) -> str:
    """Return a value as YAML writes it, for a message: null, true, a string without quotes."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _plain(number: float) -> str:
    if isinstance(number, int) or (math.isfinite(number) and number == int(number) and abs(number) < 1e15):
        return f"{int(number):,}"
    return f"{number:g}"


# ---- types ----


def coerced(value: Any, hint: Any, where: str) -> Any:
    """Convert a value to a type hint: lists to tuples, integers to floats. Raises ConfigError if it does not fit."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = tuple(value)
    if isinstance(value, tuple) and (elements := _element_hint(hint)) is not None:
        return tuple(coerced(element, elements, where) for element in value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    options = arguments if origin in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        plain = typing.get_origin(option) or option
        if plain is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < _HUGE:
            return float(value)
        if plain is Any or (isinstance(value, plain) and not (plain is int and isinstance(value, bool))):
            return value
    names = " or ".join(_name(option) for option in options)
    hint = (
        f" Write {int(value)}."
        if isinstance(value, float) and int in options and value.is_integer() and abs(value) < 1e15
        else ""
    )
    raise ConfigError(
        f"{where}: {short(list(value) if isinstance(value, tuple) else value)} is not of type {names}.{hint}"
    )


def _name(option: Any) -> str:
    """Return the name of a type in the words of YAML."""
    if option is types.NoneType:
        return "null"
    return "list" if typing.get_origin(option) is tuple else getattr(option, "__name__", "?")


def _element_hint(hint: Any) -> Any:
    """Return the element type if a type is, or may be, a tuple of any length; else None."""
    for option in typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,):
        if typing.get_origin(option) is tuple:
            return typing.get_args(option)[0]
    return None
