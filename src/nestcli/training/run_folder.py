"""A run's folder: its path, whether another run uses it, and the space on its disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from nestcli.checkpoint.atomic import UnwrittenError
from nestcli.errors import ConfigError, DataError, NestError, RunFailedError
from nestcli.files import refuse_links, user_path
from nestcli.training.checkpoints import LAST_KEPT, NestCheckpoint

DEFAULT_EXP_DIR = "nest_experiments"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS}
_REMEDY = "Training has stopped. Make room on that disk, or repair it."


def check_folder(folder: Path) -> None:
    """Raise ConfigError if the folder, which need not exist yet, cannot be written or links to another place."""
    for name in ("checkpoints", "tensorboard"):
        refuse_links(folder / name, ConfigError)
    for wanted in (folder, folder / "checkpoints"):
        existing = _existing(wanted)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"the experiment's folder {wanted} is not writable. Set exp_manager.exp_dir to another.")


def check_space(folder: Path, checkpoints: NestCheckpoint | None, model: nn.Module) -> None:
    """Raise ConfigError if the disk lacks the space for the checkpoints that are still to be written."""
    if checkpoints is None:
        return
    needed, free = needed_bytes(folder, checkpoints, model), shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise ConfigError(
            f"{folder}: the checkpoints need {_size(needed)}, and {_size(free)} are free on that disk. Make room, "
            "set exp_manager.exp_dir to a folder on another one, or lower "
            "exp_manager.checkpoint_callback_params.save_top_k."
        )


def needed_bytes(folder: Path, checkpoints: NestCheckpoint, model: nn.Module) -> int:
    """Return the bytes that all kept checkpoints and the one being written need, less those of existing ones.

    A checkpoint holds the weights and AdamW's two moments of the trained ones.
    """
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    trained = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    one: int = weights + (0 if checkpoints.save_weights_only else 2 * trained)
    kept: int = max(checkpoints.save_top_k, 0) + (
        LAST_KEPT if checkpoints.save_last else 0
    )  # -1 keeps all, which has no bound: count the others
    there = sum(path.stat().st_size for path in (folder / "checkpoints").glob("*.ckpt"))
    return max(kept * one - there, 0) + one + (2 * weights if checkpoints.nemo else 0)


@contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """Turn errors of a full or broken disk into RunFailedError that names the file and the remedy."""
    try:
        yield
    except Exception as error:
        found = _write_failure(error, folder)
        if found is None:
            raise
        raise RunFailedError(
            f"{found} Then give the same command again: the run resumes from the newest checkpoint."
        ) from error


def _write_failure(error: BaseException | None, folder: Path) -> str | None:
    """Describe the failed write behind an error; loggers, for example, raise errors of their own on a full disk."""
    found = None
    while error is not None:
        if isinstance(error, DataError):  # raised while reading
            return None
        if isinstance(error, UnwrittenError) or (type(error) is NestError and _of_the_disk(error.__context__)):
            return f"{error} {_REMEDY}"
        if isinstance(error, OSError) and _of_the_disk(error):
            if error.errno == errno.EIO and not _is_below(error.filename, folder):
                return None  # raised while reading
            found = f"{error.filename or f'a file in {folder}'} cannot be written: {error.strerror}. {_REMEDY}"
        error = error.__cause__ or error.__context__
    return found


def _is_below(path: object, folder: Path) -> bool:
    """Return True if an error's path lies in the folder, or if the error has no path."""
    return path is None or Path(os.fsdecode(str(path))).absolute().is_relative_to(folder.absolute())


def _of_the_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def experiment_folder(config: DictConfig) -> Path:
    """Return exp_manager's folder: exp_dir/name without a version, as in a NeMo run that may resume."""
    manager = config.exp_manager
    name = str(manager.name)
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ConfigError(
            f"exp_manager.name: {name[:100]!r} leads outside exp_manager.exp_dir. Give a relative name without `..`."
        )
    return Path(user_path(str(manager.exp_dir or DEFAULT_EXP_DIR))) / name


def checkpoint_names(folder: Path) -> frozenset[str]:
    """Return the file names of a run's checkpoints."""
    return frozenset(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


def in_use(folder: Path) -> ConfigError:
    """Return the error for a folder that another run uses."""
    return ConfigError(
        f"another run of nest is training in {folder}. Wait for it or stop it, then give the same command again; or "
        "set another exp_manager.name."
    )


def make_folder(folder: Path) -> None:
    """Create a run's folder. Raises ConfigError if it cannot be created or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the experiment's folder {folder} cannot be created: {error.strerror}. Set exp_manager.exp_dir to another."
        ) from None
    check_folder(folder)
