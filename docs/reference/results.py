"""Write the tables and pictures of docs/results from the stored results of the reference run (`make results`).

python docs/reference/results.py [OUT]

With OUT, a folder of docs/reference/run.py, its results are stored first: the metrics of both runs, and what the probes
measured. Pages hold the tables between two marks; everything else in them is written by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nestcli.files import write_text
from nestcli.pictures import GREY, new_figure, save, styled
from nestcli.training.curves import draw_curves, read_lines

DOCS = Path(__file__).parents[1]
STORED = DOCS / "results"
RUNS = {"reference": "reference", "control": "NeMo's settings"}
QUESTIONS = {
    "words": "words of speakers that were left out, accuracy",
    "phones": "phones of speakers that were left out, error rate",
    "speakers": "same speaker or not, equal error rate",
    "abx": "A, B or X: words across speakers, error rate",
}
PLACES = {"quiet": "", "noise": ", in noise at 5 dB"}
BASELINES = {"untrained": "untrained", "log-mel": "log-mel", "log-mel-normalised": "log-mel, normalised"}
# The first rows of the READMEs' table: its columns, and the questions.
SHORT = (
    ("frozen features, new speakers", "`nest` reference", "NeMo's settings", "untrained", "log-mel"),
    ("words right", "words right in noise, 5 dB", "phones wrong", "voices confused"),
)
SHORT_CHINESE = (
    ("冻结特征，新说话人", "`nest` reference", "NeMo 的设置", "未训练", "log-mel"),
    ("单词正确率", "5 dB 噪声下的单词正确率", "音素错误率", "说话人等错误率"),
)
SHORT_RESULTS = ("words-quiet", "words-noise", "phones-quiet", "speakers-quiet")
PAGES = {
    "results.md": ("runs", "probes", "marks"), "probe.md": ("probes",), "../README.md": ("short",),
    "../README.zh-CN.md": ("short-chinese",),
}  # fmt: skip
_LEFT_OUT = ("manifest", "checkpoint", "noise", "confusion")  # paths of one machine, and what no table shows


def main(words: list[str]) -> int:
    if words:
        store(Path(words[0]))
    for page, tables in PAGES.items():
        path = DOCS / page
        write_text(path, [filled(path.read_text(encoding="utf-8"), tables)])
    draw(DOCS / "images")
    return 0


def store(out: Path) -> None:
    """Copy the metrics and the probes' results of a folder of run.py."""
    for run in RUNS:
        for metrics in (out / run).glob("*/metrics.jsonl"):
            write_text(STORED / run / "metrics.jsonl", [metrics.read_text(encoding="utf-8")])
        for result in sorted((out / "probes" / run).glob("*/probe.json")):
            document = json.loads(result.read_text(encoding="utf-8"))
            kept = {key: value for key, value in document.items() if key not in _LEFT_OUT}
            write_text(
                STORED / run / f"{result.parent.name}.json", [json.dumps(kept, ensure_ascii=False, indent=1) + "\n"]
            )


def filled(page: str, tables: Iterable[str]) -> str:
    """Return a page with its tables written anew. Raises ValueError if it lacks a table's marks."""
    for name in tables:
        begin, end = f"<!-- {name}: written by `make results` -->", f"<!-- {name}: end -->"
        before, found, rest = page.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"the marks {begin} and {end} are missing")
        table = "\n".join(TABLES[name]())
        page = f"{before}{begin}\n\n{table}\n\n{end}{rest.partition(end)[2]}"
    return page


def runs_table() -> Iterator[str]:
    """The end of each run, from its best validation."""
    yield "| | " + " | ".join(RUNS.values()) + " |"
    yield "| --- " * (1 + len(RUNS)) + "|"
    columns = [_summary(read_lines(STORED / run)) for run in RUNS]
    for row in columns[0]:
        yield f"| {row} | " + " | ".join(column[row] for column in columns) + " |"


def _summary(lines: list[dict[str, Any]]) -> dict[str, str]:
    last = lines[-1]
    best = min((line for line in lines if line.get("val_loss") is not None), key=lambda line: line["val_loss"])
    learned = next((line for line in lines if line.get("val_loss") and _gain(line) > 0), None)
    return {
        "optimiser steps": f"{last['step']:,}",
        "hours of audio heard": f"{last['audio_hours']:.0f}",
        "hours on one core": f"{last['seconds'] / 3600:.1f}",
        "best validation loss (nats)": f"{best['val_loss']:.2f} at step {best['step']:,}",
        "guessing by frequency (nats)": f"{best['val_unigram_loss']:.2f}",
        "**nats below guessing**": f"**{_gain(best):.2f}**",
        "first validation below guessing": f"step {learned['step']:,}" if learned else "none",
        "masked tokens right": f"{best['val_masked_accuracy']:.1%} (guessing: {best['val_unigram_accuracy']:.1%})",
        "effective rank at the end": f"{last['effective_rank']:.0f}",
    }


