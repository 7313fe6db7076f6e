"""Section `precisions`: speed, memory and utilization of training steps over precisions and batch sizes.

It runs unattended on a GPU: every row is a separate process, and a process that fails becomes a row with the error.
It also runs on CPUs, where it is slow.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nestcli.bench.context import BenchContext, plain
from nestcli.bench.peer import our_peer
from nestcli.bench.report import SectionReport, Spread
from nestcli.errors import RunFailedError
from nestcli.model.cost import peak_of

CLIP_SECONDS = 20.0
AUDIO_SECONDS = (160.0, 320.0, 640.0, 1280.0)  # per batch
# Rows by name: the keys of `nest pretrain` that choose them. How fp32 is multiplied is a choice on GPUs alone.
PRECISIONS: dict[str, dict[str, str]] = {
    "32": {"trainer.precision": "32", "nest.matmul_precision": "highest"},
    "tf32": {"trainer.precision": "32", "nest.matmul_precision": "high"},
    "bf16-mixed": {"trainer.precision": "bf16-mixed"},
    "bf16-true": {"trainer.precision": "bf16-true"},
}
_ON_GPUS = ("tf32",)
_STEPS, _WARM_UP = 10, 4

Facts = dict[str, Any]


def precisions_section(context: BenchContext) -> SectionReport:
    """Measure every combination of precision, batch size, and plain or compiled layers, also when fed by the loader."""
    audio, not_compiled = context.options.audio_seconds or AUDIO_SECONDS, context.why_not_compiled()
    ways = [
        (precision, seconds, compiled)
        for precision in PRECISIONS
        if context.device == "cuda" or precision not in _ON_GPUS
        for seconds in audio
        for compiled in ((False, True) if not_compiled is None else (False,))
    ]  # fmt: skip
    rows = []
    for number, (precision, seconds, compiled) in enumerate(ways):
        name = f"{precision}, {seconds:g} s, {'compiled' if compiled else 'plain'}"
        context.tell(f"precisions: {number + 1} of {len(ways)}: {name}")
        rows.append(_row(context, precision, seconds, compiled))
    done = [row for row in rows if "error" not in row]
    if not done:
        raise RunFailedError(f"precisions: every step failed. The first error: {rows[0]['error']}")
    best = max(done, key=lambda row: row["audio_per_second"])
    return SectionReport(
        name="precisions",
        unit="seconds of audio a second",
        ours=Spread.of([best["audio_per_second"]]),
        nemo=None,
        ratio=None,
        memory=best["peak_memory_bytes"],
        extra={
            "device": best["device"],
            "clip_seconds": CLIP_SECONDS,
            "keys": {name: keys for name, keys in PRECISIONS.items() if any(row["precision"] == name for row in rows)},
            "not_compiled": not_compiled,
            "rows": rows,
        },
    )


def _row(context: BenchContext, precision: str, seconds: float, compiled: bool) -> Facts:
    """Measure one process: steps on a fixed batch, then steps fed by the loader."""
    row: Facts = {"precision": precision, "audio_seconds": seconds, "compiled": compiled}
    clips = max(1, round(seconds / CLIP_SECONDS))
    config = _config(context, precision, clips, compiled)
    clip_seconds = min(CLIP_SECONDS, seconds)
    files = {
        name: str(context.folder / f"{name}-{clips}-{clip_seconds:g}.safetensors") for name in ("weights", "batch")
    }
    drawn = {"clips": clips, "seconds": clip_seconds, "learning_rate": 1e-4}
    try:
        with ExitStack() as stack:
            peer = stack.enter_context(our_peer(one_thread=False))
            peer.ask("open_training", config=plain(config), device=context.device, **drawn, **files)
            peer.ask("step_round", steps=_WARM_UP, seed=0)
            steps = peer.ask("step_round", steps=context.options.rounds or _STEPS, seed=9)
            fed = peer.ask("fed_round", steps=context.options.rounds or _STEPS)
            account = peer.ask("profile_step")
    except RunFailedError as error:
        return {**row, "error": str(error).splitlines()[0][:300]}
    step = statistics.median(steps["seconds"])
    work = account["floating_point_operations"]
    sheet = peak_of(account["device"], precision, tf32=precision == "tf32")
    return {
        **row,
        **account,
        "step_seconds": step,
        "audio_per_second": clips * clip_seconds / step,
        "fed_audio_per_second": fed["audio_seconds"] / fed["seconds"],
        "utilisation_of_measured_product": work / step / account["device_operations_a_second"],
        "utilisation_of_data_sheet": work / step / sheet if sheet else None,
        "losses": steps["losses"],
    }


def _config(context: BenchContext, precision: str, clips: int, compiled: bool) -> DictConfig:
    config = OmegaConf.merge(
        context.loader_config(batch_size=clips, num_workers=8),
        {
            "model": {"encoder": {"compile": compiled}},
        },
    )
    assert isinstance(config, DictConfig)
    for key, value in PRECISIONS[precision].items():
        OmegaConf.update(config, key, value, force_add=True)
    return config
