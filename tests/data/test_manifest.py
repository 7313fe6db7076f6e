"""Reading NeMo manifests and Lhotse cuts, and writing manifests."""

import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nestcli.data import manifest_scan as module
from nestcli.data.manifest import write_manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "audio"


def row(name="a.wav", duration=1.5, **more):
    return {"audio_filepath": name, "duration": duration, **more}


def cut(**changes):
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": "/data/r.wav"}],
        "sampling_rate": 16000,
        "num_samples": 160000,
        "duration": 10.0,
        "channel_ids": [0],
    }
    supervision = {"id": "s", "start": 0, "duration": 2, "text": "hé", "language": "fr", "speaker": "m"}
    whole = {"id": "c", "start": 1.5, "duration": 2.0, "channel": 0, "supervisions": [supervision]}
    return {**whole, "recording": {**recording, **changes.pop("recording", {})}, "type": "MonoCut", **changes}


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.json"


def test_an_entry_has_what_its_line_says(path):
    first = row("/x/é.wav", 2, offset=0.25, speaker=17, text="hé\u2028", lang="fr", other=[1])
    manifest = read_manifests(lines(path, first, row("/x/b.wav")))
    assert len(manifest) == 2
    entry = manifest.entry(0)
    assert (entry.audio_filepath, entry.duration, entry.offset) == ("/x/é.wav", 2.0, 0.25)
    assert (entry.speaker, entry.text, entry.lang) == ("17", "hé\u2028", "fr")
    assert (entry.line, entry.manifest) == (1, str(path))
    assert manifest.row(0)["other"] == [1]
    assert manifest.entry(1).offset == 0.0
    assert manifest.entry(1).speaker is None
    assert manifest.durations.dtype == np.float64
    np.testing.assert_array_equal(manifest.durations, [2, 1.5])


def test_several_manifests_are_one(tmp_path):
    a = lines(tmp_path / "a.json", row("/1.wav", 1), row("/2.wav", 2))
    b = lines(tmp_path / "b, c.json", row("/3.wav", 3))
    for paths in ([a, b], [a, Path(b)]):
        manifest = read_manifests(paths)
        assert [manifest.entry(i).audio_filepath for i in range(3)] == ["/1.wav", "/2.wav", "/3.wav"]
        assert [manifest.entry(i).line for i in range(3)] == [1, 2, 1]
    assert len(read_manifests(f"{a},{a}")) == 4
    assert len(read_manifests(b)) == 1


def test_selections_and_pickles_read_the_same(path):
    manifest = read_manifests(lines(path, *(row(f"/{i}.wav", i) for i in range(5))))
    chosen = manifest.select(np.array([4, 0, 4]))
    np.testing.assert_array_equal(chosen.durations, [4, 0, 4])
    assert manifest.entry(0).line == 1  # opens the file, which a pickle must not carry along
    copy = pickle.loads(pickle.dumps(chosen))
    assert [copy.entry(i) for i in range(3)] == [manifest.entry(i) for i in (4, 0, 4)]
    assert len(manifest.select(manifest.durations > 2)) == 2
    assert len(manifest.select([])) == 0


