"""All of `nest bench`: the sections by name."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from nestcli.bench.context import Context, Options, Told
from nestcli.bench.fit import buckets_section
from nestcli.bench.loader import loader_section
from nestcli.bench.report import SectionReport
from nestcli.bench.scale import scale_section

SECTIONS: dict[str, Callable[[Context], SectionReport]] = {
    "loader": loader_section,
    "scale": scale_section,
    "buckets": buckets_section,
}


def run_bench(config: DictConfig, names: Sequence[str], options: Options, tell: Told) -> list[SectionReport]:
    """Measure the named sections, or those that suit this machine. Raises NestError."""
    folder = Path(tempfile.mkdtemp(prefix="nest-bench-"))
    try:
        context = Context(config, options, folder, tell)
        return [SECTIONS[name](context) for name in names or SECTIONS]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
