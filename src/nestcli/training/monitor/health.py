"""Health of a run: sums kept on the device and read once for each logged line; detection of collapse and plateau.

Axes: G codebooks, C codes; the leading 2 is targets and predictions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from nestcli.data.dataset import NoiseBatch
from nestcli.model.health import count_codes, dead_codes, effective_rank, perplexity, total_norm, unigram_baseline
from nestcli.model.module import NestModule
from nestcli.training.lightning_internals import is_step_complete
from nestcli.training.monitor.step_guard import StepGuard

# Thresholds of a collapse. Measured examples: docs/health.md
_FEW_CODES = 0.01  # ratio of (perplexity - 1) of the predictions to that of the targets
_FLAT_RANK = 1.5  # effective rank
_NO_BETTER = 0.98  # ratio of the loss to the unigram baseline's, in a run with one of the signs above
_LONG = 2.0  # after this many warm-ups, a loss above the baseline is a sign by itself
_KEYS = ("train_loss", "unigram_loss", "predicted_perplexity", "target_perplexity", "effective_rank")
_ADVICE = (
    "Lower model.optim.lr or lengthen model.optim.sched.warmup_steps, set trainer.gradient_clip_val=1.0, and start "
    "again under another exp_manager.name, or from an earlier checkpoint (init_from_ptl_ckpt). See docs/health.md."
)
# Thresholds of a plateau. Runs that learn are 3% to 11% below the baseline by step 1,000: docs/health.md
_PLATEAU_FROM, _PLATEAU_LINES = 1000, 20  # steps; logged lines
_ON_BASELINE = 0.01  # distance of the loss to the unigram baseline's, as a share of the latter
_TOKENS_A_CODE = 10  # perplexity and dead codes cover this many tokens for each code of a codebook
_TARGETS, _PREDICTIONS = 0, 1


class CodeCounts:
    """Counts of each code as a target and as a prediction: since the last line, recently, and in the whole run.

    Recently means the last 10 to 20 tokens for each code, or all if there are fewer. Everything is on the device and
    summed over ranks, except `local`: the counts that this rank has not shared yet.
    """

    def __init__(self, n_books: int, n_codes: int) -> None:
        self.enough = _TOKENS_A_CODE * n_codes
        self.local = torch.zeros(2, n_books, n_codes, dtype=torch.int64)
        self.window, self.newer, self.older = (torch.zeros_like(self.local) for _ in range(3))
        self.seen = torch.zeros_like(self.local[0])  # targets before the window

    def to(self, device: torch.device) -> None:
        for name, tensor in self._tensors().items():
            setattr(self, name, tensor.to(device))

    def add(self, tokens_NG: Tensor, predicted_NG: Tensor) -> None:
        count_codes(self.local[_TARGETS], tokens_NG)
        count_codes(self.local[_PREDICTIONS], predicted_NG)

    def share(self, trainer: Trainer) -> None:
        """Sum the counts of all ranks, which must call this together."""
        self.window = self.window + _summed(trainer, self.local)
        self.local.zero_()

    def measures(self) -> dict[str, Tensor]:
        recent = self.older + self.newer + self.window
        loss, accuracy = unigram_baseline(self.seen, self.window[_TARGETS])
        tokens = recent[_TARGETS].sum(1).min()
        unknown = tokens < self.enough  # too early to call a code dead
        return {
            "unigram_loss": loss,
            "unigram_accuracy": accuracy,
            "target_perplexity": perplexity(recent[_TARGETS]),
            "predicted_perplexity": perplexity(recent[_PREDICTIONS]),
            "target_dead_codes": dead_codes(recent[_TARGETS]).masked_fill(unknown, torch.nan),
            "predicted_dead_codes": dead_codes(recent[_PREDICTIONS]).masked_fill(unknown, torch.nan),
            "recent_tokens": tokens,
        }

    def close(self) -> None:
        """Start a new window."""
        self.seen = self.seen + self.window[_TARGETS]
        newer = self.newer + self.window
        full = newer[_TARGETS].sum(1).min() >= self.enough
        self.older = torch.where(full, newer, self.older)
        self.newer = newer.masked_fill(full, 0)
        self.window = torch.zeros_like(self.window)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu().clone() for name, tensor in self._tensors().items() if name != "local"}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.local.device).clone())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass
class _Step:
    """An optimiser step, or the part of it so far; everything is on the device."""

    loss: Tensor  # sum over micro-batches
    correct: Tensor
    selected: Tensor
    encoded_BSM: Tensor  # of the newest micro-batch
    frames_B: Tensor
    batches: int = 1

    @classmethod
    def of(cls, loss: Tensor, outputs: Mapping[str, Tensor]) -> _Step:
        correct, selected, encoded, frames = (
            outputs[key] for key in ("correct", "selected", "encoded_BSM", "frames_B")
        )
        return cls(loss, correct, selected, encoded, frames)

    def __add__(self, later: _Step) -> _Step:
        return _Step(
            self.loss + later.loss,
            self.correct + later.correct,
            self.selected + later.selected,
            later.encoded_BSM,
            later.frames_B,
            self.batches + later.batches,
        )


class DataWaitClock(PassThroughProfiler):
    """Counts the seconds that training waits for its loader, as a profiler that Lightning calls around each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._since = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next") and self._since:
            self.seconds += time.monotonic() - self._since
            self._since = 0.0