def test_forked_processes_read_without_disturbing_each_other(path):
    code = f"""
import os, sys
from nestcli.data.manifest_scan import read_manifests
manifest = read_manifests({lines(path, *(row(f"/{i}.wav", i) for i in range(200)))!r})
manifest.entry(0)
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        good = all(manifest.entry(i).audio_filepath == f"/{{i}}.wav" for i in range(200) for _ in range(3))
        os._exit(0 if good else 1)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_relative_paths_are_looked_for_beside_the_manifest(tmp_path, path, monkeypatch):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "a.wav").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lines(path, row("wavs/a.wav"), row("wavs/b.wav"))
    monkeypatch.chdir(tmp_path)
    manifest = read_manifests("m.json")
    monkeypatch.chdir(elsewhere)
    assert manifest.entry(0).audio_filepath == str(tmp_path / "wavs" / "a.wav")
    assert manifest.entry(1).audio_filepath == "wavs/b.wav"


def test_byte_order_mark_blank_lines_and_a_missing_last_newline_are_fine(path):
    path.write_bytes(
        b"\xef\xbb\xbf"
        + json.dumps(row("/a.wav")).encode()
        + b"\r\n\n  \n"
        + b'{"audio_filename": "/b.wav", "duration": 2}'
    )
    manifest = read_manifests(str(path))
    assert [manifest.entry(i).audio_filepath for i in range(2)] == ["/a.wav", "/b.wav"]
    assert [manifest.entry(i).line for i in range(2)] == [1, 4]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("no json", "not JSON"),
        ("[1]", "not a JSON object"),
        ("3", "not a JSON object"),
        ('{"duration": 1}', "audio_filepath"),
        ('{"audio_filepath": "", "duration": 1}', "audio_filepath"),
        ('{"audio_filepath": ["a", "b"], "duration": 1}', "one file"),
        ('{"audio_filepath": "a"}', "duration"),
        ('{"audio_filepath": "a", "duration": null}', "duration"),
        ('{"audio_filepath": "a", "duration": NaN}', "nan"),
        ('{"audio_filepath": "a", "duration": -1}', "-1"),
        ('{"audio_filepath": "a", "duration": 1e308}', "1e+308"),
        ('{"audio_filepath": "a", "duration": 1e999}', "inf"),
        ('{"audio_filepath": "a", "duration": 1' + "0" * 400 + "}", "1000"),
        ('{"audio_filepath": "a", "duration": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"audio_filepath": "a", "duration": true}', "True"),
        ('{"audio_filepath": "a", "duration": "3"}', "'3'"),
        ('{"audio_filepath": "a", "duration": 1, "offset": -0.5}', "offset"),
        ('{"audio_filepath": "pipe: cat a", "duration": 1}', "command"),
        ('{"audio_filepath": "cat a |", "duration": 1}', "command"),
        ('{"audio_filepath": "ftp://a/b.wav", "duration": 1}', "address"),
        ('{"audio_filepath": "a\\u0000b", "duration": 1}', "a zero byte"),
        ("[" * 100_000, "not JSON"),
        ('{"id": "r", "sources": []}', "recording"),
    ],
)
def test_a_bad_line_is_named(path, bad, said):
    path.write_text(json.dumps(row()) + "\n" + bad + "\n")
    with pytest.raises(DataError, match=r"m\.json, line 2: ") as error:
        read_manifests(str(path))
    assert said in str(error.value)
    assert len(str(error.value)) < 400


def test_a_line_cut_off_is_named(path):
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row())[:-7])
    with pytest.raises(DataError, match="line 2: the line is cut off"):
        read_manifests(str(path))


def test_bytes_that_are_not_utf8_and_giant_lines_are_named(path):
    path.write_bytes(b'{"audio_filepath": "\xe9.wav", "duration": 1}\n')
    with pytest.raises(DataError, match="line 1: this is not JSON"):
        read_manifests(str(path))
    path.write_bytes(b'{"audio_filepath": "' + b"a" * (1 << 21))
    with pytest.raises(DataError, match="line 1: the line is longer than 1 MiB"):
        read_manifests(str(path))


def test_what_is_no_manifest_is_refused(tmp_path, path):
    path.touch()
    os.mkfifo(tmp_path / "pipe")
    for name, said in [("m.json", "no lines"), ("gone", "No such file"), (".", "folder"), ("pipe", "pipe")]:
        with pytest.raises(DataError, match=said):
            read_manifests(str(tmp_path / name))
    with pytest.raises(DataError, match="device"):
        read_manifests("/dev/zero")
    with pytest.raises(DataError, match="no manifest"):
        read_manifests(" , ")


def test_the_manifest_that_was_meant_is_named(tmp_path):
    (tmp_path / "train_manifest.json").touch()
    for name in (tmp_path, tmp_path / "train.json"):
        with pytest.raises(DataError, match=rf"Did you mean {re.escape(str(tmp_path))}/train_manifest\.json\?"):
            read_manifests(str(name))
    (tmp_path / "audio").mkdir()
    with pytest.raises(DataError, match=r"is a folder; .*nest prepare-data"):
        read_manifests(str(tmp_path / "audio"))


def test_durations_may_be_unknown_where_that_is_allowed(path):
    manifest = read_manifests(lines(path, {"audio_filepath": "/a.wav"}), require_duration=False)
    assert np.isnan(manifest.durations).all()


def test_a_file_that_changed_since_is_noticed(path):
    manifest = read_manifests(lines(path, row("/a.wav"), row("/b.wav")))
    path.write_text("x")
    with pytest.raises(DataError, match=r"line 2.*change"):
        manifest.entry(1)


def test_memory_is_a_few_columns(path):
    manifest = read_manifests(lines(path, *(row(f"/{i}.wav", text="long " * 100) for i in range(2000))))
    assert len(pickle.dumps(manifest)) < 2000 * 44


# --- cuts


@pytest.mark.parametrize("packed", [False, True])
def test_cuts_are_read(tmp_path, packed):
    path = tmp_path / ("c.jsonl.gz" if packed else "c.jsonl")
    content = (json.dumps(cut()) + "\n" + json.dumps(row("/n.wav", 3)) + "\n").encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    manifest = pickle.loads(pickle.dumps(read_manifests(str(path))))
    entry = manifest.entry(0)
    assert (entry.audio_filepath, entry.offset, entry.duration) == ("/data/r.wav", 1.5, 2.0)
    assert (entry.speaker, entry.text, entry.lang, entry.line) == ("m", "hé", "fr", 1)
    assert manifest.entry(1).audio_filepath == "/n.wav"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": "MixedCut"}, "MixedCut"),
        ({"type": "MultiCut"}, "MultiCut"),
        (
            {"recording": {"sources": [{"type": "command", "channels": [0], "source": "touch /tmp/x"}]}},
            "command",
        ),
        ({"recording": {"sources": [{"type": "url", "channels": [0], "source": "http://x"}]}}, "url"),
        ({"recording": {"sources": [{"type": "memory", "channels": [0], "source": "AA"}]}}, "memory"),
        ({"recording": {"sources": [{"type": "file", "channels": [0], "source": "pipe:x"}]}}, "pipe:x"),
        (
            {"channel": None, "recording": {"sources": [{"type": "file", "channels": [0, 1], "source": "x"}]}},
            "2 channels and the cut names none",
        ),
        ({"channel": 2}, "the cut's channel is 2, and none of the recording's sources has it"),
        ({"recording": {"sources": [{"type": "file", "channels": [0], "source": 3}]}}, "no file"),
        ({"recording": {"sources": []}}, "one source"),
        ({"recording": {"transforms": [{"name": "Speed", "kwargs": {"factor": 1.1}}]}}, "Speed"),
        ({"start": -1.0}, "offset"),
        ({"duration": None}, "duration"),
    ],
)
def test_cuts_that_are_more_than_a_piece_of_a_file_are_refused(tmp_path, changes, said):
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: ") as error:
        read_manifests(lines(tmp_path / "c.jsonl", cut(**changes)))
    assert said in str(error.value)


def test_a_cut_of_features_only_is_refused(tmp_path):
    without = {key: value for key, value in cut().items() if key != "recording"}
    with pytest.raises(DataError, match="no recording"):
        read_manifests(lines(tmp_path / "c.jsonl", without))


def test_a_broken_gz_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl.gz"
    packed = gzip.compress((json.dumps(cut()) + "\n").encode() * 100)
    for content in (packed[:50], b"no gz", packed[:30] + bytes(20) + packed[50:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"c\.jsonl\.gz"):
            read_manifests(str(path))
    path.write_bytes(packed)
    monkeypatch.setattr(module, "_MAX_UNPACKED", 1000)
    with pytest.raises(DataError, match="gunzip"):
        read_manifests(str(path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings are not here")
@pytest.mark.filterwarnings("ignore")
def test_cuts_that_lhotse_wrote_are_read(tmp_path):
    lhotse = pytest.importorskip("lhotse")
    files = sorted((SHARED / "speech" / "librispeech").rglob("*.flac"))[:4]
    cuts = []
    for file in files:
        one = lhotse.Recording.from_file(file).to_cut()
        supervision = lhotse.SupervisionSegment(one.id, one.recording.id, 0, one.duration, speaker=file.parent.name)
        one.supervisions = [supervision]
        cuts.append(one.truncate(offset=0.5, duration=1.25))
    cuts[0] = cuts[0].resample(8000)
    for name in ("cuts.jsonl.gz", "cuts.jsonl"):
        lhotse.CutSet.from_cuts(cuts).to_file(tmp_path / name)
        manifest = read_manifests(str(tmp_path / name))
        entries = [manifest.entry(i) for i in range(len(manifest))]
        assert [entry.audio_filepath for entry in entries] == [str(file) for file in files]
        assert [entry.speaker for entry in entries] == [file.parent.name for file in files]
        assert {(entry.offset, entry.duration) for entry in entries} == {(0.5, 1.25)}


# --- writing


def test_rows_are_written_in_a_stable_order_and_read_back(path):
    write_manifest(path, [{"zeta": 1, "text": "hé 中", "duration": 1.5, "alpha": 2, "audio_filepath": "/a b.wav"}])
    expected = '{"audio_filepath": "/a b.wav", "duration": 1.5, "text": "hé 中", "alpha": 2, "zeta": 1}\n'
    assert path.read_text(encoding="utf-8") == expected
    assert read_manifests(str(path)).entry(0).text == "hé 中"


def test_a_failed_write_leaves_the_old_file(tmp_path, path):
    path.write_text("old")

    def rows():
        yield row()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_manifest(path, rows())
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]
    with pytest.raises(DataError, match="cannot be written"):
        write_manifest(path / "no folder" / "m.json", [row()])


def test_half_a_surrogate_pair_is_written_escaped(path):
    write_manifest(path, [row("/a.wav", text="\ud800")])
    assert read_manifests(str(path)).entry(0).text == "\ud800"
