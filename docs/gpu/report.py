"""Report of `make gpu`: one table, one JSON file, a log and pictures."""

from __future__ import annotations

import io
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nestcli.pictures import BLUE, GREY, ORANGE, new_figure, save, styled

Facts = dict[str, Any]
_LOG_LETTERS = 200_000  # of each part
_SHOWN: tuple[tuple[str, str, Callable[[Any], str]], ...] = (  # key of a row, how the table calls it, its form
    ("why", "", str),
    ("step_seconds", "step", lambda s: f"{1e3 * s:.1f} ms"),
    ("forward_seconds", "forward", lambda s: f"{1e3 * s:.2f} ms"),
    ("forward_backward_seconds", "forward + backward", lambda s: f"{1e3 * s:.2f} ms"),
    ("audio_per_second", "audio", lambda s: f"{s:,.0f} s/s"),
    ("mfu", "mfu", lambda share: f"{100 * share:.1f}%"),
    ("peak_bytes", "peak", lambda n: f"{n / 2**30:.2f} GiB"),
    ("extra_peak_bytes", "extra peak", lambda n: f"{n / 2**20:,.0f} MiB"),
    ("waits", "waits", str),
    ("first_step_seconds", "first step", lambda s: f"{s:.1f} s"),
    ("difference", "difference", lambda d: f"{d:.2g}"),
    ("gradient_difference", "of gradients", lambda d: f"{d:.2g}"),
    ("compiled", "compiled", str),
    ("batch_seconds", "batch", lambda s: f"{s:.0f} s"),
    ("first_batch_seconds", "first batch", lambda s: f"{s:.1f} s"),
    ("steps", "steps", str),
    ("train_loss", "loss", lambda loss: f"{loss:.3f}"),
    ("guessing_loss", "guessing", lambda loss: f"{loss:.3f}"),
    ("val_loss", "validation", lambda loss: f"{loss:.3f}"),
    ("data_wait_share", "waits for data", lambda share: f"{100 * share:.1f}%"),
    ("audio_hours", "hours of audio", lambda hours: f"{hours:.2f}"),
    ("train_seconds", "speech", lambda s: f"{s / 60:.1f} min"),
    ("source", "source", str),
    ("pretrained", "pretrained", lambda share: f"{100 * share:.1f}%"),
    ("untrained", "untrained", lambda share: f"{100 * share:.1f}%"),
    ("chance", "chance", lambda share: f"{100 * share:.1f}%"),
)
_COLOURS = {"failed": "red", "over time": "yellow", "not run": "yellow", "skipped": "yellow"}


def device_facts(*, rehearse: bool) -> Facts:
    """Return names and versions, found by another process: `device` is None without a GPU.

    A process that has opened the GPU would keep it from the parts, if only one at a time may use it.
    """
    call = [sys.executable, str(Path(__file__)), *(["--rehearse"] if rehearse else [])]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    found: Facts = json.loads(done.stdout.splitlines()[-1])
    return found


