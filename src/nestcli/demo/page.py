"""Write the tour's results page, with the results of every step and links to the pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from html import escape
from os.path import relpath
from pathlib import Path
from urllib.parse import quote

from nestcli.demo.results import Results
from nestcli.files import write_text
from nestcli.parity.page import html_page


def write_results(path: Path, results: Results) -> None:
    """Write the page. Its links are relative, so that the folder can be moved. Raises NestError."""
    write_text(path, [html_page("nest demo", "\n".join(_parts(results, path.parent)))])


def _parts(results: Results, home: Path) -> Iterable[str]:
    pictures = results.pictures
    yield _head(results)
    yield "<h2>What the model hears</h2>"
    yield _picture(results.spectrograms, home, "Features of an utterance: clean, noisy, masked")
    yield from (_picture(path, home, "An utterance, what was mixed into it, and the mixture") for path in results.noisy)
    yield "<h2>Training</h2>"
    yield _picture(results.learned.curve, home, "Loss and accuracy at every step")
    yield "<h2>NeMo</h2>"
    yield f"<p>{_compared(results)} {_link(results.comparison, home, 'All checks')}</p>"
    yield "<h2>Speaker probe</h2>"
    yield f"<p>{_probed(results)}</p>{_accuracies(results)}"
    yield from (_picture(path, home, title) for path, title in zip(pictures, _PROBE_TITLES, strict=True))
    yield "<h2>Files</h2>"
    yield _files(results, home)


_PROBE_TITLES = ("Confusions between speakers", "Layer weights of the probes")


def _head(results: Results) -> str:
    learned = results.learned
    facts = {
        "Speech": f"{results.speech.accepted:,} utterances of {len(results.corpus.speakers)} synthetic voices, "
        f"{results.speech.hours * 60:.0f} minutes",
        "Loss": f"{learned.even_loss:.2f} to {learned.last_loss:.2f} (by frequency: {learned.frequency_loss:.2f})",
        "Masked tokens correct": f"{learned.last_accuracy:.1%} (by frequency: {learned.frequency_accuracy:.1%})",
        "Steps": f"{results.run.step:,}",
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    lead = "A model with a million parameters, trained for a few minutes on synthetic speech."
    return f'<header class="passed"><h1>nest demo</h1>\n<p class="lead">{lead}</p>\n<dl>{rows}</dl></header>'


def _compared(results: Results) -> str:
    report = results.report
    checks = sum(len(section.checks) for section in report.sections)
    verdict = "the same" if report.passed else "NOT the same"
    return f"{checks:,} checks against facts recorded from NeMo {escape(report.nemo_version)}: {verdict}."


def _probed(results: Results) -> str:
    leads = "; ".join(
        f"{100 * mean:+.1f} points compared with {escape(name)}{'' if clear else ', not a clear lead'}"
        for name, (mean, _, clear) in results.probe.margins.items()
    )
    return (
        f"A linear probe on features of the frozen encoder, {len(results.probe.classes)} voices, tested on utterances "
        f"that it was not trained on: {leads}. Such a short training learns little; see docs/probe.md. "
        "The reference encoder comes with nest and was trained for longer, on recorded speech."
    )


def _accuracies(results: Results) -> str:
    rows = "".join(
        f"<tr><th>{escape(each.name)}</th><td>{escape(each.pool)}</td>"
        f'<td class="n">{each.mean:.1%}</td><td class="n">{each.deviation:.1%}</td></tr>'
        for each in (*results.probe.outcomes, replace(results.reference, name="reference encoder"))
    )
    head = '<tr><th>system</th><th>pooling</th><th class="n">accuracy</th><th class="n">deviation</th></tr>'
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _files(results: Results, home: Path) -> str:
    items = "".join(f"<li>{_link(where, home, what)}</li>" for what, where in results.files())
    return f"<ul>{items}</ul>"


def _picture(path: Path, home: Path, title: str) -> str:
    address, name = _address(path, home), escape(title)
    return f'<figure><img src="{address}" alt="{name}" style="max-width:100%"><figcaption>{name}</figcaption></figure>'


def _link(path: Path, home: Path, text: str) -> str:
    return f'<a href="{_address(path, home)}">{escape(text)}</a>'


def _address(path: Path, home: Path) -> str:
    return escape(quote(Path(relpath(path, home)).as_posix()))
