"""Watch the loader processes while the trainer waits for a batch; report a process that died or hangs, and its file.

The run ends with an error at the next batch if a process died, reads the same file for too long, or does nothing
although its batch is late.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from nestcli.data.manifest import Manifest
from nestcli.errors import DataError, RunFailedError
from nestcli.files import is_remote
from nestcli.jobs.activity import NOTHING, Note, Notes
from nestcli.storage import fetch

# Forked processes write notes into memory that the trainer reads. Of spawned ones (macOS), only the death is noticed.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

_GRACE = 2.0  # s for a suspected process to progress: all processes may have been suspended and resumed together
_REMOTE = 300.0  # minimum time limit in s without a byte of a remote file: a download makes four attempts
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_STATES = {"T": "It is stopped (SIGSTOP). ", "D": "It waits for a disk or a file server. "}


class Watch:
    """Watches the `workers` processes of the loader of block `key`, which read the lines of `manifests`.

    `timeout` in seconds is how long a local file may take; None: no limit.
    """

    def __init__(self, workers: int, key: str, timeout: float | None, manifests: Sequence[Manifest] = ()) -> None:
        forked = START_METHOD == "fork"
        self.notes = Notes(workers, manifests) if forked else None
        self.key, self.timeout, self.manifests = key, timeout if forked else None, manifests
        self.processes: Sequence[BaseProcess] = ()
        self._suspected: dict[int, tuple[int, float]] = {}  # process -> number of its overdue note, time of the finding

    def look(self, awaited: int | None = None, waited: float = 0.0) -> None:
        """Raise RunFailedError if a process has died or hangs. `awaited` is late with its batch by `waited` seconds."""
        for number, process in enumerate(self.processes):
            if process.exitcode is not None:
                raise self._died(number)
        if self.timeout is None:
            return
        now = time.monotonic()
        for number in range(len(self.processes)):
            note = self._note(number)
            expected = note.reading or (number == awaited and waited >= self.timeout)
            if not expected or now - note.since < self.timeout or now - note.since < self._patience(note):
                self._suspected.pop(number, None)
            elif self._suspected.setdefault(number, (note.number, now))[0] != note.number:
                self._suspected[number] = (note.number, now)
            elif now - self._suspected[number][1] >= _GRACE:
                raise self._hangs(number, note, now - note.since if note.reading else waited)

    def _note(self, number: int) -> Note:
        return NOTHING if self.notes is None else self.notes.of(number)

    def _patience(self, note: Note) -> float:
        """Return the time limit in seconds for the activity that a note describes."""
        assert self.timeout is not None
        return max(self.timeout, _REMOTE) if note.reading and self._is_remote(note) else self.timeout

    def _is_remote(self, note: Note) -> bool:
        if note.manifest < 0:
            return False
        manifest = self.manifests[note.manifest]
        shard, folder = int(manifest.shard_of[note.line]), manifest.sources[manifest.source_of[note.line]].folder
        file = self._name(note) if shard < 0 else manifest.shards[shard]
        return is_remote(file) or is_remote(folder)

    # ---- messages ----

    def _died(self, number: int) -> RunFailedError:
        code = self.processes[number].exitcode
        note = self._note(number)
        how = f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended (exit code {code})"
        return RunFailedError(f"{self._who(number)} {how} {self._while(note)}. {self._remedy(code)}")

    def _remedy(self, code: int | None) -> str:
        memory = f"lower {self.key}.num_workers or the size of its batches"
        leave_out = (
            "take its line out of the manifest (`nest prepare-data` finds and leaves out files that crash their "
            "decoder). The same command resumes from the newest checkpoint."
        )
        if code is not None and -code in _CRASHES:
            return f"The file may crash its decoder. If the run ends at it again, {leave_out}"
        if code == -signal.SIGKILL:
            return (
                f"If the system's memory was full (`dmesg` tells), {memory}. If the run ends at this file again, "
                f"{leave_out}"
            )
        return (
            f"Find out what ended it (for a signal, `dmesg` may tell). If the run ends at this file again, {leave_out}"
        )

    def _hangs(self, number: int, note: Note, seconds: float) -> RunFailedError:
        what = f"has been {self._doing(note)} for {seconds:.0f} s" if note.reading else (
            f"has not answered for {seconds:.0f} s; {self._last(note)}"
        )  # fmt: skip
        state = _STATES.get(_state(self.processes[number].pid), "")
        return RunFailedError(
            f"{self._who(number)} {what}. {state}Check that the disk or server with this file responds, then give "
            "the same command again: it resumes from the newest checkpoint. If only this file hangs, take its line out "
            f"of the manifest. If files may take so long there, raise {self.key}.read_timeout ({self.timeout:g} s)."
        )

    def _while(self, note: Note) -> str:
        return f"while {self._doing(note)}" if note.reading else f"between two files; {self._last(note)}"

    def _doing(self, note: Note) -> str:
        return f"reading {self._file(note)}"

    def _last(self, note: Note) -> str:
        return "it had not read any" if note.manifest < 0 else f"the last one that it read is {self._file(note)}"

    def _file(self, note: Note) -> str:
        if note.manifest < 0:
            return "a file"
        where = self.manifests[note.manifest].where(note.line)
        name = fetch.shown(self._name(note))
        return f"{name} ({where})" if name else f"the file of {where}"

    def _name(self, note: Note) -> str:
        """Return a line's audio as the manifest has it. Looking for the file could hang too."""
        manifest = self.manifests[note.manifest]
        try:
            path = str(manifest.row(note.line)["audio_filepath"])
        except DataError:
            return ""
        shard = int(manifest.shard_of[note.line])
        return path if shard < 0 else f"{manifest.shards[shard]}: {path}"

    def _who(self, number: int) -> str:
        return f"the loader process {number} of {self.key} (pid {self.processes[number].pid})"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _state(pid: int | None) -> str:
    """Return a process's state on Linux: T stopped, D in the kernel; empty if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
