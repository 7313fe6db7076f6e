"""A jail for audio: with $NEST_JAIL set, none is read outside of the folders that it names, whatever manifests say."""

from __future__ import annotations

import functools
import os

from nestcli.files import user_path

VARIABLE = "NEST_JAIL"
REASON = "outside_jail"


class Admitted(str):
    """The path of a copy in memory whose source (a shard, an object on a server) the jail has let pass.

    Only the reader makes one. A path that comes from a manifest is an ordinary string, and is looked at.
    """

    __slots__ = ()


def outside(path: str) -> str:
    """Why a file may not be read; empty if it may. Links are followed; addresses of servers are outside.

    Several folders are joined by `:`, as in $PATH.
    """
    folders = os.environ.get(VARIABLE)
    if not folders or isinstance(path, Admitted):
        return ""
    try:
        real = os.path.realpath(path)
    except ValueError:  # a zero byte, or half of a character
        return "no file can have that name"
    if "://" not in path and any(real.startswith(folder) for folder in _roots(folders)):
        return ""
    return f"it is outside of {folders}, where alone audio is read ({VARIABLE} or --jail)"


@functools.lru_cache(maxsize=4)
def _roots(folders: str) -> tuple[str, ...]:
    return tuple(os.path.join(os.path.realpath(user_path(each)), "") for each in folders.split(os.pathsep) if each)  # noqa: PTH118
