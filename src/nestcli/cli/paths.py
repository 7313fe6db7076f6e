"""Expand paths in a command line the same way in every option and argument."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from nestcli.files import user_path

PATHS = frozenset(["DIR", "FILE", "PATH", "MANIFEST", "CHECKPOINT", "INPUT", "INPUT..."])  # metavars


class PathsCommand(TyperCommand):
    """A command whose paths may begin with `~` or `file://`: a shell does not expand `--out=~/x`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            metavar = getattr(param, "metavar", None) or ""
            if metavar in PATHS:
                ctx.params[param.name] = _expanded(value)
            elif metavar.startswith("[CONFIG") and value:
                first, *others = value  # a `key=value` does not begin with `~`, so it stays unchanged
                ctx.params[param.name] = type(value)([user_path(first), *others])
        return rest


def _expanded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_expanded(each) for each in value)
    return user_path(value) if isinstance(value, str) else value
