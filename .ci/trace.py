"""Trace one training batch through src/: the reading order for newcomers.

`python .ci/trace.py` prints every file and function that the batch passes as Markdown tables; `--write` puts them into
CONTRIBUTING.md, between two marks. The batch is real: the script writes a small corpus into a temporary folder, the
demo preset reads it without loader processes, and `sys.setprofile` notes the calls. Optimizer, callbacks and the
backward pass are left out.
"""

from __future__ import annotations

import ast
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "nestcli"
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- reading order: written by `make trace` -->", "<!-- reading order: end -->"

Place = tuple[str, str]  # a file below src/nestcli, and a function in it
TAKES: Place = ("data/sampler.py", "ResumableSampler.__iter__")  # yields the places of the plan


@dataclass
class Trace:
    """Functions in the order in which they were first entered, and the lines of each, nested functions included."""

    lines: dict[Place, int] = field(default_factory=dict)

    def files(self) -> dict[str, list[str]]:
        """The functions of each file."""
        found: dict[str, list[str]] = {}
        for file, function in self.lines:
            found.setdefault(file, []).append(function)
        return found


def record(work: Callable[[], object], before: Trace, after: Trace) -> None:
    """Call a function and note what it enters: `before` it takes a place of the plan, and `after` that.

    The function returns the iterators that it has begun: closing one would count as a call.
    """
    current = before

    def note(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal current
        path = frame.f_code.co_filename
        if event not in ("call", "return") or not path.startswith(str(SOURCE)):
            return
        if (found := functions_in(path).get(frame.f_code.co_firstlineno)) is None:
            return
        place = (Path(path).relative_to(SOURCE).as_posix(), found[0])
        if place == TAKES and event == "return":
            current = after
        elif event == "call":
            current.lines.setdefault(place, found[1])

    sys.setprofile(note)
    try:
        begun = work()
    finally:
        sys.setprofile(None)
    del begun


@cache
def functions_in(path: str) -> dict[int, tuple[str, int]]:
    """The functions of a file by their first lines: name and number of lines; nested ones belong to the outer one."""
    found: dict[int, tuple[str, int]] = {}

    def walk(nodes: Iterable[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                inner = (each for each in ast.walk(node) if isinstance(each, ast.FunctionDef))
                for each in inner:
                    start = min([each.lineno, *(one.lineno for one in each.decorator_list)])
                    found[start] = (prefix + node.name, node.end_lineno - first + 1)

    walk(ast.parse(Path(path).read_text(encoding="utf-8")).body, "")
    return found


def trace() -> tuple[Trace, Trace]:
    """The way from the configuration to the loss, and its last part: from a place of the plan to the loss."""
    from nestcli.bench.corpus import make_bench_corpus
    from nestcli.config import load_config
    from nestcli.data.datamodule import NestDataModule
    from nestcli.model.module import NestModule

    def work() -> object:
        config = load_config("demo", words)
        data, module = NestDataModule(config), NestModule(config)
        batches = iter(data.train_dataloader())
        batch = data.on_before_batch_transfer(next(batches), 0).to(module.device)
        assert module(batch).loss.isfinite()
        return batches

    before, after = Trace(), Trace()
    with tempfile.TemporaryDirectory() as folder:
        speech, noise = make_bench_corpus(
            Path(folder), speech=12, noise=3, seconds=(1.5, 3.0), noise_seconds=(4.0, 5.0)
        )
        words = [
            "model.train_ds.num_workers=0",
            f"model.train_ds.manifest_filepath={speech}",
            f"model.train_ds.noise_manifest={noise}",
            "model.validation_ds.manifest_filepath=null",
        ]
        record(work, before, after)
    return Trace({**before.lines, **after.lines}), after


def page(whole: Trace, after: Trace) -> str:
    """Return both ways as Markdown."""
    before = Trace({place: count for place, count in whole.lines.items() if place not in after.lines})
    return "\n".join(
        [
            f"From a place of the plan to the loss: {_sizes(after)}.",
            "",
            *_table(after),
            "",
            f"From the configuration to the loss: {_sizes(whole)}. Entered before the first batch:",
            "",
            *_table(before),
        ]
    )


def _sizes(way: Trace) -> str:
    return f"{len(way.files())} files, {sum(way.lines.values()):,} lines of functions"


def _table(way: Trace) -> Iterator[str]:
    yield "| file | functions, in the order of their first call (lines) |"
    yield "| --- | --- |"
    for file, functions in way.files().items():
        yield f"| `{file}` | {', '.join(f'`{each}` ({way.lines[file, each]})' for each in functions)} |"


def written(text: str) -> str:
    """The part of a page between the marks."""
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def main(words: list[str]) -> int:
    text = page(*trace())
    if words != ["--write"]:
        print(text)
        return 0
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
