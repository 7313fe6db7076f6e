"""The run of W&B that belongs to a run of ours: its id is kept in the folder, so that both go on together."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from nestcli.config import resolved
from nestcli.errors import ConfigError, MissingDependencyError
from nestcli.files import write_text

ID_FILE = "wandb_id.txt"
_ID = re.compile(r"[^\s/\\#?%:]{1,128}")  # what W&B takes


def wandb_options(config: DictConfig, folder: Path) -> dict[str, Any]:
    """`exp_manager.wandb_logger_kwargs` with the id that is kept in the folder, where the user names none."""
    options = dict(resolved(config)["exp_manager"].get("wandb_logger_kwargs") or {})
    if _own_id(options) is None and (kept := _kept(folder)):
        options["id"] = kept
    return options


def keep_id(config: DictConfig, folder: Path) -> None:
    """Keep the id of the coming run of W&B: the user's, that of the folder (but for `resume: never`), or a new one.

    Raises ConfigError for a file that holds no id, and NestError where the disk fails.
    """
    if not config.exp_manager.create_wandb_logger:
        return
    options = dict(resolved(config)["exp_manager"].get("wandb_logger_kwargs") or {})
    kept = None if options.get("resume") == "never" else _kept(folder)
    chosen = _own_id(options) or kept or secrets.token_hex(4)
    write_text(folder / ID_FILE, [f"{chosen}\n"])


def _own_id(options: dict[str, Any]) -> str | None:
    """The id that the user names, as Lightning or W&B reads it."""
    named = options.get("version") or options.get("id") or os.environ.get("WANDB_RUN_ID")
    return str(named) if named else None


def _kept(folder: Path) -> str | None:
    """The id in the folder; None without one."""
    path = folder / ID_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(1000).decode(errors="replace").strip()
    if not _ID.fullmatch(text):
        raise ConfigError(
            f"{path} holds no id of a W&B run. Remove it to begin a new run of W&B, or write the id there."
        )
    return text


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """TensorBoard and W&B, as exp_manager asks."""
    manager = config.exp_manager
    loggers: list[Logger] = []
    if manager.create_tensorboard_logger:
        loggers.append(TensorBoardLogger(save_dir=folder, name="", version="tensorboard"))
    if manager.create_wandb_logger:
        loggers.append(_wandb_logger(config, folder))
    return loggers


def _wandb_logger(config: DictConfig, folder: Path) -> Logger:
    from lightning.pytorch.loggers import WandbLogger

    try:
        return WandbLogger(**{"save_dir": folder, **wandb_options(config, folder)})
    except ModuleNotFoundError:
        raise MissingDependencyError(
            'exp_manager.create_wandb_logger: W&B is not installed. Run pip install "nestcli[wandb]", '
            "or set exp_manager.create_wandb_logger=false."
        ) from None
