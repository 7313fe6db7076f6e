"""The input of every section: configuration, options, a temporary folder, a progress callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nestcli.bench.corpus import make_bench_corpus
from nestcli.bench.peer import nemo_version
from nestcli.config import resolved
from nestcli.errors import MissingDependencyError
from nestcli.training.settings import accelerator, check_compiler

Told = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Options of a call beyond the configuration.

    `rounds` and `seconds` (per side and round) are None for the section's default; `memory` is in bytes, None for a
    share of the device's free memory; `lines` are the manifest lengths of section `scale`; `audio_seconds` the batch
    sizes of section `precisions`.
    """

    nemo_python: str | None = None
    rounds: int | None = None
    seconds: float | None = None
    lines: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    buckets: int = 30
    memory: int | None = None
    audio_seconds: tuple[float, ...] = ()

    def changed(self, **values: Any) -> Options:
        return replace(self, **values)


@dataclass
class BenchContext:
    """The configuration, the options, a temporary folder, and `tell`, which reports the current step."""

    config: DictConfig
    options: Options
    folder: Path
    tell: Told
    _made: tuple[Path, Path] | None = None
    _nemo: str | None = None

    @property
    def has_manifest(self) -> bool:
        block = self.config.model.train_ds
        return not OmegaConf.is_missing(block, "manifest_filepath") and block.manifest_filepath is not None

    @property
    def nemo(self) -> str | None:
        """Version of the NeMo to compare with, None without --nemo-python. Raises NestError if it does not work."""
        if self._nemo is None and self.options.nemo_python is not None:
            self.tell("starting NeMo")
            self._nemo = nemo_version(self.options.nemo_python)
        return self._nemo

    def check_nemo(self) -> None:
        """Raise NestError before any measurement if the named NeMo does not work."""
        _ = self.nemo

    def made(self) -> tuple[Path, Path]:
        """Return manifests of synthetic speech-like sounds and of noise, made on first use."""
        if self._made is None:
            self.tell("making synthetic audio")
            self._made = make_bench_corpus(self.folder / "corpus")
        return self._made

    @property
    def device(self) -> str:
        """The device of the configuration's trainer: cuda or cpu."""
        return "cuda" if accelerator(self.config) == "gpu" else "cpu"

    def why_not_compiled(self) -> str | None:
        """Return why `nest pretrain` would refuse compiled layers on this machine; None if it takes them."""
        config = OmegaConf.merge(self.config, {"model": {"encoder": {"compile": True}}})
        assert isinstance(config, DictConfig)
        try:
            check_compiler(config)
        except MissingDependencyError as error:
            return str(error)
        return None

    def loader_config(self, **train_ds: Any) -> DictConfig:
        """Return the configuration with one loader process, no validation, and synthetic audio if it has no data."""
        changes: dict[str, Any] = {"num_workers": 1, **train_ds}
        if not self.has_manifest and "manifest_filepath" not in changes:
            speech, noise = self.made()
            changes |= {"manifest_filepath": str(speech), "noise_manifest": str(noise)}
        config = OmegaConf.merge(
            self.config, {"model": {"train_ds": changes, "validation_ds": {"manifest_filepath": None}}}
        )
        assert isinstance(config, DictConfig)
        return config


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, for JSON requests to our processes."""
    return resolved(config)
