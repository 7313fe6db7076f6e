"""Try nest on a GPU in a few minutes: tests, training steps, attention, the loader, and a pretraining run.

python docs/gpu/run.py [--out DIR] [--speech DIR --noise DIR] [--probe DIR] [--minutes N] [--only PART] [--rehearse]

Nothing is installed. SPEECH, NOISE and PROBE are folders as for docs/reference/run.py; without them, speech is
synthetic and no probe is run. Each part is a process with a time limit of its own; it writes its rows as it goes, so a
part that fails or is cut off still reports. OUT gets gpu.json, table.txt, log.txt and pictures. `--rehearse` does all
of it at toy size on a processor. The exit code is 1 if a part failed; parts that ran out of time are reported only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from measure import BEGUN, FAILED, ROOT, Facts, read_rows
from report import device_facts, write_report

HERE = Path(__file__).parent
OK, OVER_TIME, NOT_RUN = "ok", "over time", "not run"
_REPORTING = 12.0  # seconds that are kept for the tables and pictures
_REHEARSAL = 600.0  # maximum seconds of a part in a rehearsal
_TRIES = 3  # processes of a part, if each one dies at another row
_TEST = re.compile(r"^(tests/\S+::\S+) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A part: its command without the arguments of a task, and its limit in seconds."""

    name: str
    command: tuple[str, ...]
    seconds: float
    is_task: bool = True  # takes the arguments of measure.Task
    judges: bool = True  # an exit code other than 0 is a failure of nest
    options: tuple[str, ...] = ()


@dataclass
class Result:
    """The outcome of a part; `log` is the output of its processes."""

    part: str
    state: str
    seconds: float
    limit: float
    rows: list[Facts] = field(default_factory=list)
    log: str = ""


def parts(given: argparse.Namespace, *, every: bool = False) -> list[Part]:
    """Return the parts of `--only` and those that they need, in order; the last one takes what the others left."""
    python = sys.executable
    folders = {name: getattr(given, name) for name in ("speech", "noise", "probe")}
    data = tuple(f"{name}={folder.resolve()}" for name, folder in folders.items() if folder)
    quiet = ("--durations=8", "--show-capture=no", "-p", "no:cacheprovider")
    tests = (python, "-m", "pytest", "-v", "-m", "gpu", "tests/gpu", *quiet)
    known = [
        Part("doctor", (python, "-m", "nestcli", "doctor"), 20, is_task=False, judges=False),
        Part("tests", tests, 90, is_task=False),
        Part("steps compiled", (python, str(HERE / "steps.py")), 90, options=("compiled",)),
        Part("steps plain", (python, str(HERE / "steps.py")), 45, options=("plain",)),
        Part("attention", (python, str(HERE / "attention.py")), 40),
        Part("data", (python, str(HERE / "data.py")), 40, options=data),
        Part("loader", (python, str(HERE / "loading.py")), 30),
        Part("pretraining", (python, str(HERE / "pretraining.py")), 330),
    ]
    needed = {"loader": {"data"}, "pretraining": {"data"}}
    wanted = {name for only in given.only or () for name in (only, *needed.get(only, ()))}
    return [part for part in known if every or not wanted or part.name in wanted]


def run_part(part: Part, work: Path, seconds: float, *, rehearse: bool = False) -> Result:
    """Run a part for at most `seconds`; a process that dies at a row is started again for the rows after it."""
    rows, log = work / f"{part.name}.jsonl", work / f"{part.name}.log"
    result, start = Result(part.name, OK, 0.0, seconds), time.monotonic()
    for _ in range(_TRIES):
        before, left = len(read_rows(rows)), seconds - (time.monotonic() - start)
        code = _process(_command(part, rows, work, left, rehearse), log, left, rehearse=rehearse)
        result.state = OVER_TIME if code is None else FAILED if code and part.judges else OK
        if result.state != FAILED or not part.is_task or len(read_rows(rows)) == before:
            break
    result.seconds = time.monotonic() - start
    result.log = log.read_text(encoding="utf-8", errors="replace")
    result.rows = read_rows(rows) if part.is_task else _tests(result.log)
    for row in result.rows:
        if row["state"] == BEGUN:
            cut = result.state == OVER_TIME and row is result.rows[-1]
            row.update(state=OVER_TIME if cut else FAILED, why="cut off" if cut else "the process died")
    if any(row["state"] == FAILED for row in result.rows):
        result.state = FAILED
    return result


def _command(part: Part, rows: Path, work: Path, seconds: float, rehearse: bool) -> list[str]:
    if not part.is_task:
        return list(part.command)
    words = [str(rows), str(work), f"--seconds={seconds:.1f}", *(["--rehearse"] if rehearse else []), *part.options]
    return [*part.command, *words]


def _process(command: Sequence[str], log: Path, seconds: float, *, rehearse: bool) -> int | None:
    """Return the exit code of a process, None if it had to be killed; its output is added to the log."""
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    if rehearse:
        environment.update(NEST_GPU_TESTS="cpu", CUDA_VISIBLE_DEVICES="")
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # its children too, after an end of its own as well
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _tests(log: str) -> list[Facts]:
    states = {"PASSED": "done", "XFAIL": "done", "SKIPPED": "skipped"}
    return [{"name": name, "state": states.get(state, FAILED)} for name, state in _TEST.findall(log)]


def run_all(chosen: Sequence[Part], work: Path, seconds: float, *, rehearse: bool) -> list[Result]:
    """Run the parts one after the other, all of them in at most so many seconds."""
    start, results = time.monotonic(), []
    for number, part in enumerate(chosen):
        left = seconds - _REPORTING - (time.monotonic() - start)
        limit = _REHEARSAL if rehearse else min(part.seconds, left)
        print(f"{part.name} ({number + 1} of {len(chosen)}), at most {max(0.0, limit):.0f} s ...", flush=True)
        if limit < 1:
            results.append(Result(part.name, NOT_RUN, 0.0, 0.0))
            continue
        result = run_part(replace(part), work, limit, rehearse=rehearse)
        results.append(result)
        if part.name == "doctor":
            print(result.log, flush=True)
        print(f"{part.name}: {result.state} after {result.seconds:.0f} s, {len(result.rows)} rows", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("nest_gpu"))
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--noise", type=Path)
    parser.add_argument("--probe", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="all parts together (default: 8)")
    parser.add_argument("--only", action="append", metavar="PART")
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    if (given.speech is None) != (given.noise is None):
        parser.error("--speech and --noise: give both folders, or none.")
    for folder in filter(None, (given.speech, given.noise, given.probe)):
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder.")
    names = [part.name for part in parts(given, every=True)]
    if unknown := set(given.only or ()) - set(names):
        parser.error(f"--only {sorted(unknown)[0]}: use one of {', '.join(names)}.")
    chosen = parts(given)
    started = time.monotonic()
    device = device_facts(rehearse=given.rehearse)
    if device["device"] is None:
        parser.error("PyTorch finds no GPU here (nest doctor shows why). --rehearse runs everything on a processor.")
    given.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="nest-gpu-"))
    try:
        left = 60 * given.minutes - (time.monotonic() - started)
        results = run_all(chosen, work, left, rehearse=given.rehearse)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_report(given.out, device, [vars(result) for result in results])
    sys.exit(any(result.state == FAILED for result in results))


if __name__ == "__main__":
    main()
