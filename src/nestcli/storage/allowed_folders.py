"""Jail for audio: if $NEST_JAIL is set, no audio outside its folders is read, whatever manifests say."""

from __future__ import annotations

import functools
import os

from nestcli.files import user_path

VARIABLE = "NEST_JAIL"
REASON = "outside_jail"


class Admitted(str):
    """Path of an in-memory copy whose source (a shard, an object on a server) has passed the jail.

    Only the reader creates one. A path from a manifest is an ordinary string, and is checked.
    """

    __slots__ = ()


def outside(path: str) -> str:
    """Return the reason why a file may not be read, or an empty text if it may.

    Links are followed. Addresses of servers count as outside. $NEST_JAIL separates folders by `:`, as $PATH does.
    """
    folders = os.environ.get(VARIABLE)
    if not folders or isinstance(path, Admitted):
        return ""
    try:
        real = os.path.realpath(path)
    except ValueError:  # a zero byte, or a lone surrogate
        return "no file can have that name"
    if "://" not in path and any(real.startswith(folder) for folder in _roots(folders)):
        return ""
    return f"it is outside of {folders}, and audio is read only there ({VARIABLE} or --jail)"


@functools.lru_cache(maxsize=4)
def _roots(folders: str) -> tuple[str, ...]:
    return tuple(os.path.join(os.path.realpath(user_path(each)), "") for each in folders.split(os.pathsep) if each)  # noqa: PTH118
