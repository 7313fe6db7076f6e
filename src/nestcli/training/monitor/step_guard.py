"""Skip the steps whose loss or gradient would spoil the model, count them and log them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from nestcli.data.dataset import NoiseBatch
from nestcli.errors import DataError, RunFailedError
from nestcli.model.health import total_norm
from nestcli.model.module import NestModule
from nestcli.training.lightning_internals import copy_tensors
from nestcli.training.monitor.jsonl import append_line, drop_lines_after
from nestcli.training.monitor.step_numbers import Arriving, StopRequest

_MEDIAN_OF = 100  # number of good steps whose median loss is the usual loss
_MEDIAN_FROM = 20  # minimum number of good steps before a loss can count as exploding
_WINDOW = 100  # number of latest steps in which `max_bad_steps` bad ones end the run
_FILES = 1000  # maximum number of file names in a line
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class StepGuard(Callback):
    """Skips the update of a step whose loss or gradient norm is NaN or infinite, or whose loss explodes.

    Weights, moments and batch-norm statistics stay unchanged; counters, schedule and data advance. Every bad step is a
    line of bad_batches.jsonl. `max_bad_steps` of them within 100 steps end the run (RunFailedError); None skips no
    step. A loss explodes if it exceeds `explode_factor` times the median of the last 100 good steps; None: never.
    Gradients that overflow under 16-mixed are left to the gradient scaler and not counted.

    The device decides, by the loss and the gradient norm, averaged over ranks. The host learns of it with `settle`: in
    the next step, when the numbers have long arrived, or earlier where a line or a checkpoint needs them. Only an
    optimiser that is not fused (16-mixed with clipping) makes it wait at once. `request` travels with these numbers.
    """

    def __init__(
        self,
        path: Path,
        note: Callable[[str], None],
        find: Callable[[int], dict[str, Any]],
        *,
        max_bad_steps: int | None,
        explode_factor: float | None,
        request: StopRequest | None = None,
    ) -> None:
        self.path, self.note, self.find = path, note, find
        self.max_bad_steps, self.explode_factor = max_bad_steps, explode_factor
        self.request = StopRequest() if request is None else request
        self.bad_steps = 0
        self.gradient_norm = torch.full((), math.nan)  # of the newest step, before clipping, on the device
        self._recent: list[int] = []  # bad steps among the last _WINDOW steps
        self._usual: list[float] = []  # losses of good steps
        self._statistics = _Statistics(nn.Module())  # the model's, from the start of training
        self._ids: list[tuple[int, ...]] = []  # line numbers of the utterances in this step's batches
        self._losses: list[Tensor] = []
        self._unsettled: _Step | None = None
        self._end: str | None = None  # the message of a run that must end

    # ---- Lightning's hooks ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            drop_lines_after(self.path, trainer.global_step)
        self._statistics = _Statistics(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: NoiseBatch, batch_idx: int
    ) -> None:
        if not self._ids and self.max_bad_steps is not None:
            self._statistics.keep()
        self._ids.append(batch.sample_ids)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses.append(cast(NestModule, pl_module).step_loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.settle(trainer)
        ids, losses, self._ids, self._losses = self._ids, torch.stack(self._losses).double(), [], []
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.gradient_norm = _gradient_norm(optimizer, scaler)
        if self.max_bad_steps is None and trainer.world_size == 1:
            return
        numbers = torch.cat([torch.stack([losses.mean(), self.gradient_norm.double()]), self.request.mark(losses)])
        numbers = cast(Tensor, trainer.strategy.reduce(numbers, reduce_op="mean"))
        limit, judges_norm = self._limit(), scaler is None
        if self.max_bad_steps is not None:
            bad = _is_bad(numbers[0], numbers[1], limit, judges_norm=judges_norm)
            _skip_update(optimizer, scaler, bad)
            self._statistics.put_back(bad)
        arriving = Arriving(torch.cat([numbers, losses]))
        self._unsettled = _Step(trainer.global_step + 1, ids, limit, judges_norm, arriving)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.settle(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the state with the newest step: Lightning has saved the one before it. It raises no error."""
        self._settle(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"bad_steps": self.bad_steps, "recent": list(self._recent), "usual": list(self._usual)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad_steps = state_dict["bad_steps"]
        self._recent, self._usual = list(state_dict["recent"]), list(state_dict["usual"])

    # ---- the decision: on the device, and its account on the host ----

    def settle(self, trainer: Trainer) -> None:
        """Take the newest step's numbers; all ranks must call this together. Raises RunFailedError to end the run."""
        self._settle(trainer)
        if self._end is not None:
            raise RunFailedError(self._end)

    def _settle(self, trainer: Trainer) -> None:
        if self._unsettled is None:
            return
        step, self._unsettled = self._unsettled, None
        loss, norm, *others = step.arriving.numbers()
        marks, losses = others[: StopRequest.MARKS], others[StopRequest.MARKS :]
        self.request.agree(marks)
        if self.max_bad_steps is None:
            return
        reason = self._reason(loss, norm, step)
        if reason is None:
            self._usual = [*self._usual, loss][-_MEDIAN_OF:] if loss != 0 else self._usual  # 0: no masked token
            return
        self._write_down(trainer, step.number, loss, norm, reason, [*zip(step.ids, losses, strict=True)])

    def _limit(self) -> float:
        """Return the loss above which the coming step is bad."""
        if self.explode_factor is None or len(self._usual) < _MEDIAN_FROM:
            return math.inf
        return self.explode_factor * statistics.median(self._usual)

    def _reason(self, loss: float, norm: float, step: _Step) -> str | None:
        """Return why the device skipped a step; None for a good one. The same comparisons as `_is_bad`."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if step.judges_norm and not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        if loss > step.limit:
            usual, factor = statistics.median(self._usual), self.explode_factor
            return f"the loss {loss:.4g} is more than {factor:g} times the usual {usual:.4g}"
        return None

    def _write_down(
        self,
        trainer: Trainer,
        step: int,
        loss: float,
        norm: float,
        reason: str,
        batches: list[tuple[tuple[int, ...], float]],
    ) -> None:
        self.bad_steps += 1
        self._recent = [*(earlier for earlier in self._recent if earlier > step - _WINDOW), step]
        of_all_ranks = _gathered(trainer, batches)
        if trainer.is_global_zero:
            row = {"step": step, "reason": reason, "loss": loss, "gradient_norm": norm}
            append_line(self.path, {**row, **self._offenders(of_all_ranks)})
        self.note(f"step {step} skipped: {reason}. Its batch is in {self.path.name}; {self.bad_steps} bad so far.")
        assert self.max_bad_steps is not None
        if len(self._recent) >= self.max_bad_steps:
            self._end = self._message(step, reason)

    def _offenders(self, batches: list[tuple[int, tuple[int, ...], float]]) -> dict[str, Any]:
        """Return the batches whose own loss is bad, or all batches of the step if none is."""
        usual = statistics.median(self._usual) if self._usual else math.inf
        factor = self.explode_factor or math.inf
        guilty = [batch for batch in batches if not math.isfinite(batch[2]) or batch[2] > factor * usual] or batches
        ids = [number for _, numbers, _ in guilty for number in numbers]
        return {
            "ids": ids,
            "files": [self._found(number) for number in ids[:_FILES]],
            "batches": [
                {"rank": rank, "loss": loss if math.isfinite(loss) else None, "ids": list(numbers)}
                for rank, numbers, loss in batches
            ],
        }

    def _found(self, number: int) -> dict[str, Any]:
        try:
            return self.find(number)
        except (DataError, OSError, ValueError, KeyError):  # the manifest has changed since
            return {"line": number}

    def _message(self, step: int, reason: str) -> str:
        bad, steps = len(self._recent), step - self._recent[0] + 1
        return (
            f"training stopped at step {step}: {bad} of the last {max(steps, bad)} steps were bad, the last because "
            f"{reason}. {self.path} names their batches: if the files are always the same, listen to them. "
            "Otherwise lower model.optim.lr or lengthen model.optim.sched.warmup_steps, set "
            "trainer.gradient_clip_val=1.0, or use trainer.precision=bf16-mixed instead of 16-mixed. "
            "nest.max_bad_steps and nest.explode_factor set the limits. The newest checkpoint predates these steps."
        )


@dataclass(frozen=True)
class _Step:
    """A step that the device has decided on, before the host knows."""

    number: int
    ids: list[tuple[int, ...]]
    limit: float  # of the loss
    judges_norm: bool
    arriving: Arriving  # loss, gradient norm, marks of the stop request, losses of this rank's batches


class _Statistics:
    """A copy of the batch-norm statistics, which a forward pass changes before its loss is known."""

    def __init__(self, module: nn.Module) -> None:
        live = [buffer for part in module.modules() if isinstance(part, _BATCH_NORMS) for buffer in part.buffers(False)]
        self._live = [[buffer for buffer in live if buffer.dtype == dtype] for dtype in {each.dtype for each in live}]
        self._kept: list[Tensor] = []  # for each type, the values of its buffers in one tensor

    def keep(self) -> None:
        self._kept = [_joined(buffers) for buffers in self._live]

    def put_back(self, bad: Tensor) -> None:
        """Restore the copy if `bad`, a boolean scalar on the device, is true."""
        for buffers, kept in zip(self._live, self._kept, strict=True):
            chosen = torch.where(bad, kept, _joined(buffers)).split_with_sizes([buffer.numel() for buffer in buffers])
            copy_tensors(buffers, [part.view_as(buffer) for part, buffer in zip(chosen, buffers, strict=True)])


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _is_bad(loss: Tensor, norm: Tensor, limit: float, *, judges_norm: bool) -> Tensor:
    good = loss.isfinite() & (loss <= limit)
    return ~(good & norm.isfinite() if judges_norm else good)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _unscales(optimizer: Optimizer) -> bool:
    """Return True if the optimiser unscales the gradients itself, so that they are still scaled here; fused ones do."""
    return bool(optimizer.defaults.get("fused"))


def _gradient_norm(optimizer: Optimizer, scaler: Any) -> Tensor:
    norm = total_norm(_gradients(optimizer))
    if scaler is not None and _unscales(optimizer):
        norm = norm / scaler.scale(torch.ones_like(norm))  # get_scale() would wait for the device
    return norm


def _skip_update(optimizer: Optimizer, scaler: Any, bad: Tensor) -> None:
    """Make the coming optimiser step change nothing if `bad`, a boolean scalar on the device, is true."""
    if not _unscales(optimizer):  # not fused: only the host can leave the step out; parameters without a gradient stay
        if bool(bad):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
    elif scaler is None:
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as a gradient scaler sets it for one step
    else:  # the scaler checks the gradients, and skips infinite ones
        for gradient in _gradients(optimizer)[:1]:
            gradient.masked_fill_(bad, math.inf)


def _gathered(
    trainer: Trainer, batches: list[tuple[tuple[int, ...], float]]
) -> list[tuple[int, tuple[int, ...], float]]:
    """Return the batches of all ranks, each with its rank."""
    own = [(trainer.global_rank, ids, loss) for ids, loss in batches]
    if trainer.world_size == 1:
        return own
    everyones: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyones, own)
    return [batch for batches_of_rank in everyones for batch in batches_of_rank]
