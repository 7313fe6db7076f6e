"""Manifests, cuts, Kaldi's tables and ranges of shards: valid ones are read, odd ones refused by name."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz.strategies import altered, any_text, bounded, damaged, one_line, scalars
from nestcli.data import manifest_scan as scan_module
from nestcli.data.manifest import MAX_SECONDS, to_row, write_manifest
from nestcli.data.manifest_scan import expand, of_scan, read_manifests, scan
from nestcli.data.tarred import _shar_row
from nestcli.errors import DataError
from nestcli.prepare.inputs import _any_row, collect
from nestcli.prepare.kaldi import read_kaldi

seconds = st.floats(0, MAX_SECONDS) | st.integers(0, int(MAX_SECONDS))
paths = any_text.filter(lambda p: p and "\0" not in p and "://" not in p and not re.match(r"pipe:|\||.*\|\Z", p, re.S))
rows = st.fixed_dictionaries(
    {"audio_filepath": paths, "duration": seconds},
    optional={"offset": seconds, "speaker": scalars, "text": any_text, "lang": st.none() | any_text},
).flatmap(lambda row: st.dictionaries(any_text, scalars, max_size=2).map(lambda extra: {**extra, **row}))

CUT = {
    "id": "c",
    "start": 0.5,
    "duration": 1.0,
    "channel": 0,
    "type": "MonoCut",
    "supervisions": [{"id": "s", "start": 0, "duration": 1, "text": "hé", "speaker": "m", "language": "fr"}],
    "recording": {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "/r.wav"}], "duration": 2.0},
}
LINES = one_line({"audio_filepath": "/é.wav", "duration": 1.5, "offset": 0.5, "speaker": "m", "shard_id": 3})
VALID = LINES + b"\n" + one_line({"audio_filename": "b.wav", "duration": 2}) + one_line(CUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifests")


def read_or_refused(path: Path, **how: Any) -> str:
    """Return the columns and rows of a manifest's scan, or an error that names the file and an existing line."""
    try:
        manifest = of_scan(scan(str(path), **how))
    except DataError as error:
        assert str(path) in str(error)
        line = re.search(r", line (\d+): ", str(error).removeprefix(str(path)[:-1]))
        if line and path.suffix != ".gz":
            assert 1 <= int(line[1]) <= path.read_bytes().count(b"\n") + 1
        return str(error)
    assert len(manifest)
    for column in (manifest.durations, manifest.offsets):
        known = column[~np.isnan(column)]
        assert ((known >= 0) & (known <= MAX_SECONDS)).all()
    assert how.get("require_duration") is False or not np.isnan(manifest.durations).any()
    entries = [manifest.entry(index) for index in range(len(manifest))]
    assert all(isinstance(entry.audio_filepath, str) and entry.audio_filepath for entry in entries)
    return repr((manifest.durations.tolist(), manifest.offsets.tolist(), entries))


@given(written=st.lists(rows, min_size=1, max_size=4), packed=st.booleans())
@bounded(150)
def test_what_is_written_is_read(folder: Path, written: list[dict[str, Any]], packed: bool) -> None:
    path = folder / "written.json"
    write_manifest(path, written)
    if packed:
        content = path.read_bytes()
        path = folder / "written.json.gz"
        path.write_bytes(gzip.compress(content))
    manifest = read_manifests([str(path)])
    assert [manifest.row(index) for index in range(len(manifest))] == written
    assert manifest.durations.tolist() == [row["duration"] for row in written]
    assert manifest.offsets.tolist() == [row.get("offset", 0.0) for row in written]
    for index, row in enumerate(written):
        entry = manifest.entry(index)
        assert entry.line == index + 1
        assert (entry.text, entry.lang) == (row.get("text"), row.get("lang"))
        assert entry.audio_filepath.endswith(row["audio_filepath"].removeprefix("~")[-3:])


@given(content=damaged(VALID) | damaged(LINES * 3) | st.binary(max_size=60))
@bounded(200)
def test_any_bytes_are_read_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "any.json"
    path.write_bytes(content)
    read_or_refused(path)
    path = folder / "any.json.gz"
    path.write_bytes(gzip.compress(content, mtime=0))
    read_or_refused(path)


@given(content=damaged(gzip.compress(VALID, mtime=0), [(0, 12)]))
@bounded(100)
def test_any_damage_to_a_packed_manifest(folder: Path, content: bytes) -> None:
    path = folder / "damaged.jsonl.gz"
    path.write_bytes(content)
    read_or_refused(path)


