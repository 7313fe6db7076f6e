"""Sections `train_step` and `quantizer`: the same step from the same weights, in nest and in NeMo."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nestcli.bench.context import BenchContext, plain
from nestcli.bench.peer import Peer, nemo_peer, our_peer
from nestcli.bench.report import SectionReport, Spread
from nestcli.config import resolved
from nestcli.errors import RunFailedError
from nestcli.parity.subject import nemo_model_block
from nestcli.training.settings import NestBlock

ROUNDS, STEPS, TIMES = 5, 2, 5
CLIPS, SECONDS = 4, 16.0
MEMORY_CLIPS, MEMORY_SECONDS = 8, 20.0  # the batch for the comparison of memory
_WARM_UP = 2  # steps
_RATE = 1e-4  # learning rate, small enough for losses to stay comparable
# Maximum relative difference of losses. On a processor in fp32 the two draw the same random numbers, and only rounding
# differs. A GPU draws others, and mixed precision rounds far more.
_SAME_DRAWS, _OTHER_DRAWS = 1e-4, 0.05
# Maximum share of tokens that differ. NeMo compares codes by products in fp32, and a GPU rounds near ties otherwise.
_TOKENS_DIFFER = {"cpu": 0.0, "cuda": 0.1}
# NeMo's precision for ours. Lightning's own bf16-true would convert NeMo's waveforms and codebooks, so mixed it is.
_OF_NEMO = {
    "32": "32", "32-true": "32", "16": "16-mixed", "16-mixed": "16-mixed", "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed", "bf16-true": "bf16-mixed",
}  # fmt: skip

Facts = dict[str, Any]


@dataclass(frozen=True)
class _Way:
    """One way to train: plain, compiled, or NeMo."""

    name: str
    config: DictConfig
    nemo: bool = False


def train_step_section(context: BenchContext) -> SectionReport:
    """Measure steps in turn on one device: plain, compiled, and NeMo's; then the memory of each, a profile of ours."""
    ways = _ways(context)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    losses: dict[str, list[float]] = {way.name: [] for way in ways}
    with ExitStack() as stack:
        peers = {way.name: _opened(context, way, stack, CLIPS, SECONDS) for way in ways}
        for name, peer in peers.items():
            context.tell(f"train_step: {name}, the first steps")
            peer.ask("step_round", steps=_WARM_UP, seed=0)
        rounds = context.options.rounds or ROUNDS
        for number in range(rounds):
            context.tell(f"train_step: round {number + 1} of {rounds}")
            for name, peer in peers.items() if number % 2 == 0 else reversed(peers.items()):
                facts = peer.ask("step_round", steps=STEPS, seed=100 + number * STEPS)
                seconds[name].append(min(facts["seconds"]))
                losses[name] += facts["losses"]
        accounts = {way.name: peers[way.name].ask("profile_step") for way in ways if not way.nemo}
    memory = {way.name: _memory(context, way, "step_round") for way in ways}
    return _step_report(context, seconds, losses, accounts, memory)


def quantizer_section(context: BenchContext) -> SectionReport:
    """Measure in turn the time to compute tokens of the same features; then the additional memory."""
    ways = [way for way in _ways(context) if way.name != "compiled"]
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    tokens: dict[str, list[int]] = {}
    with ExitStack() as stack:
        peers = {way.name: _opened(context, way, stack, CLIPS, SECONDS) for way in ways}
        for number in range(1 + (context.options.rounds or ROUNDS)):
            context.tell(f"quantizer: round {number}")
            for name, peer in peers.items():
                facts = peer.ask("quantizer_round", times=TIMES)
                tokens[name] = facts["tokens"]
                if number:  # the first one warms up
                    seconds[name].append(min(facts["seconds"]))
    memory = {way.name: _memory(context, way, "quantizer_round") for way in ways}
    ours, nemo = Spread.of(seconds["plain"]), Spread.of(seconds["nemo"]) if "nemo" in seconds else None
    differ = _differing(tokens["plain"], tokens["nemo"]) if nemo is not None else None
    if differ is not None and differ > _TOKENS_DIFFER[context.device]:
        raise RunFailedError(
            f"quantizer: {differ:.1%} of the tokens differ from NeMo's. nest compare --only quantizer shows where."
        )
    return SectionReport(
        name="quantizer",
        unit=f"seconds for {CLIPS} clips of {SECONDS:g} s",
        ours=ours,
        nemo=nemo,
        ratio=_times(seconds, "plain"),
        memory=memory["plain"]["peak"] - memory["plain"]["before"],
        nemo_memory=memory["nemo"]["peak"] - memory["nemo"]["before"] if "nemo" in memory else None,
        extra={**_conditions(context), "tokens_that_differ": differ},
    )


