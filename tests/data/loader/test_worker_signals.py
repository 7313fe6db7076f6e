"""How loader processes are started: forked on Linux, whatever Python does by default."""

import multiprocessing
import sys
from pathlib import Path

import pytest

from conftest import tiny_config
from nestcli.data.datamodule import NestDataModule
from nestcli.data.loader.signals import START_METHOD


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_loader_processes_are_forked_where_python_would_not(
    corpus: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        multiprocessing.context._default_context, "_actual_context", multiprocessing.get_context("spawn")
    )
    assert multiprocessing.get_start_method() == "spawn"  # as Python 3.14 has another default
    assert START_METHOD == "fork"
    data = NestDataModule(tiny_config(corpus, "model.train_ds.num_workers=1", "model.train_ds.shuffle=false"))
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    watch = loader.watch  # type: ignore[attr-defined]
    assert type(watch.processes[0]).__name__ == "ForkProcess"
    assert watch.notes.of(0).line >= 0  # what it reads is told
    watch.end()


def test_where_processes_are_not_forked_none_counts_as_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    from nestcli.data.loader.watched_workers import Watch, WatchedLoader

    monkeypatch.setattr("nestcli.data.loader.watched_workers.START_METHOD", "spawn")
    watch = Watch(1, "model.train_ds", 50.0)
    WatchedLoader([1, 2], watch=watch, num_workers=1)
    assert watch.timeout is None
