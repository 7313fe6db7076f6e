"""Section `loader`: seconds of audio per second from the training loader, compared with NeMo's and with the floor."""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from nestcli.bench.context import BenchContext, plain
from nestcli.bench.material import Material, read_material
from nestcli.bench.peer import Peer, nemo_peer, our_peer
from nestcli.bench.report import SectionReport, Spread
from nestcli.bench.stages import STAGES
from nestcli.data.manifest import Manifest
from nestcli.targets import nemo_target

ROUNDS, SECONDS = 5, 5.0
_QUEUE = 3  # batches that exist before a round starts: two in the loader process's queue, and its current one
_LEAST = 4  # minimum batches in a round
_SETTLING = 60.0  # maximum s until a loader process has filled its queue
_NEMO_EPOCH = 50_000.0  # s of audio: NeMo's loader restarts its process in every epoch
_WARMED = 20_000  # manifest lines whose files are read beforehand
_OURS_ALONE = ("nemo_exact",)  # augmentation keys that only nest has

Facts = dict[str, Any]


class _Side:
    """One way to load the audio, in a separate process."""

    def __init__(self, name: str, peer: Peer, operation: str, **parameters: Any) -> None:
        self.name, self.peer, self.operation, self.parameters = name, peer, operation, parameters
        self.rounds: list[Facts] = []

    def measure(self) -> None:
        self.rounds.append(self.peer.ask(self.operation, **self.parameters))
        if self.operation == "round":
            self.peer.ask("settle", seconds=_SETTLING)

    def speeds(self) -> list[float]:
        """Return the seconds of audio per second of each round."""
        return [facts["audio_seconds"] / facts["seconds"] for facts in self.rounds]

    def per_processor_second(self) -> float:
        """Return the seconds of audio per second of CPU time over all rounds. Other programs do not affect it."""
        busy: float = sum(facts["processor_seconds"] for facts in self.rounds)
        audio: float = sum(facts["audio_seconds"] for facts in self.rounds)
        return audio / max(busy, 1e-6)

    def times(self, other: _Side) -> float:
        """Return the speed relative to another side: the median of the ratios of all rounds."""
        return statistics.median(ours / theirs for ours, theirs in zip(self.speeds(), other.speeds(), strict=True))

    def stages(self) -> dict[str, float]:
        """Return the microseconds of each stage per second of audio, over all rounds."""
        audio = sum(facts["audio_seconds"] for facts in self.rounds)
        names = {name: None for facts in self.rounds for name in facts["stages"]}
        return {name: 1e6 * sum(facts["stages"].get(name, 0.0) for facts in self.rounds) / audio for name in names}

    def peak(self) -> int:
        """Return the peak memory in bytes of the process plus its loader process. Shared pages count twice."""
        facts = self.peer.ask("memory")
        return sum(process["peak"] for process in [facts["main"], *facts["workers"]])


def loader_section(context: BenchContext) -> SectionReport:
    """Measure in turn our loader, the floor, our dataset without a loader process, and NeMo's loader."""
    config = context.loader_config()
    material = read_material(config)
    context.tell("loader: reading every file once, to fill the disk cache")
    _warm(material)
    rounds = context.options.rounds or ROUNDS
    with ExitStack() as stack:
        sides = _opened(context, config, material, stack)
        for number in range(rounds):
            context.tell(f"loader: round {number + 1} of {rounds}")
            for side in sides.values() if number % 2 == 0 else reversed(sides.values()):
                side.measure()
        return _reported(sides, material, context)


