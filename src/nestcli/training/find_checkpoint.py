"""Find the checkpoint that a run resumes from: the newest one that is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from nestcli.checkpoint.digest import DamagedError, verify
from nestcli.checkpoint.lightning import load_lightning_checkpoint
from nestcli.checkpoint.weights import checked_tensors
from nestcli.checks import check_plain
from nestcli.config import leaves, resolved
from nestcli.errors import CheckpointError, ConfigError
from nestcli.model.module import CONFIG_KEY
from nestcli.training.checkpoints import step_in_name
from nestcli.training.config_changes import MAY_CHANGE, Changes

DAMAGED = ".damaged"  # suffix of a damaged checkpoint that is set aside
_STATE = ("optimizer_states", "lr_schedulers", "loops")  # needed to resume, besides the weights


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint newer than the one to resume from, and why the run cannot resume from it."""

    path: Path
    reason: str
    damaged: bool  # False: it is whole, but of another kind


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run resumes from (None: a new run), and the optimiser steps that it has made."""

    path: Path | None = None
    step: int = 0
    skipped: tuple[SkippedCheckpoint, ...] = ()
    former: Mapping[str, Any] | None = field(default=None, compare=False)  # the configuration in the checkpoint

    def announce(self, note: Callable[[str], None]) -> None:
        """Report the skipped checkpoints without renaming them."""
        for skipped in self.skipped:
            note(f"{self._about(skipped)}{' It will be set aside.' if skipped.damaged else ''}")

    def set_aside(self, note: Callable[[str], None]) -> None:
        """Rename the damaged checkpoints so that nothing reads them again; delete nothing."""
        for skipped in self.skipped:
            kept = f" It is kept as {_renamed(skipped.path).name}." if skipped.damaged else ""
            note(f"{self._about(skipped)}{kept}")

    def _about(self, skipped: SkippedCheckpoint) -> str:
        assert self.path is not None
        what = "is damaged" if skipped.damaged else "is not used"
        return (
            f"The checkpoint {skipped.path.name} {what}: {skipped.reason}. "
            f"The run resumes from {self.path.name}, step {self.step:,}."
        )


def find_resume(folder: Path, config: DictConfig, model: nn.Module) -> Resume:
    """Find the newest whole checkpoint in a run's folder, by optimiser steps, as exp_manager allows; change nothing.

    Raises ConfigError if the run has a different model, CheckpointError if training cannot resume from any checkpoint.
    """
    manager, checkpoints = config.exp_manager, folder / "checkpoints"
    there = [*checkpoints.glob("*.ckpt"), *checkpoints.glob(f"*.ckpt{DAMAGED}*")]
    if not manager.resume_if_exists:
        if there:
            raise ConfigError(
                f"{folder} already contains a run, and exp_manager.resume_if_exists is false. A new run would "
                "overwrite it. Set another exp_manager.name, or exp_manager.resume_if_exists=true to resume it."
            )
        return Resume()
    if there:
        return _newest_whole(checkpoints, config, model)
    if not manager.resume_ignore_no_checkpoint:
        raise ConfigError(
            f"exp_manager.resume_if_exists: {checkpoints} contains no checkpoint. "
            "Set exp_manager.resume_ignore_no_checkpoint=true to start from the beginning."
        )
    return Resume()


def _newest_whole(checkpoints: Path, config: DictConfig, model: nn.Module) -> Resume:
    skipped: list[SkippedCheckpoint] = []
    for path in newest_first(checkpoints):
        try:
            verify(path)
            content = load_lightning_checkpoint(path, mmap=True)
        except DamagedError as error:
            skipped.append(SkippedCheckpoint(path, error.reason, damaged=True))
        except FileNotFoundError:  # another process of this run has just set it aside
            continue
        except PermissionError:
            raise CheckpointError(
                f"{path} cannot be read: permission denied. Change its permissions: chmod u+r FILE."
            ) from None
        except CheckpointError:
            skipped.append(
                SkippedCheckpoint(
                    path, "it holds other data than tensors and plain values, or no weights", damaged=False
                )
            )
        else:
            if all(key in content for key in _STATE) and isinstance(content.get("global_step"), int):
                step, former = int(content["global_step"]), _former(content)
                _check_model(content, former, config, model, checkpoints.parent)
                Changes.of(former, config, step).check(path)
                return Resume(path, step, tuple(skipped), former)
            skipped.append(SkippedCheckpoint(path, "it holds weights without the state of training", damaged=False))
    found = " ".join(f"{each.path.name}: {each.reason}." for each in skipped)
    raise CheckpointError(
        f"training cannot resume from any checkpoint in {checkpoints}. {found or 'Only damaged ones are left.'} Copy "
        "an undamaged one there. To start from the beginning, move that folder away or set another exp_manager.name "
        "(to start from weights that you have: init_from_ptl_ckpt=FILE)."
    )


def newest_first(checkpoints: Path) -> Iterator[Path]:
    """Yield the checkpoints of a folder, most optimiser steps first; for equal steps `-last` first, then the newest."""
    keyed = []
    for path in checkpoints.glob("*.ckpt"):
        try:
            keyed.append((_step(path), path.name.endswith("-last.ckpt"), path.stat().st_mtime_ns, path))
        except FileNotFoundError:
            continue
    yield from (path for *_, path in sorted(keyed, reverse=True))


def _step(path: Path) -> float:
    """Return the steps from the name, else from the content; infinity for an unreadable file, to examine it first."""
    step = step_in_name(path)
    if step is not None:
        return step
    try:
        verify(path)
        return int(load_lightning_checkpoint(path, mmap=True)["global_step"])
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return float("inf")


def _renamed(path: Path) -> Path:
    target, number = path.with_name(f"{path.name}{DAMAGED}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{DAMAGED}-{number}")
    try:
        path.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be renamed to {target.name}: {error.strerror}. Move it away yourself."
        ) from None
    return target


def _check_model(
    content: Mapping[str, Any], former: Mapping[str, Any] | None, config: DictConfig, model: nn.Module, folder: Path
) -> None:
    """Raise ConfigError if a checkpoint's weights belong to a different model."""
    ours, stored = model.state_dict(), checked_tensors(content["state_dict"], str(folder))
    for name in [*ours, *stored]:
        shapes = [tuple(state[name].shape) if name in state else None for state in (ours, stored)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"the run in {folder} has a different model: {_first_change(former, config) or name}. "
                "Set another exp_manager.name for this one."
            )


def _former(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the configuration in a checkpoint; None if nest did not write it."""
    former = content.get(CONFIG_KEY)
    if not isinstance(former, Mapping):
        return None
    try:
        check_plain(former, "")
    except ConfigError:
        return None
    return former


def _first_change(former: Mapping[str, Any] | None, config: DictConfig) -> str | None:
    """Return the first setting of the model that differs from the checkpoint's."""
    if former is None:
        return None
    stored = dict(leaves(former.get("model", {})))
    for key, value in leaves(resolved(config)["model"]):
        block, _, name = f"model.{key}".rpartition(".")
        of_model = key.startswith(("preprocessor.", "encoder.", "quantizer.", "decoder.", "masking.", "mask_position"))
        if of_model and name not in MAY_CHANGE.get(block, ()) and stored.get(key) != value:
            return f"model.{key} is {stored.get(key)} there and {value} here"
    return None
