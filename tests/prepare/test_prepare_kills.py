"""`nest prepare-data` killed, interrupted or out of room at any moment: the same command ends with the same bytes."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from prepare.dirty import make

OPTIONS = ("--convert", "--segment", "0.5", "--shards", "3", "--val-fraction", "0.2", "--jobs", "2")
OWN = (".prepared.jsonl", ".lock")
# files that appear in DIR during a run, and the stage that begins with each
STAGES = {
    "start": "",
    "checking": ".prepared.jsonl",
    "converting": "audio/.prepared.jsonl",
    "writing the manifests": "rejected.jsonl",
    "packing": "train_shards/.prepared.jsonl",
    "writing the lists of the shards": "train_shards/tarred_audio_manifest.json",
    "packing validation": "val_shards/.prepared.jsonl",
    "writing the summary": "val_shards/tarred_audio_manifest.json",
    "drawing": "summary.svg",
}


def content(out: Path) -> dict[str, bytes]:
    """The bytes of every file in DIR, hidden ones too, but for the journals and the lock."""
    found = (path for path in out.rglob("*") if path.is_file() and path.name not in OWN)
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


@dataclass
class Runs:
    """The command on one corpus, into one DIR: its absolute paths stand in what is written."""

    folder: Path
    options: tuple[str, ...] = OPTIONS
    whole: dict[str, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    killed_in: Counter[str] = field(default_factory=Counter)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def start(self, limit: int | None = None, options: tuple[str, ...] | None = None) -> subprocess.Popen[str]:
        """The real command, the first of a group of processes; `limit` is the size in bytes that no file may exceed."""

        def before() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-m", "nestcli", "prepare-data", str(self.folder / "in"), "--out", str(self.out)]
        with (self.folder / "stderr").open("w") as log:
            return subprocess.Popen(
                [*command, *(self.options if options is None else options)],
                stdout=subprocess.DEVNULL,
                stderr=log if limit is None else subprocess.PIPE,  # a pipe has no limit
                text=True,
                start_new_session=True,
                preexec_fn=before,
            )

    def said(self) -> str:
        return " ".join((self.folder / "stderr").read_text().split())

    def unbroken(self) -> None:
        """Run to the end twice: for the bytes to compare with, and how long that takes."""
        for _ in range(2):
            shutil.rmtree(self.out, ignore_errors=True)
            began = time.monotonic()
            assert self.start().wait() == 0, self.said()
            self.seconds = time.monotonic() - began
            made, self.whole = self.whole, content(self.out)
        assert made == self.whole
        assert {"summary.json", "rejected.jsonl", "train_shards/skipped.jsonl"} <= self.whole.keys()

    def stage(self) -> str:
        return (
            [stage for stage, name in STAGES.items() if (self.out / name).exists()][-1]
            if self.out.exists()
            else "start"
        )

    def kill(self, moment: Callable[[float], bool], whom: str = "group", how: int = signal.SIGKILL) -> bool:
        """Start a run and kill it at a moment, told by the seconds since its start; False if it ended before."""
        began = time.monotonic()
        process = self.start()
        while not moment(time.monotonic() - began):
            if process.poll() is not None:
                assert process.returncode == 0, self.said()
                return False
            time.sleep(0.0005)
        if process.poll() is not None:
            return False
        if whom == "group":
            os.killpg(process.pid, how)
        else:  # its workers find out by themselves, and may still be at it when the next run starts
            process.send_signal(how)
        code = process.wait()
        done = (
            how == signal.SIGINT and "shows durations and levels" in self.said()
        )  # the last that a run says; Python was leaving
        if code == 0 or (code == -how and done):  # it was quicker
            return False
        assert code == (130 if how == signal.SIGINT else -how), (code, self.said())
        if how != signal.SIGKILL:  # else the next run starts beside workers that have not found out yet
            self.wait_for_workers(process.pid)
        self.killed_in[self.stage()] += 1
        return True

    def wait_for_workers(self, group: int) -> None:
        """All processes of a killed run end, or the test fails."""
        deadline = time.monotonic() + 60
        while alive := living(group):
            assert time.monotonic() < deadline, f"{alive} still run"
            time.sleep(0.01)

    def resume(self) -> None:
        assert self.start().wait() == 0, self.said()
        now = content(self.out)
        assert sorted(now) == sorted(self.whole)
        assert [name for name in now if now[name] != self.whole[name]] == []

    def at(self, seconds: float) -> Callable[[float], bool]:
        return lambda passed: passed >= seconds

    def when(self, name: str, later: float) -> Callable[[float], bool]:
        """Some seconds after a file has appeared in DIR."""
        seen: list[float] = []

        def moment(passed: float) -> bool:
            if not seen and (self.out / name).exists():
                seen.append(passed)
            return bool(seen) and passed >= seen[0] + later

        return moment


def living(group: int) -> list[str]:
    """The processes of a group, without those that ended and that nobody has asked after."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = status.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if of_group == str(group) and state != "Z":
            found.append(status.parent.name)
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    found = Runs(tmp_path)
    make(tmp_path / "in", good=100, each=1)
    found.unbroken()
    return found


