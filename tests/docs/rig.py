"""Runs a page's commands and Python, in the page's order, in a folder of its own.

What a page names is there: my_speech/ and my_noise/ with audio, speech.wav and speech.flac; train.json, val.json and
noise.json, data/speech and data/noise (`nest prepare-data`'s), nest.ckpt, nest.nemo and nest_experiments
(`nest pretrain`'s); except for what the page's own commands write, so that a page that makes its manifests has none
before.

The words of a command run as they stand. Only what would take hours is made small, by words that are put behind
them (SMALLER): a model of one layer and two steps in place of the preset's, a minute of the demo's speech. Keys and
options of the page are read all the same. `nest` and `python` are forks of one process that has everything imported
(zygote.py), PROGRAMS are started as they are, and nothing is given to a shell. Every command must end with 0, or as its
mark says.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from conftest import TINY_RUN, write_noise_wav
from docs.pages import Block, Page
from docs.shell import Command, ShellError, read_commands

_STEPS = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1"]
_DEMO = [word for word in TINY_RUN if "lr=" not in word and "codes" not in word]
SMALLER = {
    "pretrain": [*TINY_RUN, *_STEPS],
    "bench": [*TINY_RUN, "--rounds", "1", "--seconds", "0.2", "--memory", "1", "--lines", "1000"],
    "demo": ["--minutes", "1.5", "trainer.max_steps=25", "trainer.val_check_interval=10", "model.encoder.n_layers=1",
             "model.optim.sched.warmup_steps=10", "model.encoder.d_model=32", "model.optim.lr=0.15",
             "model.encoder.subsampling_conv_channels=16", "model.train_ds.batch_size=4"],
}  # fmt: skip
SLOW = ("bench", "demo")
PROGRAMS = ("cat", "cp", "head", "ls", "mkdir", "mv", "rm", "sha256sum", "tail", "tar", "wc")
SECONDS = 1800.0  # compiling on a busy machine takes long


class Zygote:
    """Commands in forks of one process."""

    def __init__(self) -> None:
        program = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        quiet = {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **quiet}
        )

    def call(self, order: dict[str, object]) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs the commands has died"
        return json.loads(answer)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._process.communicate()


class Rig:
    """A folder with what a page needs; runs its blocks."""

    def __init__(self, folder: Path, seeds: Path, page: Page, zygote: Zygote) -> None:
        self._folder, self._zygote = folder, zygote
        self._kept = folder / ".outputs"
        self._kept.mkdir(parents=True)
        self._variables: dict[str, str] = {}
        self._runs = 0
        made = written_by(page)
        for thing in sorted(path for path in seeds.iterdir() if not path.name.startswith(".")):
            _seed(thing, folder / thing.name, made)

    def run(self, block: Block) -> str:
        """Run a block; return its fault, or nothing if it is fine."""
        if block.language == "python":
            return self._python(block)
        wanted = next((int(word[-1]) for word in block.tests if word.startswith("ends with")), 0)
        try:
            commands = read_commands(block.text)
        except ShellError as error:
            return f"{block.where}: {error}"
        given = Path(os.devnull)
        for command in commands:
            code, out, errors = self._command(command, given)
            given = out if command.piped else Path(os.devnull)
            if code != (wanted if command is commands[-1] else 0):
                told = errors.read_text(errors="replace") if errors.is_file() else ""
                line = f"{block.page}:{block.line + command.line}"
                return f"{line}: {' '.join(command.words)}\n  ended with {code}: {told[-800:].strip()}"
        return ""

    def _python(self, block: Block) -> str:
        script = self._kept / f"line{block.line}.py"
        script.write_text(block.text)
        code, errors = self._fork("file", [str(script)], {}, Path(os.devnull), None, None)[::2]
        return f"{block.where}: the Python ended with {code}: {errors.read_text()[-800:]}" if code else ""

    def _command(self, command: Command, given: Path) -> tuple[int | str | None, Path, Path]:
        words = [each for place, word in enumerate(command.words) for each in self._expanded(word, place, command)]
        files = (command.out, command.errors)
        nothing = Path(os.devnull)
        match words:
            case []:
                self._variables.update(command.variables)
                return 0, nothing, nothing
            case ["export", *assignments]:
                self._variables.update(word.split("=", 1) for word in assignments)
                return 0, nothing, nothing
            case ["cd", where]:
                self._folder = self._folder / where
                return 0, nothing, nothing
            case ["nest", *rest]:
                return self._fork("nest", [*rest, *smaller(rest)], command.variables, given, *files)
            case ["python" | "python3", "-m", *rest]:
                return self._fork("module", rest, command.variables, given, *files)
            case ["python" | "python3", file, *rest]:
                return self._fork("file", [file, *rest], command.variables, given, *files)
            case [program, *_] if program in PROGRAMS:
                return self._program(words, given, command.out)
        return f"{words[0]} is not a program that the tests run; mark the block (CONTRIBUTING.md)", nothing, nothing

    def _expanded(self, word: str, place: int, command: Command) -> list[str]:
        if place not in command.globs:
            return [word]
        found = sorted(str(path.relative_to(self._folder)) for path in self._folder.glob(word))
        return found or [word]

    def _files(self, out: str | None, errors: str | None) -> tuple[Path, Path]:
        self._runs += 1
        named = (out, errors)
        usual = (self._kept / f"{self._runs}.out", self._kept / f"{self._runs}.err")
        first, second = (self._folder / name if name else file for name, file in zip(named, usual, strict=True))
        return first, second

    def _fork(
        self, kind: str, words: list[str], variables: dict[str, str], given: Path, out: str | None, errors: str | None
    ) -> tuple[int | None, Path, Path]:
        stdout, stderr = self._files(out, errors)
        order = {
            "kind": kind, "words": words, "cwd": str(self._folder), "environment": {**self._variables, **variables},
            "stdin": str(given), "stdout": str(stdout), "stderr": str(stderr), "seconds": SECONDS,
        }  # fmt: skip
        return self._zygote.call(order), stdout, stderr

    def _program(self, words: list[str], given: Path, out: str | None) -> tuple[int, Path, Path]:
        stdout, stderr = self._files(out, None)
        with given.open("rb") as stdin, stdout.open("wb") as output, stderr.open("wb") as errors:
            done = subprocess.run(words, cwd=self._folder, stdin=stdin, stdout=output, stderr=errors, timeout=SECONDS)
        return done.returncode, stdout, stderr


def is_run(block: Block) -> bool:
    return block.language in ("sh", "bash", "python") and block.not_run is None


def is_slow(block: Block) -> bool:
    """Return True if a block belongs to the slow tests, by its mark or its command."""
    if "slow" in block.tests:
        return True
    return block.language != "python" and any(
        command.words[:1] == ["nest"] and command.words[1] in SLOW for command in _commands(block)
    )


def smaller(words: list[str]) -> list[str]:
    """Return the words to append to a `nest` command."""
    if "--help" in words:
        return []
    added = SMALLER.get(words[0], [])
    demo = words[0] == "pretrain" and words[1:2] == ["demo"]
    return [word for word in added if not (demo and word.startswith("model.num_classes"))]


def written_by(page: Page) -> set[str]:
    """The paths that the page's own commands write."""
    made = set()
    for block in page.blocks:
        for command in _commands(block) if is_run(block) and block.language != "python" else []:
            words = command.words
            made |= {value for name, value in pairwise(words) if name == "--out"}
            if words[:2] == ["nest", "pretrain"] and "--dry-run" not in words:
                made.add("nest_experiments")
    return {os.path.normpath(path) for path in made}


