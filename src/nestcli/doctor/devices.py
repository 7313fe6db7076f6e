"""Checks of CPU, memory and GPUs, and of PyTorch on them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nestcli.doctor import machine
from nestcli.doctor.child import PRECISIONS
from nestcli.doctor.report import Check, size
from nestcli.doctor.trials import Answer
from nestcli.jobs.cores import available_cores

_check = partial(Check, "devices")
TRIALS = ("torch", "precision:cpu", "gloo")
_MIB, _GIB = 1 << 20, 1 << 30
_REINSTALL = (
    "Choose the build for your driver on PyTorch's installation page, and reinstall PyTorch from the index that the "
    "page names."
)


def further_trials(answers: Mapping[str, Answer]) -> list[str]:
    """Return the additional trials for a machine with a GPU."""
    return ["precision:cuda"] if answers["torch"].facts.get("gpus") else []


def devices_checks(answers: Mapping[str, Answer]) -> Iterator[Check]:
    """Yield all checks of the section except the compiler's."""
    yield cores_check(available_cores(), os.cpu_count() or 1, machine.processor_quota(), os.environ)
    yield from memory_check(machine.memory())
    yield from shared_memory_check(Path("/dev/shm"))  # noqa: S108  # looked at only
    yield open_files_check(machine.open_files())
    torch = answers["torch"]
    if torch.error:
        yield _check("PyTorch", "problem", f"it cannot list its devices: {torch.error}", "pip install -U torch")
        return
    driver, cards = machine.nvidia_driver(), machine.nvidia_cards()
    yield gpu_check(torch.facts, driver, cards, os.environ)
    yield from (memory_of_gpu(number, gpu) for number, gpu in enumerate(torch.facts["gpus"]))
    if torch.facts["mps"]:
        yield _check(
            "Apple GPU", "note", "not used: codebooks are float64, as in NeMo, and this GPU does not support float64",
            "Training runs on the CPU here (trainer.accelerator=cpu). For more speed, use an NVIDIA GPU.",
        )  # fmt: skip
    for device, gpus in (("cpu", []), ("cuda", torch.facts["gpus"])):
        if f"precision:{device}" in answers:
            yield precision_check(device, answers[f"precision:{device}"], gpus)
    yield processes_check(answers["gloo"], torch.facts)


def cores_check(allowed: int, present: int, quota: float | None, environ: Mapping[str, str]) -> Check:
    """Compare the usable cores with the container's CPU limit: more threads than that wait for each other."""
    found = f"{allowed} of {present}" if allowed < present else f"{allowed}"
    if quota is None or quota >= allowed:
        return _check("cores", "ok", found)
    found = f"{found}, with the CPU time of {quota:g} (the container's limit)"
    threads = max(1, math.floor(quota))
    if environ.get("OMP_NUM_THREADS", "").isdecimal() and int(environ["OMP_NUM_THREADS"]) <= max(1, math.ceil(quota)):
        return _check("cores", "ok", found)
    return _check(
        "cores", "note", found,
        f"PyTorch starts {allowed} threads. Set OMP_NUM_THREADS={threads} and model.train_ds.num_workers={threads}, "
        "or raise the limit (docker run --cpus).",
    )  # fmt: skip


def memory_check(found: tuple[int, int] | None) -> Iterator[Check]:
    if found is None:
        return
    total, available = found
    words = f"{size(available)} of {size(total)} available"
    if available < _GIB:
        remedy = "PyTorch and a small model need more than 1 GiB. Stop other programs or raise the container's limit."
        yield _check("memory", "problem", words, remedy)
    elif available < 4 * _GIB:
        remedy = "Enough for the demo and `small`; `nest count-params` shows how much memory a model needs."
        yield _check("memory", "note", words, remedy)
    else:
        yield _check("memory", "ok", words)


def shared_memory_check(folder: Path) -> Iterator[Check]:
    """Check /dev/shm, which holds NCCL's buffers between GPUs, but not our batches."""
    if not folder.is_dir():
        return
    usage = shutil.disk_usage(folder)
    name, words = "shared memory", f"{folder}: {size(usage.free)} of {size(usage.total)} free"
    if usage.free < _MIB:
        remedy = f"Several GPUs (NCCL) need it. Remove what fills {folder}, or: docker run --shm-size=1g"
        yield _check(name, "note", words, remedy)
    elif usage.total < _GIB:
        remedy = (
            "nest's batches do not use it. Several GPUs (NCCL) do, and they crash with a bus error when it is full: "
            "docker run --shm-size=1g, or --ipc=host."
        )
        yield _check(name, "note", words, remedy)
    else:
        yield _check(name, "ok", words)


def open_files_check(limit: int) -> Check:
    if limit < 256:
        remedy = "Loader processes and shards need more. Run: ulimit -n 65536"
        return _check("open files", "problem", f"at most {limit} per process", remedy)
    if limit < 1024:
        remedy = "Many shards or loader processes may need more. Run: ulimit -n 65536"
        return _check("open files", "note", f"at most {limit} per process", remedy)
    return _check("open files", "ok", "no limit" if limit >= 1 << 60 else f"at most {limit:,} per process")


