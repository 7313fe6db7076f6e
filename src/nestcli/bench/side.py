"""One side of a measurement: a process that answers requests. Run as a program, it is NeMo's side.

This file is self-contained: it imports nothing from nestcli, so that the Python of another environment can run it.

    NEMO_PYTHON side.py

reads JSON requests from standard input, one per line, {"operation": NAME, "parameters": {...}}, and answers each with
one line {"facts": {...}} or {"error": TEXT, "kind": NAME}; NAME is the class of a nest error, null for any other error.
Both sides use the timing functions of this file.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any

# "open_loader" sets "batches", an endless iterator of seconds of audio; "open_training" sets "device", cpu or cuda.
STATE: dict[str, Any] = {}
_IDLE = 0.05  # s without CPU time in the loader's processes, after which they count as idle


# ---- timing ------------------------------------------------------------------------------------------------------


def timed_round(parameters):
    """Measure the audio delivered from the end of one batch to the end of another, at least `seconds` later.

    The first `skip` batches do not count: they were made before the measurement.
    """
    batches = STATE["batches"]
    for _ in range(parameters["skip"]):
        next(batches)
    audio, number, start, processors = 0.0, 0, time.perf_counter(), _processor_seconds()
    while time.perf_counter() - start < parameters["seconds"] or number < parameters["least"]:
        audio += next(batches)
        number += 1
    seconds = time.perf_counter() - start
    busy = _processor_seconds() - processors
    return {"audio_seconds": audio, "batches": number, "seconds": seconds, "processor_seconds": busy}


def settle(parameters):
    """Wait until the loader's processes have filled their queue and are idle, and no longer slow the other side."""
    deadline = time.monotonic() + parameters["seconds"]
    while time.monotonic() < deadline:
        before = _ticks()
        time.sleep(_IDLE)
        if _ticks() == before:
            return {"idle": True}
    return {"idle": False}


def _processor_seconds():
    """Return the CPU time of this process and its loader's processes, in seconds."""
    ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    return time.process_time() + _ticks() / ticks


def _ticks():
    """Return the CPU time of the loader's processes in clock ticks."""
    total = 0
    for process in multiprocessing.active_children():
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total


def memory(_parameters):
    """Return the memory in bytes of this process and of each child: peak, resident, proportional (PSS), private."""
    children = [process.pid for process in multiprocessing.active_children()]
    return {"main": memory_of("self"), "workers": [memory_of(pid) for pid in children]}


def memory_of(pid):
    """Return the memory of one process in bytes. Without /proc, only this process' peak is known."""
    try:
        status = _kibibytes(Path(f"/proc/{pid}/status"))
        shares = _kibibytes(Path(f"/proc/{pid}/smaps_rollup"))
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"peak": peak, "resident": peak, "proportional": None, "own": None}
    own = shares.get("Private_Clean", 0) + shares.get("Private_Dirty", 0)
    return {
        "peak": status["VmHWM"],
        "resident": status["VmRSS"],
        "proportional": shares.get("Pss"),
        "own": own,
    }


def _kibibytes(path):
    rows = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def endless(loader, seconds_of):
    """Yield the seconds of audio of one batch after another, epoch after epoch."""
    while True:
        for batch in loader:
            yield seconds_of(batch)


# ---- training steps ----------------------------------------------------------------------------------------------

BATCH = ("clean", "clean_len", "noisy", "noisy_len")


def step_round(parameters):
    """Run training steps with STATE["step"], a function from a seed to the loss; return seconds and loss of each."""
    seconds, losses = [], []
    for number in range(parameters["steps"]):
        wait_for_device()
        start = time.perf_counter()
        losses.append(STATE["step"](parameters["seed"] + number))
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses}


def quantizer_round(parameters):
    """Run STATE["tokens"] on STATE["features"] several times; return the seconds of each run, and the tokens."""
    seconds = []
    for _ in range(parameters["times"]):
        wait_for_device()
        start = time.perf_counter()
        tokens = STATE["tokens"](STATE["features"])
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens": tokens.flatten().long().tolist()}


def peak_of(parameters):
    """Return the peak memory during an operation, and the memory before, in bytes: of the GPU, or of this process."""
    measured = {"step_round": step_round, "quantizer_round": quantizer_round}[parameters["measured"]]
    if STATE["device"] == "cuda":
        import torch

        wait_for_device()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        measured(parameters)
        return {"before": before, "peak": torch.cuda.max_memory_allocated()}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = memory_of("self")["resident"]
    measured(parameters)
    return {"before": before, "peak": memory_of("self")["peak"]}


def wait_for_device():
    """Wait until the GPU, if the steps run on one, has done its work."""
    if STATE["device"] == "cuda":
        import torch

        torch.cuda.synchronize()