def _commands(block: Block) -> list[Command]:
    try:
        return read_commands(block.text)
    except ShellError:
        return []  # it is told when the block is run


def _seed(thing: Path, into: Path, made: set[str], name: str = "") -> None:
    """Copy a thing, or of a folder what is not made by the page."""
    name = f"{name}/{thing.name}" if name else thing.name
    if name in made:
        return
    if thing.is_dir() and any(path.startswith(f"{name}/") for path in made):
        for each in thing.iterdir():
            _seed(each, into / each.name, made, name)
    elif thing.is_dir():
        shutil.copytree(thing, into)
    else:
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(thing, into)


def make_seeds(folder: Path, zygote: Zygote) -> Path:
    """Make the files that pages may name: audio, manifests, and a tiny model's run."""
    for number in range(18):
        seconds = 1.4 + 0.1 * (number % 5)
        write_noise_wav(folder / "my_speech" / f"speaker{number % 3}" / f"{number}.wav", seconds, number)
    for number in range(3):
        write_noise_wav(folder / "my_noise" / f"{number}.wav", 2.0, 100 + number)
    for name in ("speech.wav", "speech.flac"):
        write_noise_wav(folder / name, 2.0, 200)
    _call(zygote, folder, "prepare-data", "my_noise", "--out", "data/noise", "--kind", "noise")
    speech = ["--val-fraction", "0.2", "--speaker-pattern", "([^/]+)/[^/]+$"]
    _call(zygote, folder, "prepare-data", "my_speech", "--out", "data/speech", *speech)
    for name, source in (("train", "speech/train"), ("val", "speech/val"), ("noise", "noise/train")):
        shutil.copy(folder / f"data/{source}_manifest.json", folder / f"{name}.json")
    data = ["manifest_filepath=train.json", "noise_manifest=noise.json"]
    words = [*(f"model.train_ds.{each}" for each in data), "model.validation_ds.manifest_filepath=val.json"]
    _call(zygote, folder, "pretrain", *words, *SMALLER["pretrain"])
    (checkpoints,) = folder.glob("nest_experiments/*/checkpoints")
    shutil.copy(next(checkpoints.glob("*-last.ckpt")), folder / "nest.ckpt")
    shutil.copy(next(checkpoints.glob("*.nemo")), folder / "nest.nemo")
    return folder


def _call(zygote: Zygote, folder: Path, *words: str) -> None:
    order: dict[str, object] = {
        "kind": "nest",
        "words": words,
        "cwd": str(folder),
        "environment": {},
        "seconds": SECONDS,
    }
    files = {"stdin": os.devnull, "stdout": os.devnull, "stderr": str(folder / ".errors")}
    assert zygote.call({**order, **files}) == 0, (folder / ".errors").read_text()
