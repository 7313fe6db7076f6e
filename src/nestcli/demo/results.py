"""The results of the tour, and the paths of its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nestcli.demo.corpus import CorpusSummary
from nestcli.evaluation.probes.results import Outcome, ProbeResult
from nestcli.parity.report import Report
from nestcli.prepare.summary import PrepareSummary
from nestcli.training.run import RunResult

COMPARISON = "compare.html"


@dataclass(frozen=True)
class Learned:
    """The final loss and accuracy, compared with guessing."""

    even_loss: float  # loss of a uniform guess: the logarithm of the number of codes
    frequency_loss: float  # loss of a guess that knows only how often each code occurs
    frequency_accuracy: float
    last_loss: float  # mean over the last lines of metrics.jsonl
    last_accuracy: float
    curve: Path


@dataclass(frozen=True)
class Results:
    """The results of every step, and the paths of the files."""

    corpus: CorpusSummary
    speech: PrepareSummary
    noisy: tuple[Path, ...]  # paths of the pictures of noisy copies
    run: RunResult
    learned: Learned
    report: Report
    probe: ProbeResult
    reference: Outcome  # of the encoder in the package, in the same probe
    out: Path

    @property
    def spectrograms(self) -> Path:
        return self.out / "spectrograms.png"

    @property
    def comparison(self) -> Path:
        return self.out / COMPARISON

    @property
    def pictures(self) -> tuple[Path, Path]:
        """Paths of the probe's pictures: confusion matrix and layer weights."""
        return self.out / "probe" / "confusion.png", self.out / "probe" / "layers.png"

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def files(self) -> list[tuple[str, Path]]:
        """Return a title and a path for each file that the page links to."""
        named = [
            ("comparison with NeMo", self.comparison),
            ("best checkpoint", self.run.best),
            ("newest checkpoint", self.run.last),
            ("metrics of every step", self.run.metrics),
            ("speech and noise", self.corpus.speech.parent),
            ("manifests", Path(str(self.speech.manifests["train"])).parent),
        ]
        return [(what, where) for what, where in named if where is not None]
