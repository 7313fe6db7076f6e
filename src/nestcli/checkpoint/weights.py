"""Weights from untrusted files: check them before loading, and fit them to the model before use.

docs/decisions/0005 explains what is refused and why.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import IO, Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from nestcli.checkpoint.digest import UNREADABLE, stored_digest
from nestcli.checkpoint.pickled import check_pickle
from nestcli.checks import short
from nestcli.errors import CheckpointError, ConfigError
from nestcli.model.count import skeleton
from nestcli.model.nest import NestModel

MAX_ENTRIES = 20_000  # maximum entries of a zip of weights; the largest preset has 1,700
MAX_PICKLE = 16 << 20  # bytes of the table of tensors; the largest preset has 260,000, 1,000,000 with its optimiser
_ENTRY = re.compile(
    r"[^/]+/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+)"
)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)


def model_skeleton(config: DictConfig, source: str) -> NestModel:
    """Build the model that a checkpoint's configuration describes, without allocating memory for its weights.

    Raises CheckpointError for implausible sizes, and for blocks that do not fit each other.
    """
    try:
        return skeleton(config)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    except (RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: its configuration is not a valid model: {_first_line(error)}") from None


def fitted_state(state: Mapping[str, Tensor], config: DictConfig, source: str) -> OrderedDict[str, Tensor]:
    """Return the weights in the model's order and types; check every name and shape. Raises CheckpointError."""
    wanted = model_skeleton(config, source).state_dict()
    _check_names(state, wanted, source)
    return OrderedDict((name, fitted_tensor(name, state[name], like, source)) for name, like in wanted.items())


def checked_state(state: Mapping[str, Tensor], config: DictConfig, source: str) -> dict[str, Tensor]:
    """Return `fitted_state` of weights from a file; check also that every value is finite. Raises CheckpointError."""
    fitted = fitted_state(state, config, source)
    check_finite(fitted, source)
    return dict(fitted)


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for the first tensor that holds NaN or infinity."""
    for name, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values: the training that wrote it failed.")


def fitted_tensor(name: str, value: Tensor, like: Tensor, source: str) -> Tensor:
    """Return `value` with the type of `like`. Raises CheckpointError, which names it, for another shape or kind."""
    if value.shape != like.shape:
        raise CheckpointError(
            f"{source}: {name} has the shape {list(value.shape)}, the model's has {list(like.shape)}. "
            "The weights belong to another configuration."
        )
    if value.is_floating_point() != like.is_floating_point():
        raise CheckpointError(f"{source}: {name} is of type {value.dtype}, the model's is of type {like.dtype}.")
    return value.detach().to(like.dtype)


def _check_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    for names, what in (
        ([name for name in wanted if name not in state], "lacks"),
        ([name for name in state if name not in wanted], "holds, and the model lacks,"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source} {what} {names[0]}{more}: its weights belong to another configuration.")


def load_weights(file: IO[bytes], size: int, source: str) -> dict[str, Tensor]:
    """Read a state dict of `size` bytes that `torch.save` wrote. Raises CheckpointError.

    Every size in the file is checked against the file's size before memory is allocated; nothing in it is executed.
    """
    check_zip(file, size, source)
    try:
        file.seek(0)
        content = loaded(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: the weights cannot be read: {_first_line(error)}. Refused.") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source}: the weights are not a table of tensors but a {type(content).__name__}.")
    return checked_tensors(content, source)


def loaded(file: Any, *, mmap: bool = False) -> Any:
    """Read tensors and plain data that `torch.save` wrote. Raises OSError, and ValueError for any kind of damage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the checks of the content refuse what these warnings are about
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # damaged opcodes pass arbitrary arguments: TypeError, AssertionError, ...
        raise ValueError(_first_line(error)) from None


def checked_tensors(content: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """Return the entries of a state dict after a check that all are plain tensors in memory. Raises CheckpointError."""
    for name, value in content.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not plain or value.dtype not in _DTYPES:
            raise CheckpointError(f"{source}: {short(name)} among the weights is not an ordinary tensor. Refused.")
    return dict(content)


def check_zip(file: IO[bytes], size: int, source: str, also: Collection[str] = ()) -> None:
    """Refuse everything that `torch.save` does not write: other formats, entries, compression, overlaps, callables.

    `also` are names that the pickle may hold in addition to those of a state dict. Raises CheckpointError.
    """
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(
            f"{source}: the weights are not in PyTorch's zip format. Refused: older formats can run code. "
            "Load them where you trust them, and save them again with PyTorch 1.6 or later."
        )
    try:
        stored_digest(file, size)  # rules out a second directory, which some readers would find and others would not
    except ValueError:
        raise CheckpointError(
            f"{source}: the weights cannot be read: they are cut off, or more data follows their end."
        ) from None
    try:
        with zipfile.ZipFile(file) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about escapes in a damaged pickle
            _check_entries(archive.infolist(), size, source)
            [table] = [entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
            if table.CRC == 0:  # PyTorch can be configured not to compute it
                del table.CRC
            check_pickle(archive.read(table), source, also)
    except UNREADABLE as error:
        raise CheckpointError(f"{source}: the weights cannot be read: {_first_line(error)}. Refused.") from None


def _check_entries(entries: list[zipfile.ZipInfo], size: int, source: str) -> None:
    names = [entry.filename for entry in entries]
    odd = [e.filename for e in entries if not _ENTRY.fullmatch(e.filename) or e.compress_type or e.flag_bits & 1]
    if odd or len(set(names)) < len(names) or len(names) > MAX_ENTRIES:
        where = f": {odd[0][:100]!r}" if odd else ""
        raise CheckpointError(f"{source}: the weights hold entries that `torch.save` does not write{where}. Refused.")
    if sum(entry.file_size for entry in entries) > size or any(e.file_size != e.compress_size for e in entries):
        raise CheckpointError(f"{source}: the weights claim more bytes than the file has. Refused.")
    tables = [entry.file_size for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(tables) != 1 or tables[0] > MAX_PICKLE:
        raise CheckpointError(
            f"{source}: the weights must have one table of tensors (data.pkl) of at most {MAX_PICKLE:,} bytes. Refused."
        )


def _first_line(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's message explains how to run the code anyway
        return "they hold more than tensors and plain data"
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
