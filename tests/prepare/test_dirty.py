"""A corpus bad in 38 ways through the real command: every bad input is rejected for its reason, no good one is."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.data import manifest_scan as scan_module
from nestcli.errors import DataError
from nestcli.prepare.pipeline import PrepareOptions, prepare
from prepare.dirty import WAYS, Sample, make, manifest


def nest(*words, **how) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nestcli", "prepare-data", *map(str, words), "--jobs", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def taken(out):
    return [*rows(out / "train_manifest.json"), *rows(out / "val_manifest.json")]


def content(out):
    """The bytes of every file that was written, but for the journals and the lock."""
    own = (".prepared.jsonl", ".lock")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in own
    }


def assert_rejected(out: Path, samples: list[Sample]) -> None:
    rejected = rows(out / "rejected.jsonl")
    found = Counter((Path(row["audio_filepath"]), row["reason"]) for row in rejected)
    wanted = Counter((sample.path, sample.reason) for sample in samples if sample.reason is not None)
    assert (found - wanted, wanted - found) == (Counter(), Counter())  # too many, missing
    assert all(row["detail"] for row in rejected)


def check_folder(folder: Path, samples: list[Sample], out: Path) -> None:
    """The folder as it is: what is accepted, with its duration."""
    done = nest(folder, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert_rejected(out, samples)
    good = {str(sample.path): sample for sample in samples if sample.reason is None}
    accepted = {row["audio_filepath"]: row["duration"] for row in taken(out)}
    assert accepted.keys() == good.keys()
    for path, seconds in accepted.items():
        assert seconds == pytest.approx(good[path].seconds, abs=good[path].within + 1e-6), path
    summary = json.loads(done.stdout)
    assert (summary["accepted"], summary["passed_over"]) == (len(good), 2)
    assert summary["accepted"] + summary["rejected"] == len(samples)
    assert summary["rejections"] == Counter(sample.reason for sample in samples if sample.reason)
    before = content(out)
    assert nest(folder, "--out", out, "--json").stdout == done.stdout
    assert content(out) == before


def check_manifest(lines: list[Sample], path: Path, out: Path) -> None:
    """A manifest with `--convert --segment`: the pieces of each good line last as long as it does."""
    done = nest(path, "--out", out, "--convert", "--segment", 0.5)
    assert done.returncode == 0, done.stderr
    assert_rejected(out, lines)
    seconds: dict[int, float] = defaultdict(float)
    for row in taken(out):
        assert row["duration"] <= 0.5
        assert Path(row["audio_filepath"]).is_file()
        seconds[row["id"]] += row["duration"]
    assert seconds.keys() == {number for number, line in enumerate(lines) if line.reason is None}
    for number, whole in seconds.items():
        assert whole == pytest.approx(lines[number].seconds, abs=lines[number].within + 0.0005), lines[number].path


def test_every_bad_file_is_rejected_and_no_good_one(tmp_path):
    samples = make(tmp_path / "in", good=160, each=1)
    assert len({sample.way for sample in samples if sample.reason}) >= len(WAYS) - 2
    check_folder(tmp_path / "in", samples, tmp_path / "out")
    lines = manifest(tmp_path / "in.json", samples, each=1)
    check_manifest(lines, tmp_path / "in.json", tmp_path / "out")  # what the first run found is used


@pytest.mark.slow
def test_a_thousand_files(tmp_path):
    samples = make(tmp_path / "in")
    assert sum(sample.reason is None for sample in samples) >= 900
    assert sum(sample.reason is not None for sample in samples) >= 180
    check_folder(tmp_path / "in", samples, tmp_path / "out")
    lines = manifest(tmp_path / "in.json", samples)
    made = []
    for out in ("one", "one", "other"):
        check_manifest(lines, tmp_path / "in.json", tmp_path / out)
        made.append({name: each.replace(b"/other", b"/one") for name, each in content(tmp_path / out).items()})
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b'{"audio_filepath": "/x/b.wav", "dura', "the line is cut off: the file was not written to its end"),
        (b'{"audio_filepath": "/x/\xff.wav", "duration": 1.0}\n', "this is not JSON"),
    ],
)
def test_a_broken_line_of_a_large_manifest_is_named_and_nothing_is_done(tmp_path, monkeypatch, tail, message):
    monkeypatch.setattr(scan_module, "_PIECE", 1 << 18)
    monkeypatch.setattr(scan_module, "available_cores", lambda: 1)
    line = b'{"audio_filepath": "/x/a.wav", "duration": 1.0, "text": "%s"}\n' % (b"a" * 900)
    path = tmp_path / "in.json"
    path.write_bytes(line * 1000 + tail)  # read in ranges, each of which counts its own lines
    with pytest.raises(DataError, match=f"in.json, line 1001: {message}"):
        prepare([path], tmp_path / "out", PrepareOptions(jobs=1))
    assert not (tmp_path / "out").exists()


def test_values_that_no_utterance_has_cost_their_lines_only(tmp_path):
    sf.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    bad = (
        ('{"audio_filepath": "a.wav", "duration": NaN}', '"duration" is nan; it must be a number of seconds'),
        ('{"audio_filepath": "a.wav", "duration": -1.0}', '"duration" is -1.0'),
        ('{"audio_filepath": "a.wav", "duration": "1.0"}', "\"duration\" is '1.0'"),
        ('{"audio_filepath": "a.wav", "duration": 1.0, "offset": -1}', '"offset" is -1'),
        ('{"audio_filepath": "", "duration": 1.0}', "it must name one file"),
        ('{"audio_filepath": null, "duration": 1.0}', "it must name one file"),
        ('{"audio_filepath": "sox a.wav |", "duration": 1.0}', "a command; only files are read"),
        ('{"audio_filepath": "a\\u0000.wav", "duration": 1.0}', "with a zero byte"),
    )
    good = '{"audio_filepath": "a.wav", "duration": 1.0}'
    (tmp_path / "in.json").write_text("\n".join([*(line for line, _ in bad), good, ""]))
    summary = prepare([tmp_path / "in.json"], tmp_path / "out", PrepareOptions(jobs=1, val_fraction=0))
    assert (summary.accepted, summary.rejections) == (1, {"unsupported_line": len(bad)})
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    for number, (row, (_, said)) in enumerate(zip(rejected, bad, strict=True), 1):
        assert row["audio_filepath"].startswith(f"{tmp_path / 'in.json'}, line {number}: ")
        assert said in row["detail"]
