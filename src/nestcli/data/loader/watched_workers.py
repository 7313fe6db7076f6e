"""The loader's processes watched by the one that waits for them: who died or hangs, and over which file.

A process that dies ends the run when the next batch is asked for, or is waited for. One that stays with the same file
for too long, or does nothing while a batch is waited for, is ended, and the run with it.
"""

from __future__ import annotations

import multiprocessing.process
import re
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from nestcli.data.loader.signals import START_METHOD
from nestcli.data.manifest import Manifest
from nestcli.errors import DataError, RunFailedError
from nestcli.jobs.activity import Note, Notes
from nestcli.storage import addresses, fetch

_POLL = 1.0  # s between looks while a batch is waited for
_GRACE = 2.0  # s that a process may take to move again: all may have been stopped together and gone on
_REMOTE = 300.0  # s without a byte of a remote file at least: those who fetch it try four times
_ENDING = 5.0  # s for killed processes to go
_PIDS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")  # PyTorch's message
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_STATES = {"T": "It is stopped (SIGSTOP). ", "D": "It waits for a disk or a file server. "}


class Watch:
    """What is known of the processes of one loader, that of the block `key`, which read the lines of `manifests`.

    `timeout` in seconds is how long a local file may take; None: for ever.
    """

    def __init__(self, workers: int, key: str, timeout: float | None, manifests: Sequence[Manifest] = ()) -> None:
        self.notes, self.key, self.timeout = Notes(workers, manifests), key, timeout
        self.manifests = manifests
        self.processes: Sequence[BaseProcess] = ()
        self.end: Callable[[], None] = lambda: None  # all processes
        self._suspected: dict[int, tuple[int, float]] = {}  # by process: the note that is too old, and when it was seen

    def look(self, awaited: Iterable[int] = (), waited: float = 0.0) -> None:
        """Raise RunFailedError if a process has died or hangs.

        A batch has been waited for `waited` seconds that one of the processes `awaited` is to send.
        """
        for number, process in enumerate(self.processes):
            if process.exitcode is not None:
                raise self._died(number)
        if self.timeout is None:
            return
        now, idle = time.monotonic(), set(awaited)
        for number in range(len(self.processes)):
            note = self.notes.of(number)
            expected = note.reading or (number in idle and waited >= self.timeout)
            if not expected or now - note.since < self.timeout or now - note.since < self._patience(note):
                self._suspected.pop(number, None)
            elif self._suspected.setdefault(number, (note.number, now))[0] != note.number:
                self._suspected[number] = (note.number, now)
            elif now - self._suspected[number][1] >= _GRACE:
                raise self._hangs(number, note, now - note.since if note.reading else waited)

    def explanation(self, error: RuntimeError) -> RunFailedError | None:
        """What PyTorch's message about a process that died means; None for another error."""
        found = _PIDS.search(str(error))
        pids = {int(pid) for pid in found[1].split(",")} if found else set()
        for number, process in enumerate(self.processes):
            if process.pid in pids:
                return self._died(number)
        return None

    def _patience(self, note: Note) -> float:
        """Seconds that what a note tells of may take."""
        assert self.timeout is not None
        return max(self.timeout, _REMOTE) if note.reading and self._is_remote(note) else self.timeout

    def _is_remote(self, note: Note) -> bool:
        if note.manifest < 0:
            return False
        manifest = self.manifests[note.manifest]
        shard, folder = int(manifest.shard_of[note.line]), manifest.sources[manifest.source_of[note.line]].folder
        file = self._name(note) if shard < 0 else manifest.shards[shard]
        return addresses.is_remote(file) or addresses.is_remote(folder)

    # ---- messages ----

    def _died(self, number: int) -> RunFailedError:
        code = self.processes[number].exitcode
        note = self.notes.of(number)
        how = f"was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"ended (exit code {code})"
        return RunFailedError(f"{self._who(number)} {how} {self._while(note)}. {self._remedy(code)}")

    def _remedy(self, code: int | None) -> str:
        memory = f"lower {self.key}.num_workers or the size of its batches"
        leave_out = (
            "take its line out of the manifest (`nest prepare-data` finds and leaves out files that crash their "
            "decoder). The same command goes on from the newest checkpoint."
        )
        if code is not None and -code in _CRASHES:
            shared = " (or is /dev/shm full?)" if -code == signal.SIGBUS else ""
            return f"The file may crash its decoder{shared}. If the run ends at it again, {leave_out}"
        if code == -signal.SIGKILL:
            return (
                f"If the system's memory was full (`dmesg` tells), {memory}. If the run ends at this file again, "
                f"{leave_out}"
            )
        return f"Look who ended it. If the run ends at this file again, {leave_out}"

    def _hangs(self, number: int, note: Note, seconds: float) -> RunFailedError:
        what = f"has been {self._doing(note)} for {seconds:.0f} s" if note.reading else (
            f"has not answered for {seconds:.0f} s; {self._last(note)}"
        )  # fmt: skip
        state = _STATES.get(_state(self.processes[number].pid), "")
        return RunFailedError(
            f"{self._who(number)} {what}. {state}Look whether the disk or the server that holds the file answers, then "
            "start again: the same command goes on from the newest checkpoint. If it is this file alone, take its line "
            f"out of the manifest. If files may take so long there, raise {self.key}.read_timeout ({self.timeout:g} s)."
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
        """A line's audio as its manifest has it: to look for it may be what hangs."""
        manifest = self.manifests[note.manifest]
        try:
            path = str(manifest.row(note.line)["audio_filepath"])
        except DataError:
            return ""
        shard = int(manifest.shard_of[note.line])
        return path if shard < 0 else f"{manifest.shards[shard]}: {path}"

    def _who(self, number: int) -> str:
        return f"the loader process {number} of {self.key} (pid {self.processes[number].pid})"


class WatchedLoader(DataLoader[Any]):
    """A DataLoader whose processes are watched, if there are any."""

    def __init__(self, *arguments: Any, watch: Watch | None = None, **options: Any) -> None:
        if watch is not None:
            options["worker_init_fn"] = watch.notes.enter
            if START_METHOD != "fork":  # nothing tells what a process does
                watch.timeout = None
        if options.get("num_workers"):
            options.setdefault("multiprocessing_context", START_METHOD)
        super().__init__(*arguments, **options)
        self.watch = watch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator of batches, as they come
        with explained([] if self.watch is None else [self.watch]):
            batches = super().__iter__()  # forks now, not when the first batch is asked for, perhaps by another thread
        return self.explaining(batches)

    def explaining(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; PyTorch's error about a lost process, while one is asked for, is made into ours."""
        with explained([] if self.watch is None else [self.watch]):
            yield from batches

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self.watch is None or self.num_workers == 0:
            return super()._get_iterator()
        self.watch.notes.forking()
        return _Watching(self, self.watch)


class _Watching(_MultiProcessingDataLoaderIter):
    """PyTorch's iterator, which looks at its processes while it waits, and does not wait for those that hang."""

    def __init__(self, loader: DataLoader[Any], watch: Watch) -> None:
        self._watch, self._asked = watch, 0.0
        super().__init__(loader)

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        self._forget_pids()
        self._watch.processes, self._watch.end = self._workers, _weakly(self)
        super()._reset(loader, first_iter)

    def _try_get_data(self, timeout: float = _POLL) -> tuple[bool, Any]:
        now = time.monotonic()
        self._asked = self._asked or now
        awaited = self._task_info.get(self._rcvd_idx)
        try:
            self._watch.look(awaited[:1] if awaited else range(self._num_workers), now - self._asked)
        except RunFailedError:
            self.end()
            raise
        success, data = super()._try_get_data(min(timeout, _POLL))  # type: ignore[no-untyped-call]
        if success:
            self._asked = 0.0
        return success, data

    def _shutdown_workers(self) -> None:
        if any(process.exitcode for process in getattr(self, "_workers", ())):
            self.end()  # one died; another may wait for a lock that it held
        if hasattr(self, "_shutdown"):  # else it was never whole: a process could not be started
            super()._shutdown_workers()

    def end(self) -> None:
        """End all processes: they are of no use without the one that is lost, and stopped ones hear nothing else."""
        for process in self._workers:
            process.kill()
        deadline = time.monotonic() + _ENDING
        for process in self._workers:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # in the kernel, where nothing reaches it: Python would wait for it at its end
                getattr(multiprocessing.process, "_children", set()).discard(process)

    def _forget_pids(self) -> None:
        """Keep PyTorch from raising its own error when a process dies, in the middle of whatever runs then.

        It does so from a signal handler. In the middle of a queue's `put`, say, that leaves a lock behind for which
        the process would wait at its end, for ever.
        """
        if self._worker_pids_set:
            self._worker_pids_set = False
            _remove_worker_pids(id(self))


def _weakly(iterator: _Watching) -> Callable[[], None]:
    """Its `end`, as long as it is there: nothing else is to keep it."""
    found = weakref.ref(iterator)

    def end() -> None:
        if (iterator := found()) is not None:
            iterator.end()

    return end


@contextmanager
def explained(watches: Iterable[Watch]) -> Iterator[None]:
    """Turn PyTorch's error about a loader process into a RunFailedError."""
    try:
        yield
    except RuntimeError as error:
        for watch in watches:
            if failure := watch.explanation(error):
                watch.end()
                raise failure from None
        raise


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _state(pid: int | None) -> str:
    """A process's state as Linux tells it: T stopped, D in the kernel; empty where that is not to be had."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
