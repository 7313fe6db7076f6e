"""A shortened demo: the same workflow with fewer steps and less speech."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("espeakng_loader")
pytest.importorskip("matplotlib")

from nestcli.checkpoint import load
from nestcli.cli.demo import _show
from nestcli.demo import corpus, tour
from nestcli.demo.tour import take_tour
from nestcli.errors import CheckpointError, RunFailedError
from nestcli.training.monitor.metrics import Reporter, StepReport


class Silent:
    def __init__(self) -> None:
        self.chapters: list[str] = []

    def chapter(self, title: str) -> None:
        self.chapters.append(title)

    def progress(self, done: int, total: int) -> None:
        assert 0 <= done <= total

    def display(self) -> Reporter:
        return self

    def step(self, report: StepReport) -> None: ...

    def validation(self, step: int, loss: float, accuracy: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finished(self) -> None: ...


SHORT = [
    "trainer.max_steps=25", "trainer.val_check_interval=10", "model.optim.sched.warmup_steps=10",
    "model.encoder.n_layers=1", "model.encoder.d_model=32", "model.train_ds.batch_size=4", "trainer.accelerator=cpu",
    "model.encoder.subsampling_conv_channels=16", "model.optim.lr=0.15",
]  # fmt: skip


def test_the_tour_learns_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "VOICES", corpus.VOICES[:4])  # several utterances of each in little speech
    guide = Silent()
    results = take_tour(tmp_path, SHORT, guide, minutes=1.5)
    assert len(guide.chapters) == 7
    assert results.learned.last_loss < 0.93 * results.learned.even_loss
    assert results.report.passed
    assert {each.name for each in results.probe.outcomes} == {
        "pretrained",
        "untrained",
        "log-mel",
        "log-mel-normalised",
    }
    assert results.reference.layers == ("input", *"0123")
    assert len(results.reference.values) == len(results.probe.outcomes[0].values)
    assert 1 <= len(results.noisy) <= tour.PREVIEWS
    for picture in (results.learned.curve, results.spectrograms, *results.noisy, *results.pictures):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = results.page.read_text(encoding="utf-8")
    assert re.search(rf"reference encoder</th><td>[a-z+]+</td><td[^>]*>{results.reference.mean:.1%}<", page)
    named = [unquote(name) for name in re.findall(r'(?:src|href)="([^"]+)"', page)]
    assert len(named) >= 10
    assert all((tmp_path / name).exists() for name in named), named
    _show(results)
    assert f"the reference encoder that comes with nest {results.reference.mean:.1%}, this one " in " ".join(
        capsys.readouterr().err.split()
    )
    rows = [json.loads(line) for line in results.run.metrics.read_text().splitlines()]
    assert rows[-1]["step"] == 25
    assert results.run.last is not None
    assert results.run.last.is_file()
    monkeypatch.setattr(tour, "_compared", lambda *_: results.report)
    again = take_tour(tmp_path, SHORT, guide, minutes=1.5)  # the same words again: nothing is trained twice
    assert again.run.step == 25


def test_a_loss_that_does_not_fall_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "VOICES", corpus.VOICES[:4])
    with pytest.raises(RunFailedError, match="It should have fallen"):
        take_tour(tmp_path, [*SHORT, "trainer.max_steps=2", "model.optim.lr=1e-6"], Silent(), minutes=1.5)


def test_a_package_without_its_encoder_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PACKAGED", tmp_path / "none")
    with pytest.raises(CheckpointError, match="lacks"):
        take_tour(tmp_path / "demo", SHORT, Silent(), minutes=1.5)
    assert not (tmp_path / "demo").exists()
