"""Loggers: TensorBoard, W&B with an id that is kept in the run's folder, and the warnings that Lightning logs."""

from __future__ import annotations

import logging
import os
import re
import secrets
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig

from nestcli.config import resolved
from nestcli.errors import ConfigError, MissingDependencyError
from nestcli.files import write_text

ID_FILE = "wandb_id.txt"
_ID = re.compile(r"[^\s/\\#?%:]{1,128}")  # what W&B accepts


def wandb_options(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Return `exp_manager.wandb_logger_kwargs`, with the id that is kept in the folder unless the user names one."""
    options = dict(resolved(config)["exp_manager"].get("wandb_logger_kwargs") or {})
    if _own_id(options) is None and (kept := _kept(folder)):
        options["id"] = kept
    return options


def keep_wandb_id(config: DictConfig, folder: Path) -> None:
    """Write the W&B run's id to the folder: the user's, the folder's (unless `resume: never`), or a new one.

    Raises ConfigError if the folder's file holds no valid id, and NestError if the disk fails.
    """
    if not config.exp_manager.create_wandb_logger:
        return
    options = dict(resolved(config)["exp_manager"].get("wandb_logger_kwargs") or {})
    kept = None if options.get("resume") == "never" else _kept(folder)
    chosen = _own_id(options) or kept or secrets.token_hex(4)
    write_text(folder / ID_FILE, [f"{chosen}\n"])


def _own_id(options: dict[str, Any]) -> str | None:
    """Return the id that the user names in the configuration or the environment."""
    named = options.get("version") or options.get("id") or os.environ.get("WANDB_RUN_ID")
    return str(named) if named else None


def _kept(folder: Path) -> str | None:
    """Return the id in the folder; None if there is none."""
    path = folder / ID_FILE
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(1000).decode(errors="replace").strip()
    if not _ID.fullmatch(text):
        raise ConfigError(
            f"{path} does not hold the id of a W&B run. Remove it to start a new W&B run, or write the id to it."
        )
    return text


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """Return the loggers that exp_manager configures: TensorBoard, W&B."""
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


def silence_expected_warnings() -> None:
    """Silence Lightning's warnings about loaders, samplers and loggers that nest sets up on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*dataloader is not resumable.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # config_changes reports it
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*defined a `validation_step` but have no `val_dataloader`.*",
        ".*Trying to infer the `batch_size`.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning itself uses what PyTorch has deprecated
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated.*")
