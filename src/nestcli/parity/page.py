"""Write a comparison as one self-contained HTML page, which can be printed or sent.

All text from the report is escaped. A word or a shape repeats the meaning of each colour.
"""

from __future__ import annotations

import math
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from nestcli import __version__
from nestcli.files import atomic_file
from nestcli.parity.figures import curves_figure, pictures_figure, scientific
from nestcli.parity.report import SECTIONS, Check, KnownDifference, Report, Section

_LONGEST_VALUE, _LONGEST_REMARK = 44, 320  # characters
_GOOD, _BAD = '<span class="good">✓ same</span>', '<span class="bad">✗ differs</span>'


def write_page(report: Report, path: Path) -> None:
    """Write the report as an HTML page, atomically. Raises NestError."""
    document = document_of(report, datetime.now(timezone.utc))
    with atomic_file(path, remedy="Name a file in a folder of yours.") as file:
        file.write(document.encode("utf-8", errors="replace"))


def document_of(report: Report, date: datetime) -> str:
    """Return the page of a report as HTML."""
    parts = [_head(report, date), _overview(report)]
    parts += [curves_figure(section) for section in report.sections if section.curves]
    parts += [pictures_figure(section) for section in report.sections if section.pictures]
    parts += [_checks(report), _known_differences(report.known_differences)]
    title = escape(f"{report.config} and NeMo {report.nemo_version}")
    return html_page(title, "\n".join(part for part in parts if part))


def html_page(title: str, body: str) -> str:
    """Return an HTML page in nest's style; `title` and `body` must already be HTML."""
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# ---- verdict ---------------------------------------------------------------------------------------------------------


