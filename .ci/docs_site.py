"""MkDocs' hooks: the pages beside docs/ become pages of the site, and anchors are those of code hosts.

README.md and its neighbours stay where code hosts look for them. Here they get a copy each in the site, and links from
one side to the other are turned, so that the same text works in both places.
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "THIRD_PARTY.md")
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """Headings' anchors as code hosts make them: MkDocs' own differ where two signs meet, and drop Chinese."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    return config


def slug(heading: str, separator: str = "-") -> str:
    """Letters, digits, marks, `-` and `_` in lower case, a separator for each space."""
    kept = (letter for letter in heading.strip().lower() if letter in " -_" or unicodedata.category(letter)[0] in "LNM")
    return "".join(kept).replace(" ", separator)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the neighbours of docs/ that are there."""
    from mkdocs.structure.files import File  # here, so that tests read this file without MkDocs

    for name in OUTSIDE:
        if (ROOT / name).is_file():
            content = (ROOT / name).read_text(encoding="utf-8")
            if name.endswith(".md"):
                content = _turned(content, name, in_site(name))
            files.append(File.generated(config, in_site(name), content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn the links of a page of docs/."""
    source = page.file.src_uri
    if page.file.generated_by:
        return markdown
    return _turned(markdown, f"docs/{source}", source)


def in_site(name: str) -> str:
    """Where a neighbour of docs/ stands in the site; README.md itself would be taken for the first page."""
    return f"project/{'overview.md' if name == 'README.md' else name}"


def _turned(markdown: str, source: str, place: str) -> str:
    """The text with its links, relative to the file `source` of the project, relative to `place` in the site."""

    def turn(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("/"):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in OUTSIDE:
            path = in_site(path)
        elif path.startswith("docs/"):
            path = path.removeprefix("docs/")
            path += "/README.md" if (ROOT / "docs" / path).is_dir() else ""
        return f"{before}{posixpath.relpath(path, posixpath.dirname(place) or '.')}{after}"

    return _LINK.sub(turn, markdown)
