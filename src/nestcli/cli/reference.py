"""`python -m nestcli.cli.reference`: print docs/cli.md, generated from the commands.

The page depends on the code only, not on the terminal's width or on environment variables.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import typer

_SPECIAL = re.compile(r"[\\\[\]*<>|]|(?<!\w)_|_(?!\w)")
_FOREWORD = """\
# Commands

Generated from the code by `make docs-cli`; a test checks that it is up to date. `nest COMMAND --help` shows the same.

Exit codes: 0 done; 1 the command ran and the answer is no; 2 the call or its input is wrong; `nest pretrain` exits with
130 after Ctrl-C and 143 when it was [asked to stop](clusters.md#signals-that-stop-a-run).
`--debug`, anywhere in a call, shows the traceback of an error.
"""


def reference() -> str:
    """Return the page as Markdown: one section per command with its usage, arguments and options."""
    from nestcli.cli.app import app

    group: Any = typer.main.get_command(app)
    sections = [_FOREWORD, _section("nest", "nest [OPTIONS] COMMAND [ARGS]...", group)]
    sections += [_section(f"nest {name}", _usage(name, command), command) for name, command in group.commands.items()]
    return "\n".join(sections)


def undescribed() -> list[str]:
    """List commands, arguments and options without a help text."""
    from nestcli.cli.app import app

    group: Any = typer.main.get_command(app)
    found = [name for name, command in group.commands.items() if not command.help]
    for name, command in {"": group, **group.commands}.items():
        found += [f"{name} {_called(param)}".strip() for param in command.params if not param.help]
    return found


def _usage(name: str, command: Any) -> str:
    arguments = [param.metavar or param.name.upper() for param in _arguments(command)]
    required = [_called(param) for param in _options(command) if param.required]
    return " ".join(["nest", name, *arguments, *required, "[OPTIONS]"])


def _section(title: str, usage: str, command: Any) -> str:
    lines = [f"## {title}", "", _plain(command.help or "").strip(), "", "```text", usage, "```", ""]
    if arguments := _arguments(command):
        lines += ["| argument | |", "| --- | --- |"]
        lines += [f"| `{param.metavar}` | {_meaning(param)} |" for param in arguments]
        lines.append("")
    lines += ["| option | | default |", "| --- | --- | --- |"]
    lines += [f"| `{_called(param)}` | {_meaning(param)} | {_default(param)} |" for param in _options(command)]
    return "\n".join(lines) + "\n"


def _arguments(command: Any) -> list[Any]:
    return [param for param in command.params if param.param_type_name == "argument"]


def _options(command: Any) -> list[Any]:
    """List the options of a command, required ones first."""
    options = [param for param in command.params if param.param_type_name == "option"]
    return sorted(options, key=lambda param: not param.required)


def _called(param: Any) -> str:
    """Return the longest name of an option with the placeholder of its value."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name)
    name = max(param.opts, key=len)
    if param.is_flag:
        return str(name)
    number = type(param.type).__name__.startswith(("Int", "Float"))
    return f"{name} {param.metavar or ('N' if number else name.lstrip('-').upper())}"


def _meaning(param: Any) -> str:
    said = [_plain(param.help or "")]
    if choices := getattr(param.type, "choices", None):
        said.append(f"One of {', '.join(f'`{choice}`' for choice in choices)}.")
    if getattr(param, "multiple", False) and "repeated" not in said[0]:
        said.append("May be repeated.")
    if bounds := _bounds(param.type):
        said.append(bounds)
    if short := [name for name in param.opts if len(name) == 2]:
        said.append(f"Also `{short[0]}`.")
    if param.envvar and param.envvar not in said[0]:
        said.append(f"Also `${param.envvar}`.")
    return " ".join(said)


def _bounds(kind: Any) -> str:
    least, most = getattr(kind, "min", None), getattr(kind, "max", None)
    if least is None and most is None:
        return ""
    return f"At least {least:g}." if most is None else f"From {least:g} to {most:.15g}."


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if param.is_flag or param.default is None or param.default in ((), []):
        return ""
    return f"`{param.default}`"


def _plain(text: str) -> str:
    """Escape Markdown's special characters, except between backticks."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(piece if piece[:1] == "`" else _SPECIAL.sub(r"\\\g<0>", piece) for piece in pieces)


def main() -> None:
    """Write the page to stdout."""
    sys.stdout.write(reference())


if __name__ == "__main__":
    main()
