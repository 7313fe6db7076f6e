"""Checks of a page's blocks that need not run them; they apply to blocks that are never run too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import typer
import yaml

from docs.pages import LANGUAGES, NOT_RUN, ROOT, TESTS, Block, Page
from docs.shell import Command, ShellError, read_commands
from nestcli.cli.app import app
from nestcli.config import PRESETS, load_config
from nestcli.errors import NestError

# What a line begins with that somebody may type.
_PROGRAMS = re.compile(
    r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(nest|make|pip3?|python[\d.]*|torchrun|srun|sbatch|git|sox|apt-get) \S"
)
_SYNOPSIS = re.compile(r"\.\.\.|\[[^]]+\]|\b[A-Z]{2,}\b")  # optional words, or words that stand for others
_CONFIGURED = ("pretrain", "bench", "compare", "count-params")
MENDING = "CONTRIBUTING.md says how blocks are marked"


def faults(page: Page, text: str) -> list[str]:
    """Return the faults of a page's blocks and of the commands in its text."""
    found = [f"{block.where}: {fault}" for block in page.blocks for fault in _block(block)]
    used = sum(bool(block.not_run) + bool(block.tests) for block in page.blocks)
    if len(re.findall(r"^\s*<!-- (?:not run|test):", text, re.MULTILINE)) != used:
        found.append(f"{page.name}: a mark does not stand on the line before a block; {MENDING}")
    for line, code in page.inline:
        found += [f"{page.name}:{line}: `{code}`: {fault}" for fault in _mentioned(code)]
    return found


def _block(block: Block) -> Iterator[str]:
    if block.not_run is not None and block.not_run not in NOT_RUN:
        yield f"not run: {block.not_run!r} is not one of {', '.join(NOT_RUN)}"
    yield from (f"test: {word!r} is unknown; {MENDING}" for word in block.tests if not TESTS.fullmatch(word))
    typed = [line for line in block.text.splitlines() if _PROGRAMS.match(line)]
    if block.indented:
        if typed:
            yield f"an indented block with a command, {typed[0].strip()!r}: put it between ```sh and ```"
    elif block.language not in LANGUAGES:
        yield f"the language {block.language!r} of a block is not one of {', '.join(LANGUAGES)}"
    elif block.language == "text":
        yield from (f"{line!r} is a command: make it a ```sh block" for line in typed if not _SYNOPSIS.search(line))
        yield from (fault for line in typed for fault in _mentioned(line.strip()))
    elif block.language in ("yaml", "json"):
        yield from _data(block)
    elif block.language in ("sh", "bash"):
        yield from _script(block)


def _data(block: Block) -> Iterator[str]:
    try:
        if block.language == "yaml":
            yaml.safe_load(block.text)
        else:
            json.loads(block.text)
    except (yaml.YAMLError, ValueError) as error:
        yield f"no {block.language}: {error}"


def _script(block: Block) -> Iterator[str]:
    try:
        commands = read_commands(block.text)
    except ShellError as error:
        if block.not_run is None or block.language == "sh":
            yield str(error)
        return
    for command in commands:
        yield from (f"line {command.line + 1}: {fault}" for fault in _command(command))


def _command(command: Command) -> Iterator[str]:
    words = command.words
    if words[:1] == ["make"]:
        targets = (word for word in words[1:] if "=" not in word)  # the others set variables
        yield from (f"make {word}: the Makefile has no such target" for word in targets if word not in _targets())
    if "install" in words:
        yield from (f"pyproject.toml has no extra {extra!r}" for extra in _extras(words) if extra not in _all_extras())
    if (own := _of_nest(words)) is not None:
        yield from _call(own)


def _of_nest(words: list[str]) -> list[str] | None:
    """The words behind `nest`, whatever starts it."""
    for place, word in enumerate(words):
        if word == "nest" or word.endswith("/nest") or words[place - 1 : place + 1] == ["-m", "nestcli"]:
            return words[place + 1 :]
    return None


def _call(words: list[str]) -> Iterator[str]:
    """Yield what `nest` would refuse in these words; the files in them need not exist."""
    command = _group().commands.get(words[0]) if words else None
    if command is None:
        if not words or not words[0].startswith("-"):
            yield f"nest {' '.join(words[:1])}: unknown command"
        return
    given = [word for word in words[1:] if word not in ("--debug", "--help")]
    if "--help" in words:
        return
    try:
        context = command.make_context(words[0], given)
    except Exception as error:
        yield f"nest {words[0]}: {getattr(error, 'message', error)}"
        return
    if words[0] in _CONFIGURED:
        yield from _configuration(context.params.get("words") or [])


def _configuration(words: list[str]) -> Iterator[str]:
    name = words[0] if words and "=" not in words[0] else PRESETS[0]
    try:
        load_config(name if name in PRESETS else PRESETS[0], [word for word in words if "=" in word])
    except NestError as error:
        yield str(error)


def _mentioned(code: str) -> Iterator[str]:
    """Yield the faults of a command in the text, which may contain placeholders: its name and options."""
    words = code.split()
    if words[:1] != ["nest"] or len(words) < 2 or not re.fullmatch(r"[a-z-]+", words[1]):
        return
    command = _group().commands.get(words[1])
    if command is None and not words[1].startswith("-"):
        yield f"there is no command {words[1]}"
        return
    known = {name for param in (command or _group()).params for name in param.opts} | {"--help", "--debug"}
    yield from (f"no option {name}" for name in re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", code) if name not in known)


@cache
def _group() -> Any:
    return typer.main.get_command(app)


@cache
def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def _all_extras() -> set[str]:
    block = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", block, re.MULTILINE))


def _extras(words: list[str]) -> Iterator[str]:
    for word in words:
        if match := re.match(r"(?:\.|nestcli|\S+\.whl)\[([\w,]+)\]", word):
            yield from match.group(1).split(",")
