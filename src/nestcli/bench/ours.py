"""Our side of a measurement: the process that answers the requests of `peer.py`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nestcli.bench import side
from nestcli.errors import NestError

if TYPE_CHECKING:
    from nestcli.data.datamodule import NestDataModule

Facts = dict[str, Any]
_ENDLESS = 10**9  # batches


def open_loader(parameters: Facts) -> Facts:
    """Open the training loader of `config` and fetch its first batch; return the seconds of each part.

    With `consumed` batches, it is the loader of a resumed run, from the `state` in its checkpoint. With `device`, it
    delivers batches there, as it does in training.
    """
    start = time.perf_counter()
    import torch

    import nestcli.data.datamodule  # noqa: F401  # its time counts as imports

    torch.set_num_threads(1)
    imported = time.perf_counter()
    data, batches_per_epoch = _data(parameters)
    data.device = torch.device(parameters.get("device") or "cpu")
    loader = data.train_dataloader()
    built = time.perf_counter()
    side.STATE["batches"] = side.endless(loader, _seconds_of(data.sample_rate, data.device))
    next(side.STATE["batches"])
    return {
        "imports": imported - start,
        "manifest": built - imported,
        "first_batch": time.perf_counter() - built,
        "batches_per_epoch": batches_per_epoch,
    }


def state_at(parameters: Facts) -> Facts:
    """Return the loader state that a run's checkpoint would contain after `consumed` batches."""
    data, _ = _data(parameters)
    data.train_dataloader()
    return {"state": data.state_dict()}


def _data(parameters: Facts) -> tuple[NestDataModule, int]:
    """Return the data module of an endless run after `consumed` batches, and the batches per epoch."""
    from omegaconf import DictConfig

    from nestcli.data.datamodule import NestDataModule

    class Standing(NestDataModule):
        def _consumed(self) -> int:
            return int(parameters.get("consumed", 0))

    data = Standing(DictConfig(parameters["config"]))
    data.load_state_dict(parameters.get("state", {}))
    batches_per_epoch = len(data.train_dataloader())
    data.batches = _ENDLESS
    return data, batches_per_epoch


def _seconds_of(sample_rate: int, device: Any) -> Any:
    def seconds(batch: Any) -> float:
        if isinstance(batch, NestError):
            raise batch
        return int(batch.to(device).audio_len.sum()) / sample_rate  # the number arrives behind the copies

    return seconds


def staged_round(parameters: Facts) -> Facts:
    """Measure a round and the time of each stage."""
    from nestcli.bench.stages import StageClock

    with StageClock() as clock:
        facts = side.timed_round(parameters)
    return {**facts, "stages": clock.seconds}


def open_floor(parameters: Facts) -> Facts:
    """Choose the floor's reads: the utterances of `config` in random order, each with an equally long noise excerpt."""
    from nestcli.bench.floor import chosen_reads

    side.STATE["reads"] = chosen_reads(parameters["config"])
    return {"reads": len(side.STATE["reads"])}


def floor_round(parameters: Facts) -> Facts:
    from nestcli.bench.floor import read_and_mix

    return read_and_mix(side.STATE["reads"], parameters["seconds"])


def open_step(parameters: Facts) -> Facts:
    """Build the training step of `config` on `device`, within `memory` bytes; null means a share of the free memory."""
    from omegaconf import DictConfig

    from nestcli.bench.trial import TrainingStep, default_memory

    memory = parameters["memory"] or default_memory(parameters["device"])
    side.STATE["step"] = TrainingStep(DictConfig(parameters["config"]), parameters["device"], memory)
    return {"memory": memory}


def try_step(parameters: Facts) -> Facts:
    facts: Facts = side.STATE["step"].attempt(parameters["batch"], parameters["seconds"])
    return facts


def open_training(parameters: Facts) -> Facts:
    """Build the model, its optimizer and a batch from the files `weights` and `batch`; draw and write missing ones."""
    from nestcli.bench.stepping import Stepper

    stepper = Stepper(parameters)
    side.STATE.update(step=stepper.step, features=stepper.batch["features"], tokens=stepper.tokens, stepper=stepper)
    side.STATE["device"] = parameters["device"]
    return stepper.facts()


def fed_round(parameters: Facts) -> Facts:
    facts: Facts = side.STATE["stepper"].fed(parameters["steps"])
    return facts


def profile_step(_parameters: Facts) -> Facts:
    facts: Facts = side.STATE["stepper"].profile()
    return facts


OPERATIONS = {
    **side.TIMING,
    "open_loader": open_loader,
    "state_at": state_at,
    "staged_round": staged_round,
    "open_floor": open_floor,
    "floor_round": floor_round,
    "open_step": open_step,
    "try_step": try_step,
    "open_training": open_training,
    "fed_round": fed_round,
    "profile_step": profile_step,
}


def serve() -> None:
    """Answer requests until there are no more."""
    side.converse(OPERATIONS, (NestError,))
