"""Checks of the types and bounds of configuration values."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Sequence
from typing import Any

from nestcli.errors import ConfigError
from nestcli.untrusted import short

_HUGE = 10**300  # larger integers do not fit into a float


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
