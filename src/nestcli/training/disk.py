"""The disk that a run writes to: room at the start, one message where there is none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from nestcli.checkpoint.atomic import UnwrittenError
from nestcli.errors import ConfigError, DataError, NestError, RunFailedError
from nestcli.files import refuse_links
from nestcli.training.checkpoints import LAST_KEPT, NestCheckpoint

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS}
_REMEDY = "Training has stopped. Make room on that disk, or mend it."


def check_folder(folder: Path) -> None:
    """Raise ConfigError if a run could not write to its folder, which need not exist yet, or would write elsewhere."""
    for name in ("checkpoints", "tensorboard"):
        refuse_links(folder / name, ConfigError)
    for wanted in (folder, folder / "checkpoints"):
        existing = _existing(wanted)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(f"the experiment's folder {wanted} is not writable. Set exp_manager.exp_dir.")


def check_space(folder: Path, checkpoints: NestCheckpoint | None, model: nn.Module) -> None:
    """Raise ConfigError if the disk has less room than the checkpoints need beyond those that are there already."""
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
    """Room for all checkpoints that are kept and for the one that is being written, those that are there left out.

    A checkpoint holds the weights and AdamW's two moments of those that are trained.
    """
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    trained = sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    one: int = weights + (0 if checkpoints.save_weights_only else 2 * trained)
    kept: int = max(checkpoints.save_top_k, 0) + (
        LAST_KEPT if checkpoints.save_last else 0
    )  # -1 has no end: the others
    there = sum(path.stat().st_size for path in (folder / "checkpoints").glob("*.ckpt"))
    return max(kept * one - there, 0) + one + (2 * weights if checkpoints.nemo else 0)


@contextmanager
def disk_explained(folder: Path) -> Iterator[None]:
    """A disk that is full or broken is no bug: RunFailedError says which file could not be written, and what to do."""
    try:
        yield
    except Exception as error:
        found = _write_failure(error, folder)
        if found is None:
            raise
        raise RunFailedError(f"{found} The same command then goes on from the newest checkpoint.") from error


def _write_failure(error: BaseException | None, folder: Path) -> str | None:
    """What a write to the disk failed of; other errors may follow from it, those of loggers on a full disk say."""
    found = None
    while error is not None:
        if isinstance(error, DataError):  # of reading
            return None
        if isinstance(error, UnwrittenError) or (type(error) is NestError and _of_the_disk(error.__context__)):
            return f"{error} {_REMEDY}"
        if isinstance(error, OSError) and _of_the_disk(error):
            if error.errno == errno.EIO and not _is_below(error.filename, folder):
                return None  # of a file that is read
            found = f"{error.filename or f'a file in {folder}'} cannot be written: {error.strerror}. {_REMEDY}"
        error = error.__cause__ or error.__context__
    return found


def _is_below(path: object, folder: Path) -> bool:
    """Whether a path of an error is one of the folder's; an error that names none is taken for one."""
    return path is None or Path(os.fsdecode(str(path))).absolute().is_relative_to(folder.absolute())


def _of_the_disk(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_ERRORS


def _existing(folder: Path) -> Path:
    return next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
