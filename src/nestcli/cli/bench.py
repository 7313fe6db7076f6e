"""`nest bench`: measure speed and memory on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from nestcli.cli import console
from nestcli.cli.bench_tables import show
from nestcli.cli.options import AsJson, amount
from nestcli.errors import ConfigError

_SECTIONS = ("loader", "scale", "train_step", "quantizer", "precisions", "buckets")


Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [key=value ...]",
        help="A preset, a YAML file, a .ckpt or a .nemo, followed by overrides, e.g. "
        "model.train_ds.manifest_filepath=train.json model.train_ds.noise_manifest=noise.json.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="SECTION", help=f"One of {', '.join(_SECTIONS)}. May be repeated."),
]
NemoPython = Annotated[
    str | None,
    typer.Option(
        "--nemo-python",
        metavar="PATH",
        envvar="NEST_NEMO_PYTHON",
        help="Python of an environment with NeMo; measures NeMo too.",
        show_default=False,
    ),
]
Rounds = Annotated[
    int | None, typer.Option("--rounds", min=1, max=1000, help="Measurements of each side; the sides take turns.")
]
Seconds = Annotated[float | None, amount("--seconds", "Section loader: seconds per side and round.", most=3600)]
Lines = Annotated[
    list[int] | None,
    typer.Option("--lines", min=1, max=10**8, help="Section scale: lines of a manifest. May be repeated."),
]
Buckets = Annotated[
    int, typer.Option("--buckets", min=1, max=1000, help="Section buckets: maximum number of duration bins.")
]
Memory = Annotated[
    float | None,
    amount(
        "--memory",
        "Section buckets: GiB that a training step may use. Default: 90% of the free GPU memory, "
        "or 80% of the free main memory.",
        most=1e5,
        show_default=False,
    ),
]
AudioSeconds = Annotated[
    list[float] | None,
    amount(
        "--audio-seconds",
        "Section precisions: seconds of audio per batch. May be repeated.",
        least=1,
        most=1e5,
        show_default=False,
    ),
]


def bench(
    words: Words = None,
    only: Only = None,
    nemo_python: NemoPython = None,
    rounds: Rounds = None,
    seconds: Seconds = None,
    lines: Lines = None,
    buckets: Buckets = 30,
    memory: Memory = None,
    audio_seconds: AudioSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Measure the speed and memory of training on this machine.

    Measures the data loader, the start on long manifests, training steps, the quantizer, and on a GPU the precisions
    and the largest batches that fit. With --nemo-python, measures NeMo in the same way.
    """
    for name in only or []:
        if name not in _SECTIONS:
            raise ConfigError(f"--only {name}: unknown section. Known: {', '.join(_SECTIONS)}.")
    from nestcli.cli.named import read_config

    config = read_config(words or [], training=True).config
    from nestcli.bench.context import Options
    from nestcli.bench.run import run_bench

    options = Options(nemo_python=nemo_python, rounds=rounds, seconds=seconds, buckets=buckets)
    if lines:
        options = options.changed(lines=tuple(lines))
    if memory is not None:
        options = options.changed(memory=int(memory * 2**30))
    if audio_seconds:
        options = options.changed(audio_seconds=tuple(audio_seconds))
    with console.progress("measuring") as advance:
        report = run_bench(config, list(dict.fromkeys(only or [])), options, advance)
    if as_json:
        console.emit_json(report.to_json())
    else:
        show(report)
    for name, error in report.failures.items():
        console.error(f"{name}: {error}")
    if report.failures:
        raise typer.Exit(1)
