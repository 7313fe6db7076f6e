"""Bad steps leave no trace in the model and are recorded; many of them end the run."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Listener

from conftest import tiny_config
from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.data.dataset import NoisySpeech
from nestcli.data.sampler import Place
from nestcli.errors import ConfigError, RunFailedError
from nestcli.model.module import NestModule
from nestcli.training.monitor.metrics import TIMED
from nestcli.training.monitor.step_guard import StepGuard, _gradient_norm, _is_bad, _skip_update, _Step, _unscales
from nestcli.training.monitor.step_numbers import SIGNALS, Arriving, StopRequest
from nestcli.training.run import Pretraining, RunResult

NOTHING_MASKED = "model.masking.block_size=4000"  # longer than every utterance


def pretraining(corpus: dict[str, Path], folder: Path, *overrides: str) -> Pretraining:
    config = tiny_config(corpus, f"exp_manager.exp_dir={folder}", "exp_manager.name=run", *overrides)
    return Pretraining(config, Listener())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(result: RunResult) -> list[dict[str, Any]]:
    rows = lines(result.metrics)
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """Return the set of batches (epoch, first item) whose noisy audio gets a NaN."""
    places: set[tuple[int, int]] = set()
    made = NoisySpeech._batch

    def poisoned(self: NoisySpeech, place: Place) -> Any:
        batch = made(self, place)
        if (place.epoch, int(place.items[0])) in places:
            batch.noisy_audio[0, 8000] = math.nan
        return batch

    monkeypatch.setattr(NoisySpeech, "_batch", poisoned)
    return places


def poison_batch(run: Pretraining, places: set[tuple[int, int]], epoch: int, number: int) -> list[int]:
    """Put a NaN into a batch of a run; return the batch's ids."""
    ids = run.data.train_batch(epoch, number).sample_ids
    places.add((epoch, int(run.data.train_plan().batches(epoch)[number][0])))
    return list(ids)


