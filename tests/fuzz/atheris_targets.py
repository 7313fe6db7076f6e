"""Coverage-guided fuzzing: `python tests/fuzz/atheris_targets.py TARGET [FOLDER] -runs=20000` (pip install atheris).

Each target gets bytes that atheris makes up, and lets only our own errors pass. A crash is written to crash-...; give
that file in place of FOLDER, which keeps what is worth going on with, to see it again.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["nestcli", "tarfile", "pickletools"], enable_loader_override=False):
    from nestcli.checkpoint.archive import open_archive
    from nestcli.checkpoint.nemo_config import plain_yaml
    from nestcli.checkpoint.weights import check_zip
    from nestcli.checks import check_plain, check_references
    from nestcli.config import _parse_value, _read_yaml
    from nestcli.data.manifest import to_row
    from nestcli.data.manifest_scan import expand, of_scan, scan
    from nestcli.data.tarred import _shar_row
    from nestcli.errors import NestError
    from nestcli.prepare.inputs import _any_row
    from nestcli.prepare.kaldi import read_kaldi
    from nestcli.storage.tar_members import TarMembers

FOLDER = Path(tempfile.mkdtemp(prefix="nest-fuzz-"))


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _rows(path: Path, reader: Any) -> None:
    manifest = of_scan(scan(str(path), require_duration=False, to_row=reader))
    for index in range(len(manifest)):
        manifest.entry(index)


def manifest(data: bytes) -> None:
    _rows(_file("a.json", data), to_row)


def cuts(data: bytes) -> None:
    _rows(_file("a.jsonl.gz", gzip.compress(data[1:], 1)), (to_row, _any_row, _shar_row)[sum(data[:1]) % 3])


def kaldi(data: bytes) -> None:
    scp, _, segments = data.partition(b"\xff")
    _file("wav.scp", scp)
    _file("segments", segments)
    list(read_kaldi(FOLDER))


def ranges(data: bytes) -> None:
    if b".." not in data or len(max(data.split(b".."), key=len)) < 5:  # no million of names for each
        expand(data.decode("utf-8", "replace"))


def configuration(data: bytes) -> None:
    check_references(_read_yaml(_file("a.yaml", data)), "a.yaml")


def override(data: bytes) -> None:
    _parse_value(data.decode("utf-8", "replace"), "seed=...")


def stored_configuration(data: bytes) -> None:
    check_plain(plain_yaml(data, "a.nemo"), "a.nemo")


def references(data: bytes) -> None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(content, dict):
        check_references(content, "a.yaml")


def archive(data: bytes) -> None:
    with open_archive(_file("a.nemo", data)) as found:
        for name in found.members:
            found.open(name)[0].read()


def weights(data: bytes) -> None:
    """Use the bytes as the pickle in an intact zip: a damaged zip would already be refused at its directory."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a/data.pkl", data)
    packed.seek(0)
    check_zip(packed, len(packed.getvalue()), "a.nemo")


def shard(data: bytes) -> None:
    members = TarMembers(str(_file("a.tar", data)))
    for name in members.members:
        members.read(name)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        manifest, cuts, kaldi, ranges, configuration, override, stored_configuration, references, archive,
        weights, shard,
    )
}  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv.pop(1)]

    def one(data: bytes) -> None:
        try:
            target(data)
        except NestError as error:
            assert str(error)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
