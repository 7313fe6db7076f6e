"""The channel of a file with several that an utterance is: NeMo's `channel_selector`, in a manifest or a data set."""

from __future__ import annotations

from typing import Any, Literal

Channel = int | Literal["average"]
KEY = "channel_selector"
MOST = 1 << 16  # no file has a channel of a higher number


def parsed_channel(value: Any) -> Channel | None:
    """The channel that a `channel_selector` means: a number from 0, "average", or None where it is null.

    A list of one number is that number, as in NeMo. Raises ValueError for anything else.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if value is None:
        return None
    if value == "average":
        return "average"
    if type(value) is int and 0 <= value < MOST:
        return value
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "..."
    several = "; several channels are not one signal" if isinstance(value, list | tuple) else ""
    raise ValueError(f'"{KEY}" is {shown}; it must be the number of one channel, from 0, or "average"{several}')


def kept_channel(own: Channel | None, default: Channel | None) -> int | None:
    """The number of the channel to keep, None for the average of all: an utterance's own choice comes first."""
    channel = default if own is None else own
    return None if channel == "average" else channel
