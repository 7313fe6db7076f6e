"""Run a probe: the entry to this package, and the list of its tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nestcli.checkpoint.encoder import read_encoder
from nestcli.evaluation.inputs import read_inputs
from nestcli.evaluation.probes import abx, classify, ctc, verify
from nestcli.evaluation.probes.options import ABX, CLASSIFY, CTC, VERIFY, ProbeOptions
from nestcli.evaluation.probes.results import ProbeResult
from nestcli.evaluation.probes.systems import Progress, Systems

_TASKS: dict[str, Callable[[Systems, ProbeOptions], ProbeResult]] = {
    CLASSIFY: classify.ask, CTC: ctc.ask, VERIFY: verify.ask, ABX: abx.ask,
}  # fmt: skip


def probe(
    given: str, checkpoint: str, out: Path, options: ProbeOptions, progress: Progress = lambda done, total, doing: None
) -> ProbeResult:
    """Probe a checkpoint on a manifest whose lines have the field `options.label`.

    `out` receives the list of files if `given` is not a manifest. Raises ConfigError, DataError and CheckpointError.
    """
    stored = read_encoder(checkpoint)
    return _TASKS[options.task](Systems(stored, read_inputs(given, out).manifest, options, progress), options)