# ---- the conversation --------------------------------------------------------------------------------------------


def converse(operations, known=()):
    """Answer requests until the other side closes the connection."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print to standard output, which must carry answers only
    with contextlib.suppress(BrokenPipeError):
        for line in requests:
            answers.write(json.dumps(_reply(operations, json.loads(line), known)) + "\n")
            answers.flush()


def _reply(operations, request, known):
    try:
        return {"facts": operations[request["operation"]](request["parameters"])}
    except Exception as error:
        if isinstance(error, known):
            return {"error": str(error), "kind": type(error).__name__}
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000], "kind": None}


TIMING = {
    "round": timed_round,
    "settle": settle,
    "memory": memory,
    "step_round": step_round,
    "quantizer_round": quantizer_round,
    "peak_of": peak_of,
}


# ---- NeMo --------------------------------------------------------------------------------------------------------


def _hello(_parameters):
    import nemo
    import torch

    return {"version": nemo.__version__, "torch": torch.__version__}


def _open_loader(parameters):
    """Open the training loader with the method of NeMo's model; the model itself is not needed.

    With a `device`, every batch is copied there, as Lightning does before a step.
    """
    start = time.perf_counter()
    from nemo.collections.asr.models import EncDecDenoiseMaskedTokenPredModel
    from omegaconf import OmegaConf

    imported = time.perf_counter()
    block = OmegaConf.create(parameters["train_ds"])
    model = types.SimpleNamespace(cfg=OmegaConf.create({"sample_rate": block.sample_rate}), global_rank=0, world_size=1)
    loader = EncDecDenoiseMaskedTokenPredModel._setup_dataloader_from_config(model, block)
    built = time.perf_counter()
    rate, device = float(block.sample_rate), parameters.get("device") or "cpu"
    _check_device(device)

    def seconds_of(batch):
        on_device = {name: value.to(device, non_blocking=True) for name, value in vars(batch).items() if _moves(value)}
        return int(on_device["audio_len"].sum()) / rate  # the number arrives behind the copies

    STATE["batches"] = endless(loader, seconds_of)
    next(STATE["batches"])
    first = time.perf_counter()
    return {"imports": imported - start, "manifest": built - imported, "first_batch": first - built}


def _moves(value):
    return hasattr(value, "to")


def _check_device(device):
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"PyTorch {torch.__version__} of this environment finds no GPU, and the comparison runs on one. Install a "
            "CUDA build of PyTorch there, or compare on the processor: trainer.accelerator=cpu."
        )


def _open_training(parameters):
    """Build NeMo's model with given weights, its optimizer, and a batch; a step is forward, backward and update.

    They go to `device`. `precision` is 32, 16-mixed or bf16-mixed; `matmul_precision` is PyTorch's name or null.
    """
    import torch
    from nemo.collections.asr.models import EncDecDenoiseMaskedTokenPredModel
    from omegaconf import OmegaConf
    from safetensors.torch import load_file

    device = parameters["device"]
    _check_device(device)
    if parameters["matmul_precision"] is not None:
        torch.set_float32_matmul_precision(parameters["matmul_precision"])
        torch.backends.cudnn.allow_tf32 = parameters["matmul_precision"] != "highest"
    shorter = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(parameters["precision"])
    model = EncDecDenoiseMaskedTokenPredModel(cfg=OmegaConf.create(parameters["model"]))
    model.load_state_dict(load_file(parameters["weights"]), strict=True)
    model = model.to(device)
    optim = {key: value for key, value in parameters["optim"].items() if key != "sched"}
    optimizer = model.train().setup_optimization(OmegaConf.create(optim))[0]
    batch = {name: value.to(device) for name, value in load_file(parameters["batch"]).items()}

    def step(seed):
        torch.manual_seed(seed)
        with contextlib.nullcontext() if shorter is None else torch.autocast(device, shorter):
            log_probs, lengths, masks, tokens = model(
                input_signal=batch["clean"].clone(),
                input_signal_length=batch["clean_len"],
                noisy_input_signal=batch["noisy"].clone(),
                noisy_input_signal_length=batch["noisy_len"],
                apply_mask=True,
            )
            loss = model.loss(masks=masks, decoder_outputs=log_probs, targets=tokens, decoder_lengths=lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    STATE["step"], STATE["features"], STATE["device"] = step, batch["features"], device
    STATE["tokens"] = lambda features: model.quantizer(input_signal=features)[1]
    return {}


if __name__ == "__main__":
    # Python puts this file's folder first in sys.path, where our files could hide their modules.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    converse({**TIMING, "hello": _hello, "open_loader": _open_loader, "open_training": _open_training})