def _head(report: Report, date: datetime) -> str:
    n_checks = sum(len(section.checks) for section in report.sections)
    left_out = [name for name in SECTIONS if name not in {section.name for section in report.sections}]
    compared = f"{n_checks:,} in {len(report.sections)} of {len(SECTIONS)} sections"
    facts = {
        "Configuration": escape(report.config),
        "Compared with": f"NeMo {escape(report.nemo_version)}, "
        + ("run beside it" if report.live else "as recorded: facts that ship with nest"),
        "Checks": compared + (f"; left out: {escape(', '.join(left_out))}" if left_out else ""),
        "Versions": f"nestcli {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "Date": f'<time datetime="{date:%Y-%m-%dT%H:%MZ}">{date:%Y-%m-%d %H:%M} UTC</time>',
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    notes = "".join(f"<li>{_prose(note)}</li>" for note in report.notes)
    sentence, more = _verdict(report, n_checks, left_out)
    return (
        f'<header class="{"passed" if report.passed else "failed"}">\n<h1>{escape(sentence)}</h1>\n'
        f'<p class="lead">{more}</p>\n<dl>{rows}</dl>\n' + (f"<ul>{notes}</ul>\n" if notes else "") + "</header>"
    )


def _verdict(report: Report, n_checks: int, left_out: Sequence[str]) -> tuple[str, str]:
    """Return the verdict as a sentence of plain text, and the details as HTML."""
    nemo = f"NeMo {report.nemo_version}"
    if report.first_divergence is not None:
        section, check = report.first_divergence
        element = re.search(r"first at ((?:element|\([\w, ]+\)) \[[\d, ]*\])", check.where or "")
        n_failed = sum(not check.passed for section in report.sections for check in section.checks)
        more = f"{n_failed:,} of {n_checks:,} checks {'differs' if n_failed == 1 else 'differ'}. "
        if check.where:
            more += f"“{escape(check.name)}”: {escape(_cut(check.where))}. "
        place = f", {element[1]}" if element else ""
        sentence = f"Differs from {nemo}: first at {section.name}, “{check.name}”{place}"
        return sentence, f'{more}<a href="#first">To that check</a>'
    if not n_checks:
        return f"Nothing was compared with {nemo}", "The report holds no checks."
    what = f"The same as {nemo} in the sections compared" if left_out else f"The same model as {nemo}"
    same = f"{n_checks:,} checks, no difference beyond its tolerance."
    wrong = [difference.name for difference in report.known_differences if difference.reproduced is False]
    if wrong:
        return f"{what}, but a known difference is not as described: {wrong[0]}", same
    return what, same


# ---- overview --------------------------------------------------------------------------------------------------------


def _overview(report: Report) -> str:
    rows = []
    for section in report.sections:
        tightest = max(section.checks, key=share_of_tolerance, default=None)
        name = f'<a href="#{escape(section.name)}">{escape(section.name)}</a>'
        rows.append([name, _GOOD if section.passed else _BAD, f"{len(section.checks):,}", *_tightest(tightest)])
    columns = ["section", "verdict", ">checks", "closest to its tolerance", ">difference", ">tolerance", ">share"]
    caption = "For each section the check whose difference is the largest share of its tolerance."
    return f"<section>\n<h2>Overview</h2>\n{_table(caption, columns, rows)}\n</section>"


def share_of_tolerance(check: Check) -> float:
    """Return the difference divided by the tolerance; infinity if either is missing or the tolerance is 0."""
    if check.difference is None or math.isnan(check.difference):
        return 0.0 if check.passed else math.inf
    if not check.tolerance:
        return math.inf if check.difference else 0.0
    return check.difference / check.tolerance


def _tightest(check: Check | None) -> list[str]:
    if check is None:
        return ["–", "–", "–", "–"]
    if check.passed and not check.difference:
        return ["no difference in any", "0", "–", _share(check)]
    return [_name(check.name), scientific(check.difference), scientific(check.tolerance), _share(check)]


def _share(check: Check) -> str:
    share = share_of_tolerance(check)
    if share == 0:
        words = "0 %"
    elif not math.isfinite(share):
        words = "none allowed" if not check.tolerance else "–" if check.difference is None else "not finite"
    elif share > 10:
        words = f"{share:,.0f} times" if share < 1e6 else f"{share:.0e} times"
    else:
        percent = 100 * share
        words = "&lt; 0.1 %" if percent < 0.1 else f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"
    kind = "bar" if check.passed else "bar bad"
    bar = f'<span class="{kind}" aria-hidden="true"><i style="width:{100 * min(share, 1):.0f}%"></i></span>'
    return f'<span class="whole">{words} {bar}</span>'


# ---- checks ----------------------------------------------------------------------------------------------------------


def _checks(report: Report) -> str:
    first = report.first_divergence
    parts = [_section(section, first[1] if first else None) for section in report.sections]
    return "<section>\n<h2>Checks</h2>\n" + "\n".join(parts) + "\n</section>"


def _section(section: Section, first: Check | None) -> str:
    """Return one section's checks; a note that more than two checks share appears once, below the table."""
    counts = Counter(check.note for check in section.checks if check.note)
    shared = {
        note: mark for mark, note in zip("abcdefgh", [n for n, count in counts.items() if count > 2], strict=False)
    }
    rows = []
    for check in section.checks:
        remarks = [escape(_cut(check.where))] if check.where else []
        name = _name(check.name)
        if check.note in shared:
            name += f" <sup>{shared[check.note]}</sup>"
        elif check.note:
            remarks.append(f"<small>{escape(_cut(check.note))}</small>")
        if check is first:
            name = f'<span id="first">{name}</span>'
        sides = [_value(check.ours, check.nemo), _value(check.nemo, check.ours)]
        numbers = [scientific(check.difference), scientific(check.tolerance)]
        rows.append([name, *sides, *numbers, _GOOD if check.passed else _BAD, _far(remarks)])
    columns = ["check", ">ours", ">NeMo", ">difference", ">tolerance", "verdict", "where, note"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    notes = "".join(f"<p><small><sup>{mark}</sup> {escape(note)}</small></p>" for note, mark in shared.items())
    count = f"{len(section.checks):,} check{'' if len(section.checks) == 1 else 's'}"
    n_failed = sum(not check.passed for check in section.checks)
    state = f"{_BAD}, {n_failed:,} of {count}" if n_failed else f"{_GOOD}, {count}"
    name = escape(section.name)
    return (
        f"<details{'' if section.passed else ' open'}>\n<summary><h3>{name}</h3> {state}</summary>\n"
        f'<div id="{name}">{_table(f"Checks of {section.name}", columns, rows, quiet=True)}{notes}</div>\n</details>'
    )


def _far(remarks: Sequence[str]) -> str:
    return f'<div class="far">{"<br>".join(remarks)}</div>' if remarks else ""


def _known_differences(differences: Sequence[KnownDifference]) -> str:
    if not differences:
        return ""
    words = {True: '<span class="good">✓ as described</span>', False: '<span class="bad">✗ not as described</span>'}
    rows = []
    for difference in differences:
        switch = f"<code>{_name(difference.switch)}</code>" if difference.switch else "–"
        described = words[difference.reproduced] if difference.reproduced is not None else "not tried"
        told = [escape(difference.nemo), escape(difference.ours)]
        rows.append([escape(difference.name), *told, switch, escape(_cut(difference.shown or "–")), described])
    columns = ["what", "NeMo", "nest", "switch to NeMo's behaviour", "shown just now", "reproduced"]
    caption = "Where nest departs from NeMo on purpose. The comparison itself runs with NeMo's behaviour switched on."
    return f"<section>\n<h2>Known differences</h2>\n{_table(caption, columns, rows)}\n</section>"


# ---- words -----------------------------------------------------------------------------------------------------------


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, quiet: bool = False) -> str:
    """Return a table of HTML cells. The first column names the rows; columns named '>...' are aligned to the right."""
    right = [' class="n"' if column.startswith(">") else "" for column in columns]
    names = [column.removeprefix(">") for column in columns]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, right, strict=True))
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, right[1:], strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    hidden = ' class="quiet"' if quiet else ""
    words = escape(caption)
    return (
        f'<div class="wide" role="region" aria-label="{words}" tabindex="0">\n<table>\n'
        f"<caption{hidden}><span>{words}</span></caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div>"
    )