class HealthMonitor(Callback):
    """Updates sums on the device with every batch, and reads all of them at once when a line is written.

    `read` closes the window of the counts. Checkpoints hold integers, summed over ranks, so that a resumed run gives
    the same numbers.
    """

    def __init__(self, guard: StepGuard, *, n_books: int, n_codes: int) -> None:
        self.guard = guard
        self.codes = CodeCounts(n_books, n_codes)
        self._validation = CodeCounts(n_books, n_codes)  # only `local` and `window` are used
        self._local, self._window = (torch.zeros(4, dtype=torch.int64) for _ in range(2))  # the four sums of `_sizes`
        self._open: _Step | None = None
        self._last: _Step | None = None  # whole, not yet read

    @property
    def unread(self) -> bool:
        """Return True if a step has ended since the last reading."""
        return self._last is not None

    # ---- Lightning's hooks ----

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        self.codes.to(device)
        self._validation.to(device)
        self._local, self._window = self._local.to(device), self._window.to(device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: NoiseBatch, batch_idx: int
    ) -> None:
        module = cast(NestModule, pl_module)
        self.codes.add(outputs["tokens_NG"], outputs["predicted_NG"])
        self._local += _sizes(module, outputs, batch)
        step = _Step.of(module.step_loss, outputs)
        self._open = step if self._open is None else self._open + step
        if is_step_complete(trainer):
            self._last, self._open = self._open, None

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: NoiseBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if batch.counts:
            self._validation.add(outputs["tokens_NG"], outputs["tokens_NG"])

    def state_dict(self) -> dict[str, Any]:
        return {"codes": self.codes.state_dict(), "window": self._window.cpu().clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.codes.load_state_dict(state_dict["codes"])
        self._window = state_dict["window"].to(self._window.device).clone()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the sums over all ranks: Lightning has saved the state of this rank alone."""
        self._share(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    # ---- reading ----

    def glance(self) -> tuple[float, float]:
        """Return the loss and accuracy of the newest step on this rank."""
        assert self._last is not None
        step = self._last
        loss, correct, selected = torch.stack([step.loss / step.batches, step.correct, step.selected]).tolist()
        return loss, correct / max(1.0, selected)

    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Return every measure of the newest step and of the window that ends with it; `samples` is the window's.

        All ranks must call this together. Only this method waits for the device.
        """
        assert self._last is not None
        step, self._last = self._last, None
        self._share(trainer)
        names, tensors = zip(*self._measures(trainer, pl_module, step).items(), strict=True)
        self.codes.close()
        self._window = torch.zeros_like(self._window)
        values = dict(zip(names, torch.stack([tensor.double() for tensor in tensors]).tolist(), strict=True))
        correct, selected = values.pop("correct"), values.pop("selected")
        return {"masked_accuracy": correct / max(1.0, selected), **values}

    def read_validation(self, trainer: Trainer) -> dict[str, float]:
        """Return the unigram baseline of the validation data, with the frequencies of the training targets so far."""
        self._validation.share(trainer)
        seen_GC = self.codes.seen + self.codes.window[_TARGETS]
        loss, accuracy = torch.stack(unigram_baseline(seen_GC, self._validation.window[_TARGETS])).tolist()
        self._validation.window.zero_()
        return {"val_unigram_loss": loss, "val_unigram_accuracy": accuracy}

    def _measures(self, trainer: Trainer, pl_module: LightningModule, step: _Step) -> dict[str, Tensor]:
        rank = effective_rank(step.encoded_BSM, step.frames_B)
        own = torch.stack([value.double() for value in (step.loss / step.batches, step.correct, step.selected, rank)])
        loss, correct, selected, rank = _summed(trainer, own)
        samples, room, masked, frames = self._window
        return {
            "train_loss": loss / trainer.world_size,
            "correct": correct,
            "selected": selected,
            **self.codes.measures(),
            "effective_rank": rank / trainer.world_size,
            "gradient_norm": self.guard.gradient_norm,
            "parameter_norm": total_norm([each for each in pl_module.parameters() if each.requires_grad]),
            "masked_share": masked / frames,
            "padding_share": 1 - samples / room,
            "samples": samples,
        }

    def _share(self, trainer: Trainer) -> None:
        self.codes.share(trainer)
        self._window = self._window + _summed(trainer, self._local)
        self._local.zero_()


def _sizes(module: NestModule, outputs: Mapping[str, Tensor], batch: NoiseBatch) -> Tensor:
    """Return samples of audio, samples including padding, masked frames, and frames that can be masked."""
    if module.model.mask_after_subsampling:
        frames = outputs["frames_B"].sum()
    else:
        frames = (batch.noisy_audio_len // module.model.preprocessor.config.hop_length).sum()
    room = torch.full_like(frames, batch.audio.numel())
    return torch.stack([batch.audio_len.sum(), room, outputs["mask_BT"].sum(), frames])


def _summed(trainer: Trainer, own: Tensor) -> Tensor:
    """Return the sum over ranks; the input stays unchanged."""
    return cast(Tensor, trainer.strategy.reduce(own.clone(), reduce_op="sum"))


class CollapseDetector:
    """Examines the logged lines after the warm-up; `patience` consecutive lines with signs make a collapse."""

    def __init__(self, patience: int, warmup_steps: int, n_codes: int) -> None:
        self.patience, self.warmup_steps, self.n_codes = patience, warmup_steps, n_codes
        self.collapsed = False
        self._lines: list[dict[str, float]] = []

    def update(self, step: int, line: Mapping[str, Any]) -> str | None:
        """Add a logged line. Return a message if the run has collapsed or recovered since the line before."""
        values = {key: float(line[key]) for key in _KEYS}
        if step <= self.warmup_steps or not all(map(math.isfinite, values.values())):
            return None  # a skipped step says nothing about the run
        self._lines = [*self._lines, {"step": float(step), **values}][-self.patience :]
        signs = self._signs() if len(self._lines) == self.patience else []
        was, self.collapsed = self.collapsed, bool(signs)
        if self.collapsed and not was:
            return (
                f"step {step}: the run has collapsed: {'; '.join(signs)}, for {self.patience} logged lines. {_ADVICE}"
            )
        return f"step {step}: the run has recovered from its collapse." if was and not self.collapsed else None

    def state_dict(self) -> dict[str, Any]:
        return {"collapsed": self.collapsed, "lines": [dict(line) for line in self._lines]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.collapsed, self._lines = bool(state["collapsed"]), [dict(line) for line in state["lines"]]

    def _signs(self) -> list[str]:
        mean = {key: sum(line[key] for line in self._lines) / len(self._lines) for key in _KEYS}
        loss = f"loss {mean['train_loss']:.3f}, guessing by frequency gives {mean['unigram_loss']:.3f}"
        codes = (
            f"predictions spread over {mean['predicted_perplexity']:.1f} of {self.n_codes} codes, "
            f"targets over {mean['target_perplexity']:.1f}"
        )
        rank = f"the encoder's output has an effective rank of {mean['effective_rank']:.2f}"
        few = self._always(lambda line: line["predicted_perplexity"] - 1 < _FEW_CODES * (line["target_perplexity"] - 1))
        flat = self._always(lambda line: line["effective_rank"] < _FLAT_RANK)
        ratio = mean["train_loss"] / mean["unigram_loss"] if mean["unigram_loss"] > 0 else 0.0
        if (few or flat) and ratio > _NO_BETTER:
            return [*([codes] if few else []), *([rank] if flat else []), loss]
        late = self._lines[0]["step"] > _LONG * self.warmup_steps
        return [f"{loss}, long after the warm-up", codes, rank] if late and ratio > 1 else []

    def _always(self, sign: Callable[[dict[str, float]], bool]) -> bool:
        return all(sign(line) for line in self._lines)


class PlateauDetector:
    """Reports once if the loss stays at the unigram baseline: the model has learned frequencies and no more.

    Compares the means of the last 20 logged lines, all of them later than step 1,000 and than the warm-up. `changes`
    are those that help such a run.
    """

    def __init__(self, warmup_steps: int, changes: Sequence[str] = ()) -> None:
        self.starts_after, self.changes = max(warmup_steps, _PLATEAU_FROM), changes
        self._reported = False
        self._lines: list[tuple[float, float]] = []  # training and unigram loss

    def update(self, step: int, line: Mapping[str, Any]) -> str | None:
        """Add a logged line. Return the message if the run is on the plateau and has not been told."""
        losses = float(line["train_loss"]), float(line["unigram_loss"])
        if self._reported or step <= self.starts_after or not all(map(math.isfinite, losses)):
            return None
        self._lines = [*self._lines, losses][-_PLATEAU_LINES:]
        if len(self._lines) < _PLATEAU_LINES:
            return None
        loss, unigram = (sum(each) / _PLATEAU_LINES for each in zip(*self._lines, strict=True))
        if abs(loss - unigram) > _ON_BASELINE * unigram:
            return None
        self._reported = True
        return (
            f"step {step}: the loss stays at that of guessing by frequency ({loss:.3f}, guessing gives {unigram:.3f}, "
            f"means of {_PLATEAU_LINES} logged lines): start again under another exp_manager.name with "
            f"{', '.join([*self.changes, 'half of model.optim.lr'])}."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"reported": self._reported, "lines": [list(line) for line in self._lines]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reported = bool(state["reported"])
        self._lines = [(float(loss), float(unigram)) for loss, unigram in state["lines"]]
