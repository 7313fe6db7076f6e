"""Run `nest bench`: the table of sections, and the loop over them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nestcli.bench.context import BenchContext, Options
from nestcli.bench.fit import buckets_section
from nestcli.bench.loader import loader_section
from nestcli.bench.precisions import precisions_section
from nestcli.bench.report import SectionReport
from nestcli.bench.scale import scale_section
from nestcli.bench.training import quantizer_section, train_step_section
from nestcli.errors import RunFailedError
from nestcli.training.settings import accelerator

SECTIONS: dict[str, Callable[[BenchContext], SectionReport]] = {
    "loader": loader_section,
    "scale": scale_section,
    "train_step": train_step_section,
    "quantizer": quantizer_section,
    "precisions": precisions_section,
    "buckets": buckets_section,
}
_ON_GPUS = ("precisions", "buckets")  # these take hours on a CPU
_WITH_NEMO = ("loader", "scale", "train_step", "quantizer")


@dataclass
class BenchReport:
    """The measured sections, and the errors of those that failed."""

    sections: list[SectionReport] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        failed = [{"name": name, "error": error} for name, error in self.failures.items()]
        return {"sections": [section.to_json() for section in self.sections], "failed": failed}


def run_bench(
    config: DictConfig, names: Sequence[str], options: Options, advance: Callable[[int, int, str], None]
) -> BenchReport:
    """Measure the named sections, or those that suit this machine, in order. A section that fails stops no other one.

    `advance` is called with (sections done, total sections, current step). Raises NestError for a mistake in the call.
    """
    names = names or default_sections(config)
    report, folder = BenchReport(), Path(tempfile.mkdtemp(prefix="nest-bench-"))
    context = BenchContext(config, options, folder, lambda doing: advance(number, len(names), doing))
    number = 0
    try:
        if any(name in _WITH_NEMO for name in names):
            context.check_nemo()
        for number, name in enumerate(names):  # noqa: B007  # the context's lambda uses it
            try:
                report.sections.append(SECTIONS[name](context))
            except RunFailedError as error:
                report.failures[name] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def default_sections(config: DictConfig) -> list[str]:
    """Return the sections that suit this machine."""
    return [name for name in SECTIONS if name not in _ON_GPUS or accelerator(config) == "gpu"]
