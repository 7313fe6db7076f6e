"""NeMo's own Lightning checkpoints, whose configuration is pickled as omegaconf objects.

These objects are never created. An inert stand-in, which only stores what it is given, replaces every class that such
a pickle names, and the plain values are taken from the stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestcli.checks import CALLING, check_plain
from nestcli.errors import CheckpointError

_DEEPEST, _MOST_VALUES = 32, 20_000


class Inert:
    """Stand-in for a class that a pickle names; it stores its state and does nothing."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


_NAMES = (
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode", "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode", "omegaconf.base.Metadata", "omegaconf.base.ContainerMetadata", "typing.Any",
    "collections.defaultdict", "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str",
    "builtins.bool", "pathlib.PosixPath",
)  # fmt: skip
# For `torch.serialization.safe_globals`: the stand-in for each name.
STAND_INS = [(Inert, name) for name in _NAMES]
# The same names as a pickle of protocol 2 writes them.
PICKLED = frozenset(
    f"{module} {name}"
    for full in (*_NAMES, "builtins.long", "builtins.unicode")
    for module, name in ((full.rpartition(".")[0].replace("builtins", "__builtin__"), full.rpartition(".")[2]),)
)


def hyper_parameters(content: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Return the configuration of a NeMo model in the content of a .ckpt file as plain values, or None without one.

    Raises CheckpointError and ConfigError for content that a configuration cannot have.
    """
    plain = _Reader(source).plain(content.get("hyper_parameters"))
    if isinstance(plain, dict) and (calling := sorted(CALLING & plain.keys())):
        raise CheckpointError(f"{source}: its hyper_parameters name code to call, at {calling[0]}. Refused.")
    plain = plain.get("cfg", plain) if isinstance(plain, dict) else None
    if not isinstance(plain, dict) or "encoder" not in plain:
        return None
    check_plain(plain, source)
    return plain


class _Reader:
    """Extracts plain values from stand-ins, within limits: a malicious file may make them refer to each other."""

    def __init__(self, source: str) -> None:
        self.source, self.seen = source, 0

    def plain(self, value: Any, depth: int = 0) -> Any:
        self.seen += 1
        if self.seen > _MOST_VALUES or depth > _DEEPEST:
            raise CheckpointError(f"{self.source}: its configuration is too large or nested too deeply. Refused.")
        if isinstance(value, Inert):
            state = getattr(value, "state", None)
            inside = state if isinstance(state, Mapping) else {}
            return self.plain(inside.get("_content", inside.get("_val")), depth + 1)
        if isinstance(value, Mapping):
            return {key: self.plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(inner, depth + 1) for inner in value]
        return value