def gpu_check(facts: Mapping[str, Any], driver: str | None, cards: int, environ: Mapping[str, str]) -> Check:
    """Check that PyTorch's build fits the driver and the hardware."""
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "CPU"
    gpus = facts["gpus"]
    if gpus:
        names = ", ".join(dict.fromkeys(gpu["name"] for gpu in gpus))
        return _check("GPUs", "ok", f"{len(gpus)} x {names}; PyTorch's {build} build, driver {driver or 'unknown'}")
    if build == "CPU":
        if driver is None and not cards:
            return _check("GPUs", "ok", "none; PyTorch's CPU build: training runs on the CPU")
        there = f"NVIDIA driver {driver}" if driver else f"{cards} NVIDIA card{'s' * (cards > 1)} without a driver"
        state = "problem" if driver else "note"
        return _check("GPUs", state, f"{there}, but PyTorch's CPU build uses no GPU", _REINSTALL)  # type: ignore[arg-type]  # one of two states
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    if driver is not None and hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return _check(
            "GPUs", "note", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}; PyTorch's {build} build, driver {driver}",
            "Unset CUDA_VISIBLE_DEVICES, or set it to GPU numbers (0,1), to train on GPUs.",
        )  # fmt: skip
    return _unusable(build, driver, cards, facts["cuda_error"])


def _unusable(build: str, driver: str | None, cards: int, error: str) -> Check:
    """Return the check for a GPU build of PyTorch that can use no GPU."""
    why = f": {error}" if error else ""
    if driver is not None:
        remedy = "Update the driver, or install PyTorch for an older CUDA: its installation page lists the builds."
        return _check("GPUs", "problem", f"driver {driver}, but PyTorch's {build} build cannot use it{why}", remedy)
    if cards:
        remedy = "Install NVIDIA's driver. In a container: docker run --gpus all, with nvidia-container-toolkit."
        return _check("GPUs", "problem", f"{cards} NVIDIA card{'s' * (cards > 1)}, but no driver{why}", remedy)
    return _check(
        "GPUs", "note", f"none, and no driver; PyTorch's {build} build: training runs on the CPU",
        "Without a GPU, nothing to do (PyTorch's CPU build is smaller). In a container on a machine with a GPU: "
        "docker run --gpus all.",
    )  # fmt: skip


def memory_of_gpu(number: int, gpu: Mapping[str, Any]) -> Check:
    major, minor = gpu["capability"]
    words = f"{gpu['name']}, compute capability {major}.{minor}, {size(gpu['free'])} of {size(gpu['total'])} free"
    if gpu["free"] < 0.5 * gpu["total"]:
        remedy = "Other processes use the rest: nvidia-smi lists them. CUDA_VISIBLE_DEVICES chooses another GPU."
        return _check(f"GPU {number}", "note", words, remedy)
    return _check(f"GPU {number}", "ok", words)


def precision_check(device: str, answer: Answer, gpus: list[dict[str, Any]]) -> Check:
    """Check which values of trainer.precision work; each was tried on an optimizer step of a small layer."""
    name = f"precision on {'GPU' if device == 'cuda' else 'CPU'}"
    if answer.error:
        remedy = "Update PyTorch and the driver. For a GPU that PyTorch no longer supports, install an older PyTorch."
        return _check(name, "problem", f"training a small layer fails: {answer.error}", remedy)
    failures = {each: why for each, why in answer.facts["failures"].items() if why}
    works = [each for each in PRECISIONS if each not in failures]
    words = f"{', '.join(works) or 'none'} work{'s' * (len(works) == 1)}, each tried on an optimizer step"
    if "32" in failures:
        return _check(name, "problem", f"{words}; 32: {failures['32']}", "Update PyTorch and the driver.")
    if failures:
        told = "; ".join(f"{each}: {why}" for each, why in failures.items())
        return _check(name, "note", f"{words}; {told}", f"Set trainer.precision to one of {', '.join(works)}.")
    if device == "cpu":
        words += "; in training, Lightning replaces 16-mixed by bf16-mixed on a CPU"
    elif not all(gpu["bf16"] for gpu in gpus):
        return _check(name, "note", f"{words}; bf16 is emulated", "Use trainer.precision=16-mixed: bf16 is slow here.")
    return _check(name, "ok", words)


def processes_check(gloo: Answer, facts: Mapping[str, Any]) -> Check:
    """Check that the processes of a run can communicate."""
    if gloo.error:
        return _check(
            "processes", "note", f"gloo does not work: {gloo.error}",
            "Needed only for runs of several processes. Often the host name has no address: add it to /etc/hosts, or "
            "set GLOO_SOCKET_IFNAME=lo.",
        )  # fmt: skip
    if len(facts["gpus"]) > 1 and not facts["nccl"]:
        remedy = "Install a build of PyTorch with NCCL: its CUDA builds for Linux have it."
        return _check("processes", "problem", "several GPUs, but PyTorch has no NCCL", remedy)
    nccl = "is available" if facts["nccl"] else "is not available (needed for GPUs only)"
    return _check("processes", "ok", f"gloo works; NCCL {nccl}")
