"""Health of runs: the values in metrics.jsonl against a separate computation; collapse; the display."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from conftest import tiny_config
from nestcli.cli.console import TrainingDisplay
from nestcli.errors import RunFailedError
from nestcli.model.health import perplexity
from nestcli.training.curves import main as curves
from nestcli.training.monitor.health import CodeCounts, CollapseDetector, HealthMonitor, PlateauDetector
from nestcli.training.monitor.metrics import TIMED, StepReport
from nestcli.training.run import Pretraining, RunResult

CODES = 32  # of the tiny model


class Recorder:
    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.notes: list[str] = []

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def validation(self, step: int, loss: float, accuracy: float) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)

    def finished(self) -> None: ...


def pretraining(corpus: dict[str, Path], folder: Path, *overrides: str) -> tuple[Pretraining, Recorder]:
    recorder = Recorder()
    config = tiny_config(corpus, f"exp_manager.exp_dir={folder}", "exp_manager.name=run", *overrides)
    return Pretraining(config, recorder), recorder


def rows_of(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.metrics.read_text().splitlines()]


def recorded_outputs(run: Pretraining) -> list[tuple[dict[str, Any], Any]]:
    """Return the outputs of every training step with its batch; the list is filled during the run."""
    seen: list[tuple[dict[str, Any], Any]] = []
    step = run.module.training_step

    def recorded(batch: Any, batch_idx: int) -> Any:
        outputs = step(batch, batch_idx)
        seen.append(({key: value.detach().clone() for key, value in outputs.items()}, batch))
        return outputs

    run.module.training_step = recorded  # type: ignore[method-assign]
    return seen


def test_lines_carry_what_the_steps_gave(corpus: dict[str, Path], tmp_path: Path) -> None:
    words = ["trainer.max_steps=6", "trainer.log_every_n_steps=3", "trainer.accumulate_grad_batches=2"]
    run, _ = pretraining(corpus, tmp_path, *words, "trainer.val_check_interval=12")
    seen = recorded_outputs(run)
    first, second = rows_of(run.fit())
    assert (first["step"], second["step"]) == (3, 6)
    step, window = seen[10:12], seen[6:12]  # the last step, and the last three
    losses = [float(outputs["loss"]) for outputs, _ in step]
    assert second["train_loss"] == pytest.approx(sum(losses) / 2)
    correct, selected = (sum(int(outputs[key]) for outputs, _ in step) for key in ("correct", "selected"))
    assert second["masked_accuracy"] == pytest.approx(correct / selected)

    before = torch.cat([outputs["tokens_NG"].flatten() for outputs, _ in seen[:6]]).bincount(minlength=CODES)
    tokens = torch.cat([outputs["tokens_NG"].flatten() for outputs, _ in window])
    shares = (before + 1) / (before.sum() + CODES)
    assert second["unigram_loss"] == pytest.approx(float(-shares[tokens].log().mean()))
    assert second["unigram_accuracy"] == pytest.approx(float((tokens == before.argmax()).float().mean()))
    assert first["unigram_loss"] == pytest.approx(math.log(CODES))  # nothing was seen before it
    for key, which in (("tokens_NG", "target"), ("predicted_NG", "predicted")):
        counts = torch.cat([outputs[key].flatten() for outputs, _ in seen]).bincount(minlength=CODES)
        assert second[f"{which}_perplexity"] == pytest.approx(float(perplexity(counts[None])))
        assert second[f"{which}_dead_codes"] == int((counts == 0).sum())
        assert first[f"{which}_dead_codes"] is None  # fewer than ten tokens a code
    assert second["recent_tokens"] == int(before.sum()) + len(tokens)

    samples = sum(int(batch.audio_len.sum()) for _, batch in window)
    assert second["padding_share"] == pytest.approx(1 - samples / sum(batch.audio.numel() for _, batch in window))
    masked = sum(int(outputs["mask_BT"].sum()) for outputs, _ in window)
    frames = sum(int((batch.audio_len // 160).sum()) for _, batch in window)
    assert second["masked_share"] == pytest.approx(masked / frames)
    seconds = sum(int(batch.audio_len.sum()) for _, batch in seen) / 16000
    assert second["audio_seconds"] == pytest.approx(seconds, abs=1e-3)
    assert second["audio_hours"] == pytest.approx(seconds / 3600, abs=1e-5)
    assert 1 < second["effective_rank"] < 16
    norm = torch.cat([each.detach().flatten() for each in run.module.parameters() if each.requires_grad]).norm()
    assert second["parameter_norm"] == pytest.approx(float(norm))
    assert 0 < second["data_wait_share"] < 1
    assert second["audio_per_second"] > 0
    assert "mfu" not in second  # a processor has no known peak
    assert second["val_unigram_loss"] > 0
    assert second["collapsed"] is False


def test_a_known_peak_tells_the_utilisation(corpus: dict[str, Path], tmp_path: Path) -> None:
    run, _ = pretraining(corpus, tmp_path, "trainer.max_steps=2", "nest.peak_flops=1e9")
    assert all(row["mfu"] > 0 for row in rows_of(run.fit()))


def test_the_gradient_norm_is_that_before_clipping(corpus: dict[str, Path], tmp_path: Path) -> None:
    norms, clipped = {}, []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [each.grad.flatten() for each in optimizer.param_groups[0]["params"] if each.grad is not None]
        clipped.append(float(torch.cat(gradients).norm()))

    hook = register_optimizer_step_post_hook(look)
    try:
        for clip in ("0.0", "1e-3"):
            words = ["trainer.max_steps=1", f"trainer.gradient_clip_val={clip}"]
            run, _ = pretraining(corpus, tmp_path / clip, *words)
            [row] = rows_of(run.fit())
            norms[clip] = row["gradient_norm"]
    finally:
        hook.remove()
    assert norms["0.0"] == norms["1e-3"] > 0.01
    assert clipped[1] == pytest.approx(1e-3, rel=0.01)
    assert all(parameter.grad is None for parameter in run.module.parameters())  # their memory is free again


def test_the_device_is_read_once_a_logged_step(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    read = HealthMonitor.read

    def counted(self: HealthMonitor, trainer: Any, pl_module: Any) -> dict[str, float]:
        reads.append(trainer.global_step)
        return read(self, trainer, pl_module)

    monkeypatch.setattr(HealthMonitor, "read", counted)
    words = ["trainer.max_steps=7", "trainer.log_every_n_steps=3", "trainer.val_check_interval=5"]
    run, recorder = pretraining(corpus, tmp_path, *words)
    rows = rows_of(run.fit())
    assert reads == [3, 5, 6, 7]  # 5 is that of the validation, 7 the end
    assert [row["step"] for row in rows] == reads
    assert [report.step for report in recorder.steps] == [1, 2, 3, 4, 5, 6, 7]
    shown = [report.loss for report in recorder.steps]
    assert shown[0] == shown[1]  # the first step's, until a line is read
    assert shown[2] == shown[3] == rows[0]["train_loss"]
    assert shown[6] == rows[3]["train_loss"]
    assert math.isnan(recorder.steps[0].unigram_loss)
    assert recorder.steps[3].unigram_loss == rows[0]["unigram_loss"]


def test_a_run_that_is_resumed_between_lines_counts_on(corpus: dict[str, Path], tmp_path: Path) -> None:
    common = ["trainer.log_every_n_steps=4", "model.validation_ds.manifest_filepath=null"]
    common += ["exp_manager.checkpoint_callback_params.every_n_train_steps=3"]
    run, _ = pretraining(corpus, tmp_path / "whole", *common, "trainer.max_steps=8")
    whole = rows_of(run.fit())
    run, _ = pretraining(corpus, tmp_path / "parts", *common, "trainer.max_steps=8")
    step = run.module.training_step

    def killed(batch: Any, batch_idx: int) -> Any:
        if run.module.trainer.global_step == 7:
            raise KeyError("killed")
        return step(batch, batch_idx)

    run.module.training_step = killed  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        run.fit()
    run, _ = pretraining(corpus, tmp_path / "parts", *common, "trainer.max_steps=8")
    assert run.plan.resumes_at == 6  # two steps after a line
    parts = rows_of(run.fit())
    assert [{key: row[key] for key in row if key not in TIMED} for row in parts] == [
        {key: row[key] for key in row if key not in TIMED} for row in whole
    ]


def test_recent_counts_forget_and_the_baseline_does_not() -> None:
    class Alone:
        class strategy:  # noqa: N801
            @staticmethod
            def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
                return value

    counts = CodeCounts(n_books=2, n_codes=4)

    def window_of(code: int, tokens: int) -> dict[str, float]:
        counts.add(torch.full((tokens, 2), code), torch.full((tokens, 2), 3 - code))
        counts.share(Alone())  # type: ignore[arg-type]
        measures = {name: float(value) for name, value in counts.measures().items()}
        counts.close()
        return measures

    first = window_of(0, 39)
    assert math.isnan(first["target_dead_codes"])
    second = window_of(1, 39)
    assert (second["target_dead_codes"], second["recent_tokens"]) == (2, 78)
    assert second["target_perplexity"] == pytest.approx(2.0)
    assert second["unigram_accuracy"] == 0.0
    assert second["unigram_loss"] == pytest.approx(math.log(43))  # code 1 was not seen among 39
    for _ in range(3):
        last = window_of(1, 39)
    assert last["target_perplexity"] == pytest.approx(1.0)  # code 0 is long ago
    assert last["predicted_perplexity"] == pytest.approx(1.0)
    assert int(counts.seen[0, 0]) == 39
    restored = CodeCounts(n_books=2, n_codes=4)
    restored.load_state_dict(counts.state_dict())
    assert all(torch.equal(value, getattr(counts, name)) for name, value in restored.state_dict().items())


# ---- collapse ----


def healthy(**changed: float) -> dict[str, float]:
    line = {"train_loss": 7.0, "unigram_loss": 7.8, "predicted_perplexity": 90.0, "target_perplexity": 3000.0}
    return {**line, "effective_rank": 120.0, **changed}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (healthy(), None),
        (healthy(predicted_perplexity=1.2), None),  # few codes, and yet better than a guess
        (healthy(train_loss=7.9, predicted_perplexity=1.2), "predictions spread over 1.2 of 8192 codes, targets over"),
        (healthy(train_loss=7.8, effective_rank=1.1), "the encoder's output has an effective rank of 1.10"),
        (healthy(train_loss=7.75, predicted_perplexity=1.2), "guessing by frequency gives 7.800"),
    ],
)
def test_when_a_run_counts_as_collapsed(line: dict[str, float], words: str | None) -> None:
    detector = CollapseDetector(patience=3, warmup_steps=100, n_codes=8192)
    assert all(detector.update(step, line) is None for step in range(10, 101, 10))  # the warm-up
    assert detector.update(110, line) is detector.update(120, line) is None
    message = detector.update(130, line)
    assert detector.collapsed is (words is not None)
    if words is None:
        assert message is None
        return
    assert message is not None
    assert message.startswith("step 130: the run has collapsed: ")
    assert words in message
    assert "Lower model.optim.lr" in message
    assert detector.update(140, line) is None  # said once
    again = CollapseDetector(patience=3, warmup_steps=100, n_codes=8192)
    again.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert again.update(150, line) is None
    assert again.update(160, healthy()) == "step 160: the run has recovered from its collapse."


def test_a_loss_above_the_baseline_counts_long_after_the_warm_up() -> None:
    detector = CollapseDetector(patience=3, warmup_steps=100, n_codes=8192)
    messages = [detector.update(step, healthy(train_loss=8.0)) for step in range(110, 260, 10)]
    assert [message is None for message in messages] == [True] * 12 + [False] + [True] * 2
    assert messages[12] is not None
    assert "loss 8.000, guessing by frequency gives 7.800, long after the warm-up" in messages[12]


def test_a_skipped_step_says_nothing_about_the_run() -> None:
    detector = CollapseDetector(patience=2, warmup_steps=0, n_codes=8192)
    flat = healthy(train_loss=7.9, effective_rank=1.0)
    assert detector.update(1, flat) is None
    assert detector.update(2, healthy(train_loss=math.nan, effective_rank=math.nan)) is None
    assert detector.update(3, flat) is not None


# ---- plateau ----


def losses(step: int, *, learns: bool, seed: int = 0) -> dict[str, float]:
    """A line like those of real runs: losses of single steps vary by 0.2 nats around the mean.

    The loss falls to that of guessing by frequency in 100 steps. A run that learns is 3% below it at step 300 and 11%
    at step 1,000, like a run with 4 books of 256 codes; one on the plateau stays.
    """
    generator = torch.Generator().manual_seed(1000 * seed + step)
    unigram = 4.16 + 0.05 * float(torch.randn((), generator=generator))
    start = 1.4 * math.exp(-step / 40)
    gain = 0.46 * (1 - math.exp(-max(0, step - 150) / 400)) if learns else 0.0
    return {
        "train_loss": 4.16 + start - gain + 0.2 * float(torch.randn((), generator=generator)),
        "unigram_loss": unigram,
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("every", [10, 50])
def test_a_run_on_the_plateau_is_told_once_and_a_good_one_never(seed: int, every: int) -> None:
    good, stuck = PlateauDetector(400, ["shorter blocks"]), PlateauDetector(400, ["shorter blocks"])
    told = []
    for step in range(every, 6001, every):
        assert good.update(step, losses(step, learns=True, seed=seed)) is None
        if message := stuck.update(step, losses(step, learns=False, seed=seed)):
            told.append((step, message))
    [(step, message)] = told
    assert 1000 + 20 * every <= step <= 1000 + 80 * every  # noise of the mean may delay it
    assert message.startswith(f"step {step}: the loss stays at that of guessing by frequency (4.")
    assert message.endswith("start again under another exp_manager.name with shorter blocks, half of model.optim.lr.")


def test_the_plateau_is_not_reported_in_the_warm_up_nor_of_a_run_above_the_baseline() -> None:
    on_it, above = {"train_loss": 6.5, "unigram_loss": 6.52}, {"train_loss": 6.8, "unigram_loss": 6.52}
    detector, collapsed = PlateauDetector(25_000), PlateauDetector(0)
    assert all(detector.update(step, on_it) is None for step in range(100, 27_000, 100))
    assert detector.update(27_000, on_it) is not None
    assert all(collapsed.update(step, above) is None for step in range(100, 5000, 100))  # a case of the collapse
    skipped = PlateauDetector(0)
    assert all(skipped.update(step, {**on_it, "train_loss": math.nan}) is None for step in range(100, 5000, 100))


def test_a_resumed_run_is_not_told_again() -> None:
    on_it = {"train_loss": 6.5, "unigram_loss": 6.52}
    first = PlateauDetector(0)
    assert all(first.update(step, on_it) is None for step in range(1010, 1200, 10))
    second = PlateauDetector(0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update(1200, on_it) is not None
    third = PlateauDetector(0)
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert all(third.update(step, on_it) is None for step in range(1210, 3000, 10))


def test_a_run_reports_its_plateau_after_the_line(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestcli.training.monitor.health._PLATEAU_FROM", 2)
    monkeypatch.setattr("nestcli.training.monitor.health._PLATEAU_LINES", 3)
    monkeypatch.setattr("nestcli.training.monitor.health._ON_BASELINE", 10.0)
    run, recorder = pretraining(corpus, tmp_path, "trainer.max_steps=10", "trainer.log_every_n_steps=1")
    run.fit()
    [note] = [note for note in recorder.notes if "guessing by frequency (" in note]
    assert note.startswith("step 8: ")  # three lines after the warm-up of 5
    assert "shorter tokens (model.encoder.subsampling_factor=4), half of model.optim.lr" in note


HUGE = (
    "model.optim.lr=300", "model.optim.sched.warmup_steps=2", "nest.collapse_lines=5", "trainer.max_steps=40",
    "nest.explode_factor=null", "trainer.val_check_interval=40",
)  # fmt: skip


def test_a_huge_learning_rate_collapses_a_run_which_says_so(corpus: dict[str, Path], tmp_path: Path) -> None:
    run, recorder = pretraining(corpus, tmp_path, *HUGE)
    rows = rows_of(run.fit())
    notes = [note for note in recorder.notes if "the run has collapsed" in note]
    assert notes
    assert "guessing by frequency gives" in notes[0]
    assert rows[-1]["train_loss"] > rows[-1]["unigram_loss"]
    first = next(row["step"] for row in rows if row["collapsed"])
    assert notes[0].startswith(f"step {first}: ")


def test_a_collapsed_run_can_stop_itself(corpus: dict[str, Path], tmp_path: Path) -> None:
    run, _ = pretraining(corpus, tmp_path, *HUGE, "nest.stop_on_collapse=true")
    with pytest.raises(RunFailedError, match=r"the run has collapsed: .*nest\.stop_on_collapse is set") as raised:
        run.fit()
    assert raised.value.exit_code == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["collapsed"] is True
    assert last["step"] < 40


# ---- what is shown ----


def report(**changed: Any) -> StepReport:
    values = {
        "step": 250_000, "steps": 500_000, "epoch": 12, "loss": 5.123, "accuracy": 0.1234, "learning_rate": 1.4e-3,
        "audio_per_second": 1234.5, "seconds_left": 99 * 3600.0, "unigram_loss": 7.812, "unigram_accuracy": 0.0051,
        "data_wait_share": 0.034, "mfu": 0.457,
    }  # fmt: skip
    return StepReport(**{**values, **changed})


def test_the_display_fits_a_line_of_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    TrainingDisplay().step(report())
    shown = capsys.readouterr().err.rstrip("\n")
    assert len(shown.removesuffix("  mfu 46%")) <= 100
    assert "loss 5.123 (base 7.812)  acc 12.3% (0.5%)" in shown
    assert "wait 3%" in shown
    assert shown.endswith("99h left  mfu 46%")


def test_the_display_leaves_out_what_is_not_known_yet(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = dict.fromkeys(
        ("unigram_loss", "unigram_accuracy", "data_wait_share", "audio_per_second", "mfu"), math.nan
    )
    TrainingDisplay().step(report(**unknown))
    shown = capsys.readouterr().err
    assert "loss 5.123  acc 12.3%  lr 1.4e-03  99h left" in shown
    assert "nan" not in shown


def test_curves_are_drawn_from_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": step, **healthy(), "val_loss": None, "masked_accuracy": 0.1} for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curves([str(tmp_path), str(tmp_path / "drawn.svg")]) == 0
    assert "<svg" in (tmp_path / "drawn.svg").read_text()
    assert curves([str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert curves([str(tmp_path / "gone")]) == 2
    assert "cannot be read as the metrics of a run" in capsys.readouterr().err
