"""The child process for trials that may crash or hang: `python child.py` runs them one after another.

A request is a line of JSON on stdin, its answer one on stdout. This file is self-contained: a trial imports only the
package that it tests, so that a broken package breaks that trial only. `trials.py` is the parent's side.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRECISIONS = ("32", "bf16-mixed", "bf16-true", "16-mixed")
_FORMATS = {  # the formats that the README promises, at a rate that every codec supports
    "wav": ("WAV", "PCM_16", 16_000),
    "flac": ("FLAC", "PCM_16", 16_000),
    "mp3": ("MP3", "MPEG_LAYER_III", 16_000),
    "ogg": ("OGG", "VORBIS", 16_000),
    "opus": ("OGG", "OPUS", 16_000),
    "sph": ("NIST", "PCM_16", 16_000),
    "aiff": ("AIFF", "PCM_16", 16_000),
}


def _import(name: str) -> dict[str, Any]:
    module = importlib.import_module(name)
    return {"file": getattr(module, "__file__", None)}


def _presets(_: str) -> dict[str, Any]:
    from nestcli.config import PRESETS, config_dir, load_config

    for preset in PRESETS:
        load_config(preset)
    return {"folder": str(config_dir()), "presets": list(PRESETS)}


def _torch(_: str) -> dict[str, Any]:
    """Find out PyTorch's build and the devices that it can use."""
    import torch
    from torch import distributed

    facts: dict[str, Any] = {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
        "gpus": [],
        "cuda_error": "",
    }
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]  # torch gives it no types
            facts["gpus"] = [_gpu(number) for number in range(torch.cuda.device_count())]
        except (RuntimeError, AssertionError) as error:
            facts["cuda_error"] = _first_line(error)
    return facts


def _gpu(number: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(number)
    return {
        "name": torch.cuda.get_device_name(number),
        "free": free,
        "total": total,
        "capability": list(torch.cuda.get_device_capability(number)),
        "bf16": torch.cuda.get_device_capability(number) >= (8, 0) or bool(torch.version.hip),
    }


def _precision(device: str) -> dict[str, Any]:
    """Try an optimizer step in each trainer.precision; each failure is a reason, or empty if the step works."""
    failures = {}
    for name in PRECISIONS:
        try:
            failures[name] = _step(name, device)
        except Exception as error:
            failures[name] = _first_line(error)
    return {"failures": failures}


def _step(precision: str, device: str) -> str:
    """Train a linear layer for one step; return the error in the result, or an empty string."""
    import torch

    low = torch.float16 if precision == "16-mixed" else torch.bfloat16
    mixed = precision.endswith("mixed")
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, device=device, dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, enabled=precision == "16-mixed", init_scale=1024.0)
    before = layer.weight.detach().clone()
    with torch.autocast(device, dtype=low, enabled=mixed):
        product = layer(torch.randn(32, 64, device=device, dtype=layer.weight.dtype))
    expected = low if precision != "32" else torch.float32
    if product.dtype != expected:
        return f"the product is {product.dtype}"
    scaler.scale(product.float().square().mean()).backward()
    scaler.step(optimiser)
    scaler.update()
    if not torch.isfinite(layer.weight).all() or torch.equal(layer.weight, before):
        return "the optimizer's step did not change the weights to finite values"
    return ""


def _gloo(_: str) -> dict[str, Any]:
    """Sum a tensor in a process group of one process: finds an unusable network address, as training would."""
    import torch
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]  # HashStore has no stub
    try:
        value = torch.ones(1)
        distributed.all_reduce(value)
        return {"sum": float(value)}
    finally:
        distributed.destroy_process_group()


def _formats(_: str) -> dict[str, Any]:
    """Write a tone and read it back in every format; each failure is a reason, or empty if the format works."""
    import soundfile

    failures = {}
    for name, settings in _FORMATS.items():
        try:
            failures[name] = _written_and_read(*settings)
        except Exception as error:
            failures[name] = _first_line(error)
    return {"libsndfile": soundfile.__libsndfile_version__, "failures": failures}


def _written_and_read(kind: str, subtype: str, rate: int) -> str:
    import numpy as np
    import soundfile

    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    file = io.BytesIO()
    soundfile.write(file, tone, rate, format=kind, subtype=subtype)
    file.seek(0)
    samples, _ = soundfile.read(file)
    energy = float(np.square(samples).mean())  # the tone has 0.125; codecs add up to a frame of silence
    wrong = not 0.9 * rate <= len(samples) <= 1.3 * rate or not 0.08 < energy < 0.15
    return f"read back {len(samples)} of {rate} samples of a tone, energy {energy:.3f} of 0.125" if wrong else ""


def _soxr(_: str) -> dict[str, Any]:
    import numpy as np
    import soxr

    tone = np.sin(2 * np.pi * 440 * np.arange(44_100) / 44_100).astype(np.float32)
    made = soxr.resample(tone, 44_100, 16_000, quality="HQ")
    wanted = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    middle = slice(1_000, 15_000)
    error = float(np.abs(made[middle] - wanted[middle]).max())
    if len(made) != 16_000 or not error < 1e-3:
        raise RuntimeError(f"a tone was resampled to {len(made)} samples instead of 16000, error {error:.2g}")
    return {"error": error}


def _library(path: str) -> dict[str, Any]:
    """Load a compiled library, as torch.compile does."""
    import ctypes

    ctypes.CDLL(path)
    return {}


def _nemo(how: str) -> dict[str, Any]:
    """Find NeMo's version in this Python without running NeMo; with `import`, import its encoder too."""
    from importlib import metadata, util

    version = metadata.version("nemo_toolkit")
    if util.find_spec("nemo.collections.asr") is None:
        raise ImportError("its folder nemo/collections/asr is missing")
    if how == "import":
        importlib.import_module("nemo.collections.asr.modules.conformer_encoder")
    return {"version": version, "python": ".".join(map(str, sys.version_info[:3]))}


TRIALS: dict[str, Callable[[str], dict[str, Any]]] = {
    "import": _import, "presets": _presets, "torch": _torch, "precision": _precision, "gloo": _gloo,
    "formats": _formats, "soxr": _soxr, "library": _library, "nemo": _nemo,
}  # fmt: skip


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def main() -> None:
    """Answer each request {"trial": "NAME"} or {"trial": "NAME:ARGUMENT"} until there are no more."""
    here = Path(__file__).parent
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != here
    ]  # so that `import audio` does not find our audio.py
    requests, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # libraries must not read requests
    os.dup2(2, 1)  # libraries may print, which must not mix with the answers
    for request in requests:
        name, _, argument = json.loads(request)["trial"].partition(":")
        answer: dict[str, Any]
        try:
            answer = {"facts": TRIALS[name](argument)}
        except BaseException as error:  # a module may raise SystemExit
            answer = {"error": _first_line(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