def _prose(words: str) -> str:
    """Escape a text and format its options as code, so that a line does not break after their dashes."""
    return re.sub(r"(?<!\S)(--\w[\w-]*)", r"<code>\1</code>", escape(words))


def _name(name: str) -> str:
    """Escape a name and allow line breaks after dots, but not within a word or a number."""
    return re.sub(r"([.=:])(?=[^\W\d])", r"\1<wbr>", escape(name))


def _value(value: Any, other: Any) -> str:
    """Format a value for display; show a long list from the first place at which it differs from the other side's."""
    if isinstance(value, (list, tuple)):
        words = _name(_list(value, other if isinstance(other, (list, tuple)) else value))
        return f'<span class="whole">{words}</span>' if len(words) <= _LONGEST_VALUE // 2 else words
    return _name(_plain(value))


def _list(values: Sequence[Any], other: Sequence[Any]) -> str:
    whole = f"[{', '.join(map(_plain, values))}]"
    if len(whole) <= _LONGEST_VALUE:
        return whole
    pairs = enumerate(zip_longest(values, other, fillvalue=object()))
    start = next((place for place, (ours, nemo) in pairs if ours != nemo), 0)
    shown: list[str] = []
    length = 0
    for item in values[start:]:
        length += len(_plain(item)) + 2
        if shown and length > _LONGEST_VALUE - 16:
            break
        shown.append(_cut(_plain(item), _LONGEST_VALUE))
    return f"[{'… ' if start else ''}{', '.join(shown)}, …] {len(values):,} in all"


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _cut(str(value), 2 * _LONGEST_VALUE)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:#.7g}" if math.isfinite(value) else str(value)


def _cut(words: str, longest: int = _LONGEST_REMARK) -> str:
    return words if len(words) <= longest else f"{words[: longest - 2].rstrip()} …"
