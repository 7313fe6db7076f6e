"""Reads commands as a shell does, as far as pages need it; nothing is given to a shell.

Known are `\\` at a line's end, quotes, `#`, `&&`, `;`, `|`, `>`, `2>`, VAR=value before a command, and `*` and `?`
outside quotes. Everything else that means something to a shell is an error.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<space>[ \t]+)|(?P<end>\n)|(?P<comment>\#[^\n]*)|(?P<sign>&&|\|\||2>|>|[|;<&])
    |(?P<word>(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\|&;<>])+)""",
    re.VERBOSE,
)
_VARIABLE = re.compile(r"[A-Za-z_]\w*=")


class ShellError(Exception):
    """A construct that this parser does not support."""


@dataclass
class Command:
    line: int  # within the block, from 0
    words: list[str] = field(default_factory=list)
    globs: set[int] = field(default_factory=set)  # places of words to be expanded
    variables: dict[str, str] = field(default_factory=dict)
    out: str | None = None
    errors: str | None = None
    piped: bool = False  # its output is the next command's input


def read_commands(text: str) -> list[Command]:
    """The commands of a block in their order. Raises ShellError."""
    found: list[Command] = []
    now, into = Command(0), None
    for kind, token, line in _tokens(text):
        if kind == "word" and into:
            setattr(now, into, _word(token))
            into = None
        elif kind == "word":
            now.line = now.line if now.words or now.variables else line
            _add(now, token)
        elif token in (">", "2>"):
            into = "out" if token == ">" else "errors"
        elif token in ("<", "&", "||"):
            raise ShellError(f"line {line + 1}: {token} is not known to the tests")
        else:
            now.piped = token == "|"
            found.append(now)
            now = Command(line)
    return [command for command in [*found, now] if command.words or command.variables]


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    place, line = 0, 0
    text = text.replace("\\\n", "\0")
    while place < len(text):
        if text[place] == "\0":
            place, line = place + 1, line + 1
            continue
        match = _TOKEN.match(text.replace("\0", " "), place)
        if match is None:
            raise ShellError(f"line {line + 1}: cannot read {text[place : place + 20]!r}")
        kind = str(match.lastgroup)
        if kind not in ("space", "comment"):
            yield kind, match.group(), line
        line += text[place : match.end()].count("\n") + text[place : match.end()].count("\0")
        place = match.end()


def _add(command: Command, token: str) -> None:
    bare = re.sub(r"'[^']*'|\"[^\"]*\"|\\.", "", token)
    if "$" in re.sub(r"'[^']*'|\\.", "", token) or "`" in bare or bare.startswith("~"):
        raise ShellError(f"{token}: variables, ~ and nested commands are not known to the tests")
    if not command.words and _VARIABLE.match(token):
        name, _, value = token.partition("=")
        command.variables[name] = _word(value)
        return
    if re.search(r"[*?]", bare):
        command.globs.add(len(command.words))
    command.words.append(_word(token))


def _word(token: str) -> str:
    return "".join(shlex.split(token)) if token else ""