def _device_facts(*, rehearse: bool) -> Facts:
    import torch

    found: Facts = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "lightning": version("lightning"),
        "driver": None,
        "rehearsal": rehearse,
    }
    if rehearse:
        return {**found, "device": "a processor (rehearsal)"}
    if not torch.cuda.is_available():
        return {**found, "device": None}
    return {
        **found,
        "device": torch.cuda.get_device_name(0),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": _driver(),
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    call = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return None
    return (done.stdout.splitlines() or [None])[0]


def write_report(out: Path, device: Facts, results: Sequence[Facts]) -> None:
    """Print the table, and write gpu.json, table.txt, log.txt and pictures; a picture that fails is named."""
    logs = (f"==== {each['part']}: {each['state']} ====\n{each['log'][-_LOG_LETTERS:]}\n" for each in results)
    (out / "log.txt").write_text("".join(logs), encoding="utf-8")
    plain = [{key: value for key, value in each.items() if key != "log"} for each in results]
    tails = {each["part"]: each["log"][-2000:] for each in results if each["state"] == "failed"}
    doctor = next((each["log"] for each in results if each["part"] == "doctor"), "")
    whole = {"device": device, "parts": plain, "doctor": doctor, "ends_of_failed_logs": tails}
    (out / "gpu.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = io.StringIO()
    for console in (Console(file=text, width=150), Console(width=150)):
        console.print(table(device, results))
    for part, tail in tails.items():
        text.write(f"\nend of the output of {part}:\n{tail}\n")
        print(f"\nend of the output of {part}:\n{tail}")
    (out / "table.txt").write_text(text.getvalue(), encoding="utf-8")
    rows = {row["name"]: row for each in results for row in each["rows"]}
    for name, draw in PICTURES.items():
        try:
            draw(out / name, rows)
        except Exception as error:  # the numbers are written
            print(f"{name} was not drawn: {type(error).__name__}: {error}")


def table(device: Facts, results: Sequence[Facts]) -> Table:
    title = escape(f"{device['device']}, driver {device['driver']}, PyTorch {device['torch']}, CUDA {device['cuda']}")
    made = Table(title=title, title_justify="left", show_lines=False, pad_edge=False)
    for name, options in (("part", {}), ("row", {"max_width": 64}), ("state", {}), ("result", {"ratio": 1})):
        made.add_column(name, overflow="fold", **options)  # type: ignore[arg-type]
    for each in results:
        taken = f"{each['seconds']:.0f} of {each['limit']:.0f} s"
        made.add_row(each["part"], "", coloured(each["state"]), taken, style="bold")
        for row in each["rows"]:
            made.add_row("", shortened(row["name"]), coloured(row["state"]), result_of(row))
            for kernel in row.get("kernels", ()):
                cost = f"{1e3 * kernel['seconds']:.2f} ms, {100 * kernel['share']:.1f}%, {kernel['calls']} calls"
                made.add_row("", "", "", escape(f"{cost}: {kernel['name'][:70]}"))
            for line in row.get("waited_for", ()):
                made.add_row("", "", "", escape(f"waits at {line}"))
    return made


def coloured(state: str) -> str:
    colour = _COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state


def shortened(name: str) -> str:
    return escape(name.removeprefix("tests/gpu/"))


def result_of(row: Facts) -> str:
    found = [(name, form(row[key])) for key, name, form in _SHOWN if row.get(key) is not None]
    return escape(", ".join(f"{name} {value}".strip() for name, value in found))


# ---- pictures ----


def _bars(path: Path, title: str, unit: str, bars: Sequence[tuple[str, float, str]]) -> None:
    """Draw named horizontal bars, each with a note at its end; nothing without bars."""
    if not bars:
        return
    with styled():
        figure = new_figure(9, 1.2 + 0.28 * len(bars), title)
        axes = figure.subplots()
        places = range(len(bars))
        axes.barh(places, [value for _, value, _ in bars], color=BLUE)
        axes.set_yticks(places, [name for name, _, _ in bars])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        for place, (_, value, note) in enumerate(bars):
            axes.text(value, place, f" {note}", va="center", fontsize=8)
        axes.margins(x=0.15)
        save(figure, path)


def draw_steps(path: Path, rows: dict[str, Facts]) -> None:
    steps = [row for row in rows.values() if "step_seconds" in row]
    bars = [
        (row["name"], row["audio_per_second"], f"{100 * row['mfu']:.0f}% mfu" if row.get("mfu") else "")
        for row in steps
    ]  # fmt: skip
    _bars(path, "Training steps", "seconds of audio a second", bars)


def draw_attention(path: Path, rows: dict[str, Facts]) -> None:
    timed = [row for row in rows.values() if "extra_peak_bytes" in row]
    bars = []
    for row in timed:
        seconds = row.get("forward_backward_seconds") or row["forward_seconds"]
        bars.append((row["name"], 1e3 * seconds, f"{row['extra_peak_bytes'] / 2**20:.0f} MiB"))
    _bars(path, "Attention and depthwise convolution, forward and backward", "ms", bars)


def draw_profile(path: Path, rows: dict[str, Facts]) -> None:
    found = next((row for row in rows.values() if "kernels" in row), None)
    kernels = [] if found is None else found["kernels"]
    bars = [(each["name"][:60].replace("$", ""), 1e3 * each["seconds"], f"{each['calls']} calls") for each in kernels]
    _bars(path, "" if found is None else found["name"].capitalize(), "ms", bars)


def draw_loss(path: Path, rows: dict[str, Facts]) -> None:
    found = rows.get("pretrain reference", {})
    if not found.get("curve"):
        return
    with styled():
        figure = new_figure(7, 3.6, "Pretraining")
        axes = figure.subplots()
        steps, losses, guesses = zip(*found["curve"], strict=True)
        axes.plot(steps, losses, color=BLUE, label="loss")
        axes.plot(steps, [float("nan") if each is None else each for each in guesses], color=ORANGE, label="guessing")
        axes.set_xlabel("step")
        axes.grid(True, color=GREY, alpha=0.2)
        axes.legend()
        save(figure, path)


PICTURES: dict[str, Callable[[Path, dict[str, Facts]], None]] = {
    "steps.png": draw_steps,
    "attention.png": draw_attention,
    "profile.png": draw_profile,
    "loss.png": draw_loss,
}


if __name__ == "__main__":
    print(json.dumps(_device_facts(rehearse="--rehearse" in sys.argv)))
