"""What a long command has done so far, so that the same command goes on after any interruption."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestcli.errors import DataError

NAME = ".prepared.jsonl"
_VERSION = 1


class Journal:
    """Results by key, appended to a file as they come; a line that a kill cut off does not count."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._done: dict[str, Any] = dict(self._read())
        self._file = self._path.open("a", encoding="utf-8")

    def get(self, key: str) -> Any:
        """The result of an earlier run; None if there is none."""
        return self._done.get(key)

    def add(self, key: str, result: Any) -> None:
        self._file.write(json.dumps([_VERSION, key, result]) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self._done.clear()

    def _read(self) -> Iterator[tuple[str, Any]]:
        if not self._path.is_file():
            return
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self._path.open("r+b") as file:  # the next line shall begin a line
                file.truncate(len(whole))
        for line in whole.splitlines():
            try:
                version, key, result = json.loads(line)
            except (ValueError, TypeError):
                continue
            if version == _VERSION:
                yield key, result


@contextmanager
def open_journal(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, for one process at a time. Raises DataError while another works there."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"another run of nest is writing to {folder}; wait for it, or give another --out") from None
        journal = Journal(folder)
        try:
            yield journal
        finally:
            journal.close()