def _ways(context: BenchContext) -> list[_Way]:
    def changed(**encoder: Any) -> DictConfig:
        config = OmegaConf.merge(context.config, {"model": {"encoder": encoder}})
        assert isinstance(config, DictConfig)
        return config

    ways = [_Way("plain", changed(compile=False, dropout_draws="torch"))]
    if context.why_not_compiled() is None:
        ways.append(_Way("compiled", changed(compile=True)))
    return [*ways, _Way("nemo", context.config, nemo=True)] if context.nemo is not None else ways


def _opened(context: BenchContext, way: _Way, stack: ExitStack, clips: int, seconds: float) -> Peer:
    files = {
        "weights": str(context.folder / "weights.safetensors"),
        "batch": str(context.folder / f"batch-{clips}-{seconds:g}.safetensors"),
    }
    context.tell(f"building the model: {way.name}")
    if way.nemo:
        assert context.options.nemo_python is not None
        peer = stack.enter_context(nemo_peer(context.options.nemo_python, one_thread=False))
        optim = {**resolved(way.config)["model"]["optim"], "lr": _RATE}
        rounding = {
            "precision": _OF_NEMO[str(way.config.trainer.precision)],
            "matmul_precision": NestBlock.of(way.config).matmul_precision,
        }
        model = nemo_model_block(way.config)
        peer.ask("open_training", model=model, optim=optim, device=context.device, **rounding, **files)
        return peer
    peer = stack.enter_context(our_peer(one_thread=False))
    drawn = {"clips": clips, "seconds": seconds, "learning_rate": _RATE}
    peer.ask("open_training", config=plain(way.config), device=context.device, **drawn, **files)
    return peer


def _memory(context: BenchContext, way: _Way, operation: str) -> Facts:
    """Measure a new process with the batch for the comparison of memory: its memory before and its peak, in bytes.

    It is the memory of the device that the process uses: PyTorch's on the GPU, or the whole process's.
    """
    with ExitStack() as stack:
        peer = _opened(context, way, stack, MEMORY_CLIPS, MEMORY_SECONDS)
        context.tell(f"memory: {way.name}")
        return peer.ask("peak_of", measured=operation, steps=_WARM_UP, seed=0, times=1)


def _times(seconds: dict[str, list[float]], ours: str) -> float | None:
    """Return the speed relative to NeMo: the median of the ratios of all rounds."""
    if "nemo" not in seconds:
        return None
    return statistics.median(nemo / our for our, nemo in zip(seconds[ours], seconds["nemo"], strict=True))


def _step_report(
    context: BenchContext,
    seconds: dict[str, list[float]],
    losses: dict[str, list[float]],
    accounts: dict[str, Facts],
    memory: dict[str, Facts],
) -> SectionReport:
    worst = None
    if "nemo" in losses:
        worst = max(abs(our / nemo - 1) for our, nemo in zip(losses["plain"], losses["nemo"], strict=True))
        in_fp32 = _OF_NEMO[str(context.config.trainer.precision)] == "32"
        if not worst <= (_SAME_DRAWS if in_fp32 and context.device == "cpu" else _OTHER_DRAWS):
            raise RunFailedError(
                f"train_step: the losses differ from NeMo's by {worst:.1e} (relative). nest compare shows where."
            )
    ways = {
        name: {
            "seconds": Spread.of(seconds[name]).to_json(),
            "ratio": _times(seconds, name),
            "share_of_matrix_product_limit": _share(account, seconds[name]),
            **account,
            "peak_memory_bytes": memory[name]["peak"],
        }
        for name, account in accounts.items()
    }
    best = "compiled" if "compiled" in ways else "plain"
    return SectionReport(
        name="train_step",
        unit=f"seconds a step, {CLIPS} clips of {SECONDS:g} s",
        ours=Spread.of(seconds[best]),
        nemo=Spread.of(seconds["nemo"]) if "nemo" in seconds else None,
        ratio=_times(seconds, best),
        memory=memory[best]["peak"],
        nemo_memory=memory["nemo"]["peak"] if "nemo" in memory else None,
        extra={
            **_conditions(context),
            "precision": str(context.config.trainer.precision),
            "nemo_precision": _OF_NEMO[str(context.config.trainer.precision)] if "nemo" in losses else None,
            "losses_differ_by": worst,
            "not_compiled": context.why_not_compiled(),
            "ways": ways,
        },
    )


def _conditions(context: BenchContext) -> Facts:
    """Return the device and the batch for the comparison of memory."""
    return {
        "nemo_version": context.nemo,
        "device": context.device,
        "memory_clips": MEMORY_CLIPS,
        "memory_clip_seconds": MEMORY_SECONDS,
    }


def _differing(ours: list[int], theirs: list[int]) -> float:
    """Return the share of tokens that differ."""
    return sum(our != their for our, their in zip(ours, theirs, strict=True)) / max(1, len(ours))


def _share(account: Facts, seconds: list[float]) -> float:
    """Return the step's speed as a share of the device's speed in large matrix products."""
    limit: float = account["floating_point_operations"] / account["device_operations_a_second"]
    return limit / statistics.median(seconds)