def _gain(line: dict[str, Any]) -> float:
    return float(line["val_unigram_loss"] - line["val_loss"])


def probes_table() -> Iterator[str]:
    """Every question to every system, in quiet and in noise; mean and deviation over the splits."""
    yield "| | " + " | ".join([*RUNS.values(), *BASELINES.values()]) + " |"
    yield "| --- " * (1 + len(RUNS) + len(BASELINES)) + "|"
    for question, words in QUESTIONS.items():
        for place, added in PLACES.items():
            found = {run: STORED / run / f"{question}-{place}.json" for run in RUNS}
            documents = {run: json.loads(path.read_text("utf-8")) for run, path in found.items() if path.is_file()}
            ours = [_best(documents[run], "pretrained") if run in documents else "not asked" for run in RUNS]
            others = [_best(documents["reference"], name) for name in BASELINES]
            yield f"| {words}{added} | " + " | ".join([*ours, *others]) + " |"


def short_table(words: tuple[tuple[str, ...], tuple[str, ...]]) -> Iterator[str]:
    """The READMEs' table: means alone."""
    yield "| " + " | ".join(words[0]) + " |"
    yield "| --- " * len(words[0]) + "|"
    for row, name in zip(words[1], SHORT_RESULTS, strict=True):
        ours, theirs = (json.loads((STORED / run / f"{name}.json").read_text("utf-8")) for run in RUNS)
        found = [(ours, "pretrained"), (theirs, "pretrained"), (ours, "untrained"), (ours, "log-mel")]
        yield f"| {row} | " + " | ".join(_best(*each).partition(" ")[0] for each in found) + " |"


def marks_table() -> Iterator[str]:
    """The marks that were set before the run, and what it reached."""
    yield "| mark | wanted | reached | reached in noise at 5 dB |"
    yield "| --- | --- | --- | --- |"
    lines = [line for line in read_lines(STORED / "reference") if line.get("val_loss") is not None]
    yield f"| validation loss below guessing by frequency | 0.5 nats | {max(map(_gain, lines)):.2f} nats | |"
    words, phones = (
        [json.loads((STORED / "reference" / f"{name}-{place}.json").read_text("utf-8")) for place in PLACES]
        for name in ("words", "phones")
    )
    yield _row("words", "80%", [f"{_result(each, 'pretrained')['mean']:.1%}" for each in words])
    for name, points in (("untrained", 15), ("log-mel", 30)):
        leads = [f"{100 * each['margins'][name]['mean']:.1f} points" for each in words]
        yield _row(f"words above {BASELINES[name]}", f"{points} points", leads)
    for name in ("untrained", "log-mel"):
        fewer = [each["margins"][name]["mean"] / _result(each, name)["mean"] for each in phones]
        yield _row(f"fewer wrong phones than {BASELINES[name]}", "15%", [f"{share:.0%}" for share in fewer])


def _row(mark: str, wanted: str, values: Iterable[str]) -> str:
    return "| " + " | ".join([mark, wanted, *values]) + " |"


def _best(document: dict[str, Any], name: str) -> str:
    best = _result(document, name)
    return f"{best['mean']:.1%} ± {100 * best['deviation']:.1f}"


def _result(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The result of a system with its best pooling: the lowest of an error rate, the highest of an accuracy."""
    choose = max if document["measure"] == "accuracy" else min
    return choose((each for each in document["systems"] if each["name"] == name), key=lambda each: each["mean"])


TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "runs": runs_table, "probes": probes_table, "marks": marks_table, "short": lambda: short_table(SHORT),
    "short-chinese": lambda: short_table(SHORT_CHINESE),
}  # fmt: skip


def draw(folder: Path) -> None:
    draw_curves(read_lines(STORED / "reference"), folder / "health-reference.png")
    draw_curves(read_lines(STORED / "control"), folder / "health-plateau.png")
    draw_gains(folder / "reference-loss.png")


@styled()
def draw_gains(path: Path) -> None:
    """Draw how far the validation loss of each run is below guessing by frequency."""
    figure = new_figure(7, 3)
    axes = figure.subplots()
    for run, label in RUNS.items():
        points = [(line["audio_hours"], _gain(line)) for line in read_lines(STORED / run) if line.get("val_loss")]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(0, color=GREY, linestyle=(0, (4, 3)), label="guessing by frequency")
    axes.set_xlabel("hours of audio heard")
    axes.set_ylabel("nats below guessing")
    axes.set_title("validation loss on speakers that training has not heard, better upwards")
    axes.grid(axis="y")
    axes.legend()
    save(figure, path, dpi=110)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
