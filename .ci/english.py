"""Check the English of docstrings, comments, messages and docs for fragments and phrases that readers stumble over.

`python .ci/english.py [ROOT]` reads every module below src/nestcli and tests, README.md, CONTRIBUTING.md and
docs/*.md. It prints FILE:LINE, the phrase and a better form for each finding, and exits with 1 if there is one.
Code between backticks, fenced blocks and old entries of docs/log.md are not checked.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# (file, phrase as reported): why it may stay.
ALLOWED = {
    ("src/nestcli/demo/corpus.py", "shall"): "a sentence that the demo's voices speak",
}
EXAMPLES = "tests/docs/test_english.py"  # holds bad English for this script to find
LOG_SINCE = "2026-11-28"  # older entries of docs/log.md are history and stay as they are

# First words of a docstring that make it a fragment or a question, and the better form.
FIRST_WORDS = {
    "what": "name the thing, or say what the function does: 'Return ...', 'Facts about ...'",
    "which": "'Return the ... that ...'",
    "whether": "'Return True if ...'",
    "where": "'Return the place ...', 'Location of ...'",
    "how": "'Return the number of ...', 'Way to ...'",
    "of": "name the thing: 'Share of ...', 'Memory of ...'",
    "that": "name the thing",
    "those": "name the things",
    "who": "name the thing, or 'Return ...'",
    "whose": "name the thing",
    "when": "'Raise ... when ...', 'Return ... when ...'",
    "if": "'Return ... if ...'",
    "why": "'Return the reason ...'",
    "as": "name the thing, then 'as ...'",
    "in": "name the thing, then 'in ...'",
    "per": "name the quantity, then 'per ...'",
    "does": "'Check that ...', 'Return True if ...'",
    "is": "'Check that ...', 'Return True if ...'",
    "are": "'Check that ...', 'Return True if ...'",
    "can": "'Check that ...', 'Return True if ...'",
    "has": "'Check that ...', 'Return True if ...'",
    "and": "start a sentence of its own",
    "or": "start a sentence of its own",
    "but": "start a sentence of its own",
    "also": "start a sentence of its own",
}


class Phrase(NamedTuple):
    """A pattern that is never good English here, and the better form."""

    pattern: str  # a space stands for any white space, so that a phrase may span lines
    better: str


PHRASES = [
    Phrase(r"(?<!there\s)\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|fewer\b|different\b|better\b|worse\b)",
           "'is not a ...', 'must be a ...', 'has no ...'"),
    Phrase(r"\bthere (?:is|are|was|were) no such\b", "'does not exist', 'no such ...'"),
    Phrase(r"\b(?:that|which|where|as) there (?:is|are) (?:not|none)\b", "'that does not exist', 'without ...'"),
    Phrase(r"\b(?:go|goes|went|gone) on\b", "'continue'; for a place: 'run on'"),
    Phrase(r"\bshall\b", "'must', 'should' or 'will'"),
    Phrase(r"\bput right\b", "'fixed', 'corrected'"),
    Phrase(r"\banew\b", "'again', 'from scratch', 'recomputed'"),
    Phrase(r"\b(?:is|are) to be\b", "'must be', 'should be', 'will be'"),
    Phrase(r"\bto be had\b", "'available'"),
    Phrase(r"\blook who\b", "'find out what ...'"),
    Phrase(r"\b(?:is|are) of before\b", "'predates'"),
    Phrase(r"\bthe whole way\b", "'the whole workflow'"),
    Phrase(r"\bcut off at full scale\b", "'clipped'"),
    Phrase(r"\bmends?\b|\bmended\b", "'fix', 'repair'"),
    Phrase(r"\bbroken off\b", "'interrupted'"),
    Phrase(r"\b(?:rotted|rotten)\b", "'corrupt'"),
    Phrase(r"\b(?:is|are) there already\b", "'already exists'"),
    Phrase(r"\b(?:comes?|came) of (?:it|them|that|each|every|the|this)\b", "'results', 'output'"),
    Phrase(r"\bothers than\b", "'different from'"),
    Phrase(r"\bcan be got round\b", "'can be bypassed'"),
]  # fmt: skip
_COMPILED = [(re.compile(each.pattern.replace(" ", r"\s+"), re.IGNORECASE), each.better) for each in PHRASES]
_TOOLS = re.compile(r"#\s*(?:noqa|type:|fmt:|pragma|!)")


class Finding(NamedTuple):
    line: int
    phrase: str
    better: str


def in_text(text: str, first_line: int = 1) -> Iterator[Finding]:
    """Yield the banned phrases of a text whose first line has the number `first_line`."""
    prose = re.sub(r"(`+)[^`]+\1", lambda code: re.sub(r"[^\n]", "`", code[0]), text)
    for pattern, better in _COMPILED:
        for match in pattern.finditer(prose):
            yield Finding(first_line + text.count("\n", 0, match.start()), " ".join(match[0].lower().split()), better)


def in_docstring(text: str, first_line: int = 1) -> Iterator[Finding]:
    """Yield the banned phrases of a docstring, and its first word if that makes a fragment or a question."""
    opening = re.match(r"\s*([A-Za-z]+)(?![\w'-])", text)
    if opening and opening[1].lower() in FIRST_WORDS:
        yield Finding(first_line, f"{opening[1]} ...", FIRST_WORDS[opening[1].lower()])
    yield from in_text(text, first_line)


def in_python(source: str) -> Iterator[Finding]:
    """Yield the findings of a module: docstrings, comments, and string literals of more than one word."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None and isinstance(statement := node.body[0], ast.Expr):
                docstrings.add(statement.value)
                yield from in_docstring(text, statement.lineno)
    parts = {each for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):  # {} in place of a value: a phrase does not span it
            pieces = (each.value if isinstance(each, ast.Constant) else "{}" for each in node.values)
            yield from _in_literal("".join(map(str, pieces)), node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings | parts:
            yield from _in_literal(node.value, node.lineno)
    for line, comment in _comments(source):
        yield from in_text(comment, line)


def _in_literal(text: str, line: int) -> Iterator[Finding]:
    """All findings get the line on which the literal starts: implicit concatenation hides the others."""
    yield from (Finding(line, phrase, better) for _, phrase, better in in_text(text))


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of each comment; comments on consecutive lines are one text."""
    block: list[str] = []
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or _TOOLS.match(token.string):
            continue
        if block and token.start[0] != start + len(block):
            yield start, "\n".join(block)
            block = []
        if not block:
            start = token.start[0]
        block.append(token.string.lstrip("#"))
    if block:
        yield start, "\n".join(block)


def in_markdown(text: str, *, is_log: bool = False) -> Iterator[Finding]:
    """Yield the banned phrases outside of fenced blocks; of a log, those of entries since LOG_SINCE."""
    kept, fenced, old = [], False, is_log
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if is_log and (entry := re.match(r"## (\d{4}-\d\d-\d\d)", line)):
            old = entry[1] < LOG_SINCE
        kept.append("" if fenced or old else line)
    yield from in_text("\n".join(kept))


def paths(root: Path) -> Iterator[Path]:
    for folder in ("src/nestcli", "tests"):
        yield from sorted((root / folder).rglob("*.py"))
    yield from (path for name in ("README.md", "CONTRIBUTING.md") if (path := root / name).is_file())
    yield from sorted((root / "docs").glob("*.md"))


def main(root: Path) -> int:
    found, used = [], set()
    for path in paths(root):
        place, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if place == EXAMPLES:
            continue
        findings = in_python(text) if path.suffix == ".py" else in_markdown(text, is_log=path.name == "log.md")
        for line, phrase, better in sorted(set(findings)):
            if (place, phrase) in ALLOWED:
                used.add((place, phrase))
            else:
                found.append(f"{place}:{line}: {phrase!r}. Better: {better}")
    found += [f".ci/english.py: {place}: {phrase!r} is allowed, but it no longer occurs" for place, phrase in
              sorted(ALLOWED.keys() - used)]  # fmt: skip
    print("\n".join(found) if found else "english: clean")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:] or [Path(__file__).parents[1]])))
