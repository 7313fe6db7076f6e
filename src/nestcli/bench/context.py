"""What every section is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nestcli.bench.corpus import make_bench_corpus
from nestcli.bench.peer import nemo_version
from nestcli.config import resolved

Told = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a call asks for beside the configuration.

    `rounds` and `seconds` (of each side in a round) are None for a section's own; `memory` is in bytes, None for
    a share of what the device has; `lines` are the lengths of the manifests of the section `scale`; `audio_seconds`
    those of the batches of the section `precisions`.
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
    """The configuration, the options, a folder for files that go away afterwards, and `tell` for what is going on."""

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
        """The version of NeMo to measure beside us, if one is named. Raises NestError if it cannot be used."""
        if self._nemo is None and self.options.nemo_python is not None:
            self.tell("starting NeMo")
            self._nemo = nemo_version(self.options.nemo_python)
        return self._nemo

    def check_nemo(self) -> None:
        """Raise NestError before anything is measured, if a NeMo is named that cannot be used."""
        _ = self.nemo

    def made(self) -> tuple[Path, Path]:
        """Manifests of speech-like sounds and of noise, made on first use."""
        if self._made is None:
            self.tell("making sounds to measure on")
            self._made = make_bench_corpus(self.folder / "corpus")
        return self._made

    def loader_config(self, **train_ds: Any) -> DictConfig:
        """The configuration for one loader process without validation, on made sounds where it names no manifest."""
        changes: dict[str, Any] = {"num_workers": 1, "pin_memory": False, **train_ds}
        if not self.has_manifest and "manifest_filepath" not in changes:
            speech, noise = self.made()
            changes |= {"manifest_filepath": str(speech), "noise_manifest": str(noise)}
        config = OmegaConf.merge(
            self.config, {"model": {"train_ds": changes, "validation_ds": {"manifest_filepath": None}}}
        )
        assert isinstance(config, DictConfig)
        return config


def plain(config: DictConfig) -> dict[str, Any]:
    """A configuration as it travels to a process of ours."""
    return resolved(config)