def _opened(context: BenchContext, config: DictConfig, material: Material, stack: ExitStack) -> dict[str, _Side]:
    """Start the sides: each has opened its files and delivered its first batches."""
    seconds = context.options.seconds or SECONDS
    counted = {"seconds": seconds, "skip": _QUEUE, "least": _LEAST}
    ours, inline, floor = (stack.enter_context(our_peer()) for _ in range(3))
    ours.ask("open_loader", config=plain(config), device=context.device)
    inline.ask("open_loader", config=plain(context.loader_config(num_workers=0)), device=context.device)
    floor.ask("open_floor", config=plain(config))
    sides = [
        _Side("ours", ours, "round", **counted),
        _Side("floor", floor, "floor_round", seconds=seconds),
        _Side("inline", inline, "staged_round", **{**counted, "skip": 0}),
    ]
    if context.nemo is not None and context.options.nemo_python is not None:
        context.tell("loader: opening NeMo's loader")
        theirs = stack.enter_context(nemo_peer(context.options.nemo_python))
        block = nemo_block(config, float(material.speech.durations.sum()))
        theirs.ask("open_loader", train_ds=block, device=context.device)
        sides.append(_Side("nemo", theirs, "round", **counted))
    for side in sides:
        if side.operation == "round":
            side.peer.ask("settle", seconds=_SETTLING)
        side.measure()
        side.rounds.clear()  # discard the warm-up round
    return {side.name: side for side in sides}


def nemo_block(config: DictConfig, seconds: float | None = None) -> Facts:
    """Return `model.train_ds` for NeMo. With `seconds` of audio, repeat the manifest until an epoch is long enough."""
    block: Facts = plain(config)["model"]["train_ds"]
    if block["batch_augmentor"] is None:
        del block["batch_augmentor"]
    else:
        augmentor = {key: value for key, value in block["batch_augmentor"].items() if key not in _OURS_ALONE}
        block["batch_augmentor"] = {**augmentor, "_target_": nemo_target(augmentor["_target_"])}
    if seconds and not block.get("is_tarred") and not block.get("use_lhotse"):
        paths = block["manifest_filepath"]
        repeats = max(1, min(100, math.ceil(_NEMO_EPOCH / seconds)))
        block["manifest_filepath"] = ",".join(([paths] if isinstance(paths, str) else list(paths)) * repeats)
    return block


def _warm(material: Material) -> None:
    for manifest in [material.speech, *([material.noise] if material.noise else [])]:
        for path in _files(manifest):
            with Path(path).open("rb") as file:
                while file.read(1 << 20):
                    pass


def _files(manifest: Manifest) -> list[str]:
    lines = np.linspace(0, len(manifest) - 1, min(len(manifest), _WARMED)).astype(int)
    return list(dict.fromkeys(manifest.entry(int(line)).audio_filepath for line in lines))


def _by_processor(sides: dict[str, _Side]) -> dict[str, float | None]:
    found: dict[str, Any] = {
        name: sides[name].per_processor_second() for name in ("ours", "floor", "nemo") if name in sides
    }
    ratio = found["ours"] / found["nemo"] if "nemo" in found else None
    return dict(found, ratio=ratio, share_of_floor=found["ours"] / found["floor"])


def _reported(sides: dict[str, _Side], material: Material, context: BenchContext) -> SectionReport:
    ours, floor, inline = (Spread.of(sides[name].speeds()) for name in ("ours", "floor", "inline"))
    nemo = sides.get("nemo")
    stages = sides["inline"].stages()
    ordered = {name: stages[name] for name in STAGES if name in stages}
    return SectionReport(
        name="loader",
        unit="seconds of audio a second",
        ours=ours,
        nemo=None if nemo is None else Spread.of(nemo.speeds()),
        ratio=None if nemo is None else sides["ours"].times(nemo),
        memory=sides["ours"].peak(),
        nemo_memory=None if nemo is None else nemo.peak(),
        extra={
            "nemo_version": context.nemo,
            "device": context.device,
            "floor": {**floor.to_json(), "share": sides["ours"].times(sides["floor"])},
            "without_loader_process": inline.to_json(),
            "per_processor_second": _by_processor(sides),
            "microseconds_per_second_of_audio": {
                "ours": {**ordered, "loader process": 1e6 / ours.median - 1e6 / inline.median},
                "ours_total": 1e6 / ours.median,
                "floor": sides["floor"].stages(),
                "floor_total": 1e6 / floor.median,
            },
            "data": {
                "utterances": len(material.speech),
                "mean_seconds": float(material.speech.durations.mean()),
                "noise_clips": len(material.noise) if material.noise else 0,
            },
        },
    )
