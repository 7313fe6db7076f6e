"""Reads the pages: their blocks of code with the marks before them, links, images and anchors.

Marks are HTML comments on the line before a block (CONTRIBUTING.md says how to use them):
`<!-- not run: needs a GPU -->`, one of NOT_RUN, and `<!-- test: slow -->`, some of TESTS, joined by commas.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
NOT_RUN = (
    "needs a GPU", "needs a cluster", "needs NeMo", "needs Ray", "needs the network", "installs", "takes hours",
    "does not end by itself",
)  # fmt: skip
TESTS = re.compile(r"slow|ends with [12]")
LANGUAGES = ("sh", "bash", "python", "yaml", "json", "text")
# History, with the commands of their day: their blocks are neither run nor looked at.
EXEMPT = ("docs/log.md", "docs/decisions")
_MARK = re.compile(r"<!--\s*(not run|test):\s*(.*?)\s*-->")


@dataclass(frozen=True)
class Block:
    """A block of code; `language` is empty where it has none, or is an indented one."""

    page: str
    line: int  # of its first line of code, from 1
    language: str
    text: str
    not_run: str | None = None
    tests: tuple[str, ...] = ()
    indented: bool = False

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Page:
    name: str  # relative to the project
    blocks: list[Block] = field(default_factory=list)
    inline: list[tuple[int, str]] = field(default_factory=list)  # code within text
    links: list[tuple[int, str]] = field(default_factory=list)  # of images too
    anchors: list[str] = field(default_factory=list)

    @property
    def exempt(self) -> bool:
        return self.name.startswith(EXEMPT)


def page_names() -> list[str]:
    """All pages, in this project's folder."""
    outside = [
        path
        for path in ROOT.glob("*.md")
        if path.name.startswith(("README", "CONTRIBUTING", "CHANGELOG", "THIRD_PARTY"))
    ]
    return [path.relative_to(ROOT).as_posix() for path in sorted(outside) + sorted((ROOT / "docs").rglob("*.md"))]


@cache
def page(name: str) -> Page:
    return read_page(name, (ROOT / name).read_text(encoding="utf-8"))


def read_page(name: str, text: str) -> Page:
    found = Page(name)
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        line = (token.map or [0])[0] + 1
        if token.type in ("fence", "code_block"):
            found.blocks.append(_block(name, token, line, before))
        elif token.type == "inline":
            _read_text(token, line, found)
    found.anchors = list(_anchors(tokens))
    return found


def _block(page: str, token: Token, line: int, before: Token | None) -> Block:
    marks = dict(_MARK.findall(before.content)) if before is not None and before.type == "html_block" else {}
    tests = tuple(filter(None, marks.get("test", "").split(", ")))
    fenced = token.type == "fence"
    return Block(page, line + fenced, token.info.strip(), token.content, marks.get("not run"), tests, not fenced)


def _read_text(token: Token, line: int, found: Page) -> None:
    for child in token.children or []:
        if child.type == "link_open":
            found.links.append((line, str(child.attrs["href"])))
        elif child.type == "image":
            found.links.append((line, str(child.attrs["src"])))
        elif child.type == "code_inline":
            found.inline.append((line, child.content))
        elif child.type in ("softbreak", "hardbreak"):
            line += 1


def _anchors(tokens: list[Token]) -> Iterator[str]:
    """Yield the anchors of the headings as code hosts make them; of two equal ones, only the first can be linked to."""
    for before, token in pairwise(tokens):
        if before.type == "heading_open":
            yield slug("".join(child.content for child in token.children or []))


def slug(heading: str) -> str:
    """A heading's anchor: letters, digits, marks, `-` and `_` in lower case, a `-` for each space."""
    kept = (letter for letter in heading.strip().lower() if letter in " -_" or _is_word(letter))
    return "".join(kept).replace(" ", "-")


def _is_word(letter: str) -> bool:
    return unicodedata.category(letter)[0] in "LNM"