@pytest.mark.slow
def test_fifty_kills_change_nothing(runs: Runs) -> None:
    """Kill 50 first runs at moments spread over their length; a moment that came too late is drawn again, earlier."""
    draw = random.Random(50)
    kills = 0
    moments = [(number + draw.random()) / 38 for number in range(38)]
    for share in moments:
        while True:
            shutil.rmtree(runs.out, ignore_errors=True)
            if runs.kill(runs.at(share * runs.seconds), draw.choice(("group", "group", "main"))):
                break
            share *= 0.9
        kills += 1
        runs.resume()
    by_time = runs.killed_in.copy()
    for number in range(12):  # the writing takes milliseconds, which times hardly ever meet
        stage = list(STAGES)[1 + number % (len(STAGES) - 1)]
        while True:
            shutil.rmtree(runs.out, ignore_errors=True)
            if runs.kill(runs.when(STAGES[stage], draw.uniform(0, 0.005))):
                break
        kills += 1
        runs.resume()
    print(f"\n{kills} kills of runs of {runs.seconds:.1f} s: {dict(runs.killed_in)}; by time: {dict(by_time)}")
    assert kills == sum(runs.killed_in.values()) == 50
    assert by_time["start"] <= 19, "most kills must hit running work"
    assert len(runs.killed_in) >= 6


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_the_same(runs: Runs) -> None:
    """Kill resumed runs too: each gets a little further, up to the next kill."""
    draw, pace = random.Random(5), 1.0
    for _ in range(3):
        kills = 0
        while kills < 2:  # a chain that ended before its second kill, on a machine that is idle again, starts over
            shutil.rmtree(runs.out, ignore_errors=True)
            kills = 0
            while kills < 7 and runs.kill(runs.at(pace * runs.seconds * draw.uniform(0.3, 0.8))):
                kills += 1
            pace = pace if kills >= 2 else 0.7 * pace
            assert pace > 0.1
        runs.resume()
    print(f"\n{sum(runs.killed_in.values())} kills in 3 chains: {dict(runs.killed_in)}")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_goes_on(runs: Runs, how: int) -> None:
    draw = random.Random(how)
    for stage in ("checking", "converting", "packing", "writing the summary"):
        shutil.rmtree(runs.out, ignore_errors=True)
        first, second = runs.when(STAGES[stage], draw.uniform(0, 0.05)), runs.at(runs.seconds * draw.uniform(0.4, 0.7))
        for moment, whom in ((first, "group"), (second, "main")):  # Ctrl-C in a terminal reaches the workers too
            runs.kill(moment, whom, how)
            said = runs.said()
            assert "Traceback" not in said
            assert "internal error" not in said
        runs.resume()
    assert sum(runs.killed_in.values()) >= 4


def assert_told(runs: Runs, limit: int, what: str) -> None:
    """A run that may write no file of more than `limit` bytes names the one it could not write, and can resume."""
    process = runs.start(limit)
    said = " ".join(process.communicate()[1].split())
    assert process.returncode == 1, said
    assert f"{what} cannot be written: File too large." in said
    assert "Run the same command again to continue." in said
    assert "Traceback" not in said
    assert not list(runs.out.rglob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on(runs: Runs) -> None:
    """The kernel refuses to write more than a number of bytes to any file."""
    shutil.rmtree(runs.out)
    for limit, what in ((0, ".prepared.jsonl"), (12_000, ".prepared.jsonl")):
        assert_told(runs, limit, what)
    assert runs.start(options=("--jobs", "2")).wait() == 0  # the checks are done; now what follows has no room
    for limit, what in ((3_000, ".flac"), (30_000, "audio/.prepared.jsonl"), (200_000, ".tar")):
        assert_told(runs, limit, what)
    runs.resume()
    runs.options = (*OPTIONS, "--format", "shar")
    runs.unbroken()
    shutil.rmtree(runs.out / "train_shards")
    assert_told(runs, 200_000, "")
    runs.resume()