@given(content=damaged(VALID * 3), step=st.integers(1, 400))
@bounded(100)
def test_ranges_of_a_file_give_what_the_whole_gives(folder: Path, content: bytes, step: int) -> None:
    path = folder / "ranges.json"
    path.write_bytes(content)
    whole = read_or_refused(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_PIECE", step)
        patch.setattr(scan_module, "available_cores", lambda: 1)
        assert read_or_refused(path) == whole


ROW = {"audio_filepath": "a.wav", "duration": 1.0, "offset": 0.5, "shard_id": 3, "speaker": "m", "text": "x"}
SHAR = {**CUT, "recording": {**CUT["recording"], "sources": [{"type": "shar", "channels": [0], "source": ""}]}}
likely = (None, 0, 3, -1, 1e9, True, "", "shar", "file", "command", "pipe:x", [], [3], {}, [{"name": "Resample"}])


@given(
    record=st.sampled_from([CUT, SHAR, CUT["recording"], ROW]).flatmap(lambda record: altered(record, *likely)),
    reader=st.sampled_from([to_row, _any_row, _shar_row]),
    required=st.booleans(),
)
@bounded(250)
def test_any_record_is_an_utterance_or_refused(folder: Path, record: Any, reader: Any, required: bool) -> None:
    path = folder / "record.jsonl"
    path.write_bytes(one_line(record))
    read_or_refused(path, require_duration=required, to_row=reader)


@given(depth=st.integers(1, 3000), packed=st.booleans())
@example(depth=900, packed=True)
@bounded(25)
def test_any_depth_is_read_or_refused(folder: Path, depth: int, packed: bool) -> None:
    line = b'{"audio_filepath": "a.wav", "duration": 1, "x": ' + b"[" * depth + b"]" * depth + b"}\n"
    for name, content in (("deep", line), ("odd", line.replace(b'"a.wav"', b"[" * depth + b"]" * depth))):
        path = folder / (f"{name}.json.gz" if packed else f"{name}.json")
        path.write_bytes(gzip.compress(content) if packed else content)
        read_or_refused(path)


# ---- Kaldi -----------------------------------------------------------------------------------------------------

TABLES = {
    "wav.scp": "r1 /data/é.wav\nr2 sph2pipe x |\n",
    "segments": "u1 r1 0.5 1.25\nu2 r2 0 -1\n",
    "utt2spk": "u1 m\n",
    "text": "u1 hello world\nu2\n",
}
fields = any_text.map(lambda text: "".join(text.split())) | st.sampled_from(
    ["~x", "~/a", "a" * 300, "-1", "nan", "inf", "r1", "|"]
)
moments = st.sampled_from(["0", "-1", "0.5", "2", "1e7", "inf", "nan", "1_0", "x"])
spans = st.builds("u {} {} {}".format, st.sampled_from(["r1", "r3"]), moments, moments).map(str.encode)
tables = st.lists(st.lists(fields, max_size=4).map(" ".join), max_size=3).map(
    lambda each: "\n".join(each).encode("utf-8", "replace")
)


@given(name=st.sampled_from(sorted(TABLES)), content=st.data())
@bounded(200)
def test_any_table_of_kaldis_is_read_or_refused(folder: Path, name: str, content: st.DataObject) -> None:
    place = folder / "kaldi"
    place.mkdir(exist_ok=True)
    for each, text in TABLES.items():
        (place / each).write_text(text)
    (place / name).write_bytes(content.draw(damaged(TABLES[name].encode()) | tables | spans))
    try:
        utterances = list(read_kaldi(place))
        items = collect([place], folder / "out").items
    except DataError as error:
        assert str(place / name) in str(error) or (name == "wav.scp" and str(place / "segments") in str(error))
        return
    assert [item.facts["id"] for item in items if item.facts] == [each.name for each in utterances]
    for item, each in zip(items, utterances, strict=True):
        assert (item.refused is None) == (each.path is not None)
        assert each.offset >= 0
        assert each.duration is None or 0 <= each.duration <= MAX_SECONDS


names = st.text(st.sampled_from("abr12 -_é."), min_size=1, max_size=6).filter(lambda n: n == n.strip())


@given(table=st.dictionaries(names.map(lambda n: n.replace(" ", "_")), names, min_size=1, max_size=5))
@bounded(50)
def test_kaldis_recordings_are_read_as_they_stand(folder: Path, table: dict[str, str]) -> None:
    place = folder / "plain"
    place.mkdir(exist_ok=True)
    (place / "wav.scp").write_text("".join(f"{name} /data/x{path}y\n" for name, path in table.items()))
    assert [(each.name, each.path) for each in read_kaldi(place)] == [
        (n, f"/data/x{path}y") for n, path in table.items()
    ]


# ---- ranges ----------------------------------------------------------------------------------------------------


@given(
    before=st.text("ab/_", max_size=4),
    after=st.sampled_from(["", ".tar", "_x.tar"]),
    first=st.integers(0, 200),
    count=st.integers(1, 30),
    width=st.integers(0, 5),
    brackets=st.sampled_from(["_OP_ _CL_", "{ }", "( )", "[ ]", "< >"]),
)
@bounded(80)
def test_a_range_stands_for_its_files(
    before: str, after: str, first: int, count: int, width: int, brackets: str
) -> None:
    opening, closing = brackets.split()
    last = first + count - 1
    start = f"{first:0{width}}"
    padded = width if start.startswith("0") else 0
    padded = len(start) if start.startswith("0") else padded
    found = expand(f"/none{before}{opening}{start}..{last}{closing}{after}")
    # a path is given back as pathlib writes it: `//` is `/`
    assert found == [str(Path(f"/none{before}{number:0{padded}}{after}")) for number in range(first, last + 1)]


pieces = st.sampled_from(
    ["_OP_0..3_CL_", "{0..999999}", "{5..1}", "{0..9999999999}", "~nobody", "a" * 300, "\0", "x,y", "٣", ".."]
)


@given(given_path=st.lists(pieces | any_text, max_size=6).map("".join))
@example(given_path="{0..999999}" * 3)
@example(given_path="a{0..1}" * 400)
@example(given_path="{0.." + "9" * 5000 + "}")
@bounded(120)
def test_any_path_of_shards_is_expanded_or_refused(given_path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_MOST_SHARDS", 1000)
        try:
            found = expand(given_path)
        except DataError as error:
            assert len(str(error)) < 500
            return
    assert len(found) <= 1000 * (given_path.count(",") + 1)
    assert all(isinstance(each, str) for each in found)


@given(count=st.integers(1, 200), length=st.integers(1, 120))
@bounded(20)
def test_any_number_of_manifests_may_be_joined_by_commas(folder: Path, count: int, length: int) -> None:
    path = folder / f"{'m' * length}.json"
    path.write_bytes(LINES)
    assert len(read_manifests(",".join(itertools.repeat(str(path), count)))) == count
    json.loads(path.read_text())
