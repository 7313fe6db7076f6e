"""NeMo's own Lightning checkpoints: their configuration is pickled as objects of omegaconf.

Those objects are not made. Every class that such a pickle names is answered by one that keeps what it is given and does
nothing, and the plain values are taken out of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestcli.errors import CheckpointError
from nestcli.untrusted import CALLING, check_plain

_DEEPEST, _MOST_VALUES = 32, 20_000


class Inert:
    """Stands in for a class of a pickle."""

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
# For `torch.serialization.safe_globals`: what to take in place of each name.
STAND_INS = [(Inert, name) for name in _NAMES]
# The same names as they stand in a pickle of protocol 2.
PICKLED = frozenset(
    f"{module} {name}"
    for full in (*_NAMES, "builtins.long", "builtins.unicode")
    for module, name in ((full.rpartition(".")[0].replace("builtins", "__builtin__"), full.rpartition(".")[2]),)
)


def hyper_parameters(content: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """The configuration of a model of NeMo's in the content of a .ckpt file as plain values, None if there is none.

    Raises CheckpointError and ConfigError for what no configuration holds.
    """
    plain = _Reader(source).plain(content.get("hyper_parameters"))
    if isinstance(plain, dict) and (calling := sorted(CALLING & plain.keys())):
        raise CheckpointError(f"{source}: its hyper_parameters name what is to be called, at {calling[0]}. Refused.")
    plain = plain.get("cfg", plain) if isinstance(plain, dict) else None
    if not isinstance(plain, dict) or "encoder" not in plain:
        return None
    check_plain(plain, source)
    return plain


class _Reader:
    """Takes plain values out of stand-ins; a file may have made them refer to each other in circles."""

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