def states_before_steps(run: Pretraining, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return everything that a step may change, as it is at each step's beginning; filled during the run."""
    seen: list[dict[str, Any]] = []
    step = run.module.training_step

    def recorded(batch: Any, batch_idx: int) -> Any:
        optimizer = run.module.trainer.optimizers[0]
        seen.append(copy.deepcopy({"model": run.module.state_dict(), "moments": optimizer.state_dict()["state"]}))
        return step(batch, batch_idx)

    monkeypatch.setattr(run.module, "training_step", recorded)
    return seen


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


def test_a_nan_in_a_batch_leaves_nothing_behind(
    corpus: dict[str, Path], tmp_path: Path, poison: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretraining(corpus, tmp_path, "trainer.max_steps=6", "trainer.val_check_interval=6")
    ids = poison_batch(run, poison, 1, 0)  # the fourth batch: an epoch has three
    seen = states_before_steps(run, monkeypatch)
    result = run.fit()
    assert same(seen[4], seen[3])  # weights, running statistics and moments
    assert not same(seen[3]["model"], seen[2]["model"])
    assert not same(seen[5]["model"], seen[4]["model"])
    rows = lines(result.metrics)
    assert [row["bad_steps"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["train_loss"] is None for row in rows] == [False, False, False, True, False, False]
    assert len({row["lr"] for row in rows}) == 5  # the schedule continues: steps 1 and 2 have the same rate
    [bad] = lines(tmp_path / "run" / "bad_batches.jsonl")
    assert (bad["step"], bad["reason"], bad["loss"], bad["ids"]) == (4, "the loss is nan", None, ids)
    manifest = [json.loads(line) for line in corpus["train"].read_text().splitlines()]
    assert [found["file"] for found in bad["files"]] == [manifest[number]["audio_filepath"] for number in ids]
    assert bad["files"][0]["where"].endswith(f"train.json, line {ids[0] + 1}")
    assert [note for note in run.reporter.notes if "step 4 skipped: the loss is nan" in note]  # type: ignore[attr-defined]
    assert result.last is not None
    weights = load_lightning_checkpoint(result.last)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_with_accumulation_the_guilty_batch_is_named(
    corpus: dict[str, Path], tmp_path: Path, poison: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pretraining(corpus, tmp_path, "trainer.max_steps=3", "trainer.accumulate_grad_batches=2")
    ids = poison_batch(run, poison, 1, 0)  # the second of the second step
    seen = states_before_steps(run, monkeypatch)
    run.fit()
    assert same(seen[4], seen[2])
    [bad] = lines(tmp_path / "run" / "bad_batches.jsonl")
    assert bad["step"] == 2
    assert bad["ids"] == ids
    assert [batch["loss"] is None for batch in bad["batches"]] == [False, True]


def test_a_run_with_a_bad_step_resumes_to_the_last_bit(
    corpus: dict[str, Path], tmp_path: Path, poison: set[tuple[int, int]]
) -> None:
    common = ["trainer.val_check_interval=2"]
    whole = pretraining(corpus, tmp_path / "whole", "trainer.max_steps=7", *common)
    poison_batch(whole, poison, 1, 0)
    uninterrupted = whole.fit()
    for steps in (5, 7):  # after the bad step
        parts = pretraining(corpus, tmp_path / "parts", f"trainer.max_steps={steps}", *common).fit()
    assert metrics(parts) == metrics(uninterrupted)
    assert metrics(parts)[-1]["bad_steps"] == 1
    bad = [folder / "run" / "bad_batches.jsonl" for folder in (tmp_path / "parts", tmp_path / "whole")]
    assert lines(bad[0]) == lines(bad[1])
    assert parts.last is not None
    assert uninterrupted.last is not None
    ours, theirs = (load_lightning_checkpoint(path) for path in (parts.last, uninterrupted.last))
    assert same(ours["state_dict"], theirs["state_dict"])


def test_many_bad_steps_end_the_run_and_leave_the_last_good_checkpoint(
    corpus: dict[str, Path], tmp_path: Path, poison: set[tuple[int, int]]
) -> None:
    words = ["trainer.max_steps=20", "trainer.val_check_interval=2", "nest.max_bad_steps=3"]
    run = pretraining(corpus, tmp_path, *words)
    for number in range(3):
        poison_batch(run, poison, 1, number)
    with pytest.raises(RunFailedError) as raised:
        run.fit()
    message = str(raised.value)
    assert "training stopped at step 6: 3 of the last 3 steps were bad" in message
    assert str(tmp_path / "run" / "bad_batches.jsonl") in message
    assert "model.optim.lr" in message
    assert raised.value.exit_code == 1
    last = max((tmp_path / "run" / "checkpoints").glob("*-last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    content = load_lightning_checkpoint(last)
    assert content["global_step"] == 4
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_weights_that_are_not_finite_are_not_written(corpus: dict[str, Path], tmp_path: Path) -> None:
    first = pretraining(corpus, tmp_path, "trainer.max_steps=2", "trainer.val_check_interval=2").fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert first.last in before
    words = ["trainer.max_steps=6", "trainer.val_check_interval=2", "model.optim.lr=1e6"]
    run = pretraining(corpus, tmp_path, *words, "nest.max_bad_steps=null")
    step = run.module.training_step

    def broken(batch: Any, batch_idx: int) -> Any:
        run.module.model.decoder.layer.weight.data.fill_(math.nan)
        return step(batch, batch_idx)

    run.module.training_step = broken  # type: ignore[method-assign]
    run.fit()
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "checkpoints").iterdir()} == before


def test_without_a_guard_a_nan_spoils_the_model(
    corpus: dict[str, Path], tmp_path: Path, poison: set[tuple[int, int]]
) -> None:
    run = pretraining(corpus, tmp_path, "trainer.max_steps=2", "nest.max_bad_steps=null")
    poison_batch(run, poison, 0, 0)
    run.fit()
    assert not all(value.isfinite().all() for value in run.module.state_dict().values())
    assert not (tmp_path / "run" / "bad_batches.jsonl").exists()


def test_batches_without_a_masked_token_are_no_bad_steps(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestcli.training.run.check_masks", lambda *_: None)  # which refuses a run of nothing else
    run = pretraining(corpus, tmp_path, "trainer.max_steps=3", "trainer.val_check_interval=3", NOTHING_MASKED)
    result = run.fit()
    for row in lines(result.metrics):
        assert (row["train_loss"], row["masked_accuracy"], row["masked_share"]) == (0.0, 0.0, 0.0)
        assert (row["gradient_norm"], row["bad_steps"]) == (0.0, 0)
        assert row["unigram_loss"] is None  # nothing to guess
        assert row["effective_rank"] > 1
    assert not (tmp_path / "run" / "bad_batches.jsonl").exists()
    assert all(value.isfinite().all() for value in run.module.state_dict().values())


def judged(guard: StepGuard, loss: float, norm: float) -> str | None:
    """Return the guard's reason to skip a step; the device must decide the same."""
    step = _Step(1, [], guard._limit(), True, Arriving(torch.zeros(0)))
    reason = guard._reason(loss, norm, step)
    numbers = torch.tensor([loss, norm], dtype=torch.float64)
    assert bool(_is_bad(*numbers, step.limit, judges_norm=True)) is (reason is not None)
    return reason


def test_what_counts_as_bad() -> None:
    guard = StepGuard(Path("x"), print, lambda number: {}, max_bad_steps=3, explode_factor=10.0)
    assert judged(guard, 1e9, 1.0) is None  # nothing is usual yet
    guard._usual = [5.0] * 19 + [500.0]
    assert judged(guard, 49.0, 1e9) is None  # a large gradient alone is clipping's business
    assert judged(guard, 50.0, 1.0) is None
    assert judged(guard, 51.0, 1.0) == "the loss 51 is more than 10 times the usual 5"
    assert judged(guard, math.inf, 1.0) == "the loss is inf"
    assert judged(guard, 5.0, math.nan) == "the gradient norm is nan"
    resumed = StepGuard(Path("x"), print, lambda number: {}, max_bad_steps=3, explode_factor=10.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert judged(resumed, 51.0, 1.0) is not None
    guard.explode_factor = None
    assert judged(guard, 1e9, 1.0) is None


@pytest.mark.parametrize("logged", [1, 50])
def test_a_step_is_counted_in_time_for_lines_and_checkpoints(
    corpus: dict[str, Path], tmp_path: Path, poison: set[tuple[int, int]], logged: int
) -> None:
    """The host learns of a bad step in the next one: without a line in between, too, the checkpoint must have it."""
    words = ["trainer.max_steps=6", "trainer.val_check_interval=4", f"trainer.log_every_n_steps={logged}"]
    run = pretraining(corpus, tmp_path, *words)
    poison_batch(run, poison, 1, 0)  # step 4: validation and its checkpoint follow
    poison_batch(run, poison, 1, 2)  # step 6, the last
    result = run.fit()
    assert result.last is not None
    before = list(result.last.parent.glob("*step=4-last.ckpt"))
    assert [guard_state(path)["bad_steps"] for path in (*before, result.last)] == [1, 2]
    assert guard_state(result.last)["recent"] == [4, 6]
    assert len(guard_state(result.last)["usual"]) == 4
    assert [line["step"] for line in lines(tmp_path / "run" / "bad_batches.jsonl")] == [4, 6]
    assert lines(result.metrics)[-1]["bad_steps"] == 2


def guard_state(path: Path) -> dict[str, Any]:
    [state] = [each for key, each in load_lightning_checkpoint(path)["callbacks"].items() if "StepGuard" in key]
    return dict(state)


def test_all_processes_agree_on_the_signal_of_one() -> None:
    requests = [StopRequest() for _ in range(3)]
    requests[1].own = SIGNALS[0]
    requests[2].own = SIGNALS[2]
    marks = torch.stack([request.mark(torch.zeros(1, dtype=torch.float64)) for request in requests]).mean(0).tolist()
    for request in requests:
        request.agree(marks)
    assert [request.agreed for request in requests] == [SIGNALS[2]] * 3
    requests[0].agree([0.0] * StopRequest.MARKS)
    assert requests[0].agreed == 0


def test_an_exploding_loss_is_left_out(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nestcli.training.monitor.step_guard._MEDIAN_FROM", 3)
    run = pretraining(corpus, tmp_path, "trainer.max_steps=7", "nest.explode_factor=4")
    step = run.module.training_step

    def exploding(batch: Any, batch_idx: int) -> Any:
        outputs = step(batch, batch_idx)
        if run.module.trainer.global_step == 4:
            run.module.step_loss = run.module.step_loss * 5
            outputs["loss"] = outputs["loss"] * 5
        return outputs

    run.module.training_step = exploding  # type: ignore[method-assign]
    run.fit()
    [bad] = lines(tmp_path / "run" / "bad_batches.jsonl")
    assert bad["step"] == 5
    assert "more than 4 times the usual" in bad["reason"]


def scaled_step(loss_factor: float, *, leaves_out: bool, fused: bool) -> tuple[bool, bool]:
    """Run one step of a small layer under a gradient scaler; return whether its weights changed, and the scale."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = layer.weight.detach().clone()
    scaler.scale(layer(torch.ones(2, 3)).sum() * loss_factor).backward()
    if not fused:
        scaler.unscale_(optimizer)
    _skip_update(optimizer, scaler, torch.tensor(leaves_out))
    scaler.step(optimizer)
    scaler.update()
    return not torch.equal(before, layer.weight), scaler.get_scale() == 4.0


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_scaler_goes_on_when_a_step_is_left_out(fused: bool) -> None:
    assert scaled_step(1.0, leaves_out=False, fused=fused) == (True, True)
    assert scaled_step(1.0, leaves_out=True, fused=fused) == (False, not fused)  # a fused one counts as an overflow
    assert scaled_step(math.inf, leaves_out=False, fused=fused) == (False, False)  # its own skipping


def test_a_fused_step_that_is_left_out_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    after: list[Any] = []
    for number, bad in enumerate((False, True, False)):
        layer(torch.full((2, 3), math.nan if bad else 1.0 + number)).sum().backward()
        _skip_update(optimizer, None, torch.tensor(bad))
        optimizer.step()
        optimizer.zero_grad()
        after.append(copy.deepcopy({"weights": layer.state_dict(), "moments": optimizer.state_dict()["state"]}))
    assert same(after[1], after[0])
    assert not same(after[2], after[1])


@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_norm_is_that_of_unscaled_gradients(fused: bool) -> None:
    layer = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    layer(torch.ones(2, 3)).sum().backward()
    expected = _gradient_norm(optimizer, None)
    layer.zero_grad()
    scaler.scale(layer(torch.ones(2, 3)).sum()).backward()
    assert _unscales(optimizer) is fused is getattr(optimizer, "_step_supports_amp_scaling", False)  # torch's own word
    if not fused:
        scaler.unscale_(optimizer)
    assert _gradient_norm(optimizer, scaler) == expected
    if fused:
        assert _gradient_norm(optimizer, None) == 4 * expected  # the gradients themselves stay scaled


def test_a_step_that_the_scaler_skips_is_not_counted() -> None:
    class Scaled:
        class precision_plugin:  # noqa: N801
            scaler = torch.amp.GradScaler("cpu")

        class strategy:  # noqa: N801
            @staticmethod
            def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
                return value

        global_step, world_size = 0, 1

    guard = StepGuard(Path("x"), print, lambda number: {}, max_bad_steps=1, explode_factor=10.0)
    layer = torch.nn.Linear(3, 1)
    layer.weight.grad = torch.full_like(layer.weight, math.inf)  # an overflow of fp16
    guard._ids, guard._losses = [(1,)], [torch.tensor(5.0)]
    guard.on_before_optimizer_step(Scaled(), NestModule.__new__(NestModule), torch.optim.AdamW(layer.parameters()))  # type: ignore[arg-type]
    guard.settle(Scaled())  # type: ignore[arg-type]
    assert guard.bad_steps == 0
    assert guard._usual == [5.0]
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nest.max_bad_steps=0", "nest.max_bad_steps: 0 must be from 1 to 100"),
        ("nest.max_bad_steps=ten", "nest.max_bad_steps: 'ten' is not of type int or null"),
        ("nest.explode_factor=1", "nest.explode_factor: 1.0 must be above 1"),
        ("nest.collapse_lines=0", "nest.collapse_lines: 0 must be from 1 to"),
        ("nest.stop_at_collapse=true", "unknown key nest.stop_at_collapse. Did you mean nest.stop_on_collapse?"),
    ],
)
def test_settings_that_make_no_sense(corpus: dict[str, Path], tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pretraining(corpus, tmp_path, override)
    assert message in str(raised.value)
