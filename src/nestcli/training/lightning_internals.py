"""Access to private parts of Lightning and PyTorch; training uses their private names only in this file.

Each private name has its reason here and a public name for the rest of the package. All were seen in torch 2.13.0,
lightning 2.6.6 and, but for the one marked, lightning 2.4.0 (which NeMo pins). pyproject.toml therefore caps both
packages below their next minor version; tests/training/test_lightning_internals.py names what a new version lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

# ---- the training loop ----


def is_step_complete(trainer: Trainer) -> bool:
    """Return True if the newest batch ends an optimiser step. A run's last batch always does: see `settings.Length`."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches == 0


def is_validation_due(trainer: Trainer, batches: int) -> bool:
    """Return True if validation follows after this number of training batches."""
    return bool(trainer.limit_val_batches) and batches % int(trainer.val_check_interval or 1) == 0


def count_step_for_loggers(loops: dict[str, Any]) -> None:
    """Add the step that a checkpoint ended with to the loops in it."""
    # _batches_that_stepped: the loggers' step axis. Lightning counts after the hook in which we save, or not at all.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def keep_signal_handlers(trainer: Trainer) -> None:
    """Keep Lightning from replacing our signal handlers."""
    # _signal_connector: no option of the trainer turns its handlers off.
    connector = trainer._signal_connector
    assert hasattr(connector, "register_signal_handlers")
    connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


# ---- optimisers and tensors ----


def set_last_rates(schedule: LRScheduler, rates: list[float | Tensor]) -> None:
    """Have a schedule report these learning rates, as if it had just computed them."""
    schedule._last_lr = rates  # what get_last_lr() returns; only step() sets it, which also counts


@torch.no_grad()
def copy_tensors(to: list[Tensor], source: list[Tensor]) -> None:
    """Copy tensors onto others of the same shapes and type."""
    torch._foreach_copy_(to, source)  # one kernel for all; the public copy_ takes one for each


# ---- checkpoints ----


class OpenModelCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with public names for the parts that nest overrides or calls.

    Lightning has hooks for when to save, and none for what is saved, kept and removed.
    """

    def write(self, trainer: Trainer, filepath: str) -> None:
        """Write one checkpoint."""
        super()._save_checkpoint(trainer, filepath)

    def write_best(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        """Write a checkpoint if the model is one of the best."""
        super()._save_topk_checkpoint(trainer, candidates)

    def write_last(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        """Write the newest checkpoint, if `save_last` asks for it."""
        super()._save_last_checkpoint(trainer, candidates)

    def is_removable(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Return True if the file `previous` may be removed now that `current` is written."""
        return bool(super()._should_remove_checkpoint(trainer, previous, current))

    def candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the values that the monitor and file names can use."""
        candidates: dict[str, Tensor] = super()._monitor_candidates(trainer)
        return candidates

    # Lightning calls these.

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.write(trainer, filepath)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.write_best(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.write_last(trainer, monitor_candidates)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return self.is_removable(trainer, previous, current)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        return self.candidates(trainer)

    # Lightning's state, which decides when to save.

    def saves_after_validation(self, trainer: Trainer) -> bool:
        """Return True if validation, not a number of steps, decides when to save."""
        return self._every_n_epochs >= 1 and not self._should_save_on_train_epoch_end(trainer)

    def is_due(self, trainer: Trainer) -> bool:
        """Return True if a checkpoint can be written now and has not been written at this step."""
        return not self._should_skip_saving_checkpoint(trainer)

    def take_deferred(self) -> bool:
        """Return True if Lightning has deferred a checkpoint until validation, and take over writing it."""
        # _defer_save_until_validation: only in 2.6, which forgets it if no validation follows.
        deferred = bool(getattr(self, "_defer_save_until_validation", False))
        if deferred:
            self._defer_save_until_validation = False
        return deferred

    @property
    def last_saved_step(self) -> int:
        """The step of the newest checkpoint."""
        return self._last_global_step_saved


# ---- processes ----


class OpenLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of this machine's processes, without its observer, which kills the main process too."""

    def start(self) -> None:
        """Start the other processes, if this process must do so."""
        # _call_children_scripts: repeats the command with the variables of each rank; launch() has no part to override.
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self.start()
        # _set_num_threads_if_needed: as in Lightning's launch(); sums over other numbers of threads round differently.
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


Launcher = TypeVar("Launcher", bound=OpenLauncher)


def replace_launcher(trainer: Trainer, kind: type[Launcher]) -> Launcher | None:
    """Have the trainer use a launcher of our own; None, and no change, if it starts no processes by command."""
    given = trainer.strategy.launcher
    if not isinstance(given, _SubprocessScriptLauncher):
        return None
    ours = kind(given.cluster_environment, given.num_processes, given.num_nodes)
    trainer.strategy._launcher = ours  # a strategy chooses its launcher itself; none can be passed in
    return ours
