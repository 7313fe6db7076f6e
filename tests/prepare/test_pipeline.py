"""From inputs to checked manifests."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.audio.load import load_audio
from nestcli.data.manifest import write_manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import DataError
from nestcli.prepare.pipeline import PrepareOptions, first_rejection, prepare
from nestcli.prepare.split import for_validation

SHARED = Path(__file__).parents[2].parent / "shared" / "audio"
RATE = 16000
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings are not here")


def write(path, seconds=0.5, rate=RATE, level=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(os.fsencode(path)))  # no two files alike
    sf.write(path, level * rng.standard_normal(int(seconds * rate)), rate)
    return path


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def rejections(out):
    return {Path(row["audio_filepath"]).name: row["reason"] for row in rows(out / "rejected.jsonl")}


@pytest.fixture
def corpus(tmp_path):
    """20 files of 4 speakers in folders named after them."""
    for speaker in range(4):
        for number in range(5):
            write(tmp_path / "corpus" / f"spk{speaker}" / f"{number}.wav", 0.1 + 0.1 * number)
    return tmp_path / "corpus"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_folder_becomes_manifests(corpus, out):
    summary = prepare([corpus], out, PrepareOptions(val_fraction=0.2))
    assert (summary.accepted, summary.rejected) == (20, 0)
    assert summary.hours == pytest.approx(20 * 0.3 / 3600, abs=1e-6)
    train, val = rows(out / "train_manifest.json"), rows(out / "val_manifest.json")
    assert summary.utterances == {"train": len(train), "val": len(val)}
    assert summary.manifests == {name: str(out / f"{name}_manifest.json") for name in ("train", "val")}
    paths = [row["audio_filepath"] for row in train + val]
    assert sorted(paths) == [str(path) for path in sorted(corpus.rglob("*.wav"))]
    for side in (train, val):
        assert [row["audio_filepath"] for row in side] == sorted(row["audio_filepath"] for row in side)
    assert (out / "rejected.jsonl").read_text() == ""
    assert json.loads((out / "summary.json").read_text())["accepted"] == 20
    assert len(read_manifests(f"{out}/train_manifest.json,{out}/val_manifest.json")) == 20


def test_the_result_does_not_depend_on_jobs_and_repeats(corpus, tmp_path):
    write(corpus / "silent.wav", level=0)
    contents = []
    for out, jobs in (("a", 1), ("b", 5), ("a", None)):
        prepare([corpus], tmp_path / out, PrepareOptions(jobs=jobs, val_fraction=0.3))
        contents.append([path.read_bytes() for path in sorted((tmp_path / out).iterdir())[:3]])
        assert len(contents[-1]) == 3
    assert contents[0][0] == contents[1][0] == contents[2][0]
    assert contents[0] == contents[2]


def test_output_inside_the_input_is_not_taken_as_input(corpus):
    first = prepare([corpus], corpus, PrepareOptions())
    again = prepare([corpus], corpus, PrepareOptions())
    assert first == again
    assert again.passed_over == 0
    shutil.copytree(corpus / "spk0", corpus / "prepared" / "copied")
    assert prepare([corpus], corpus / "prepared", PrepareOptions()).accepted == 20


def test_walking_skips_the_hidden_and_survives_loops(corpus, out):
    write(corpus / ".hidden" / "a.wav")
    write(corpus / ".a.wav")
    (corpus / "notes.txt").touch()
    (corpus / "loop").symlink_to(corpus)
    (corpus / "spk0" / "again").symlink_to(corpus / "spk1")
    summary = prepare([corpus], out, PrepareOptions())
    assert (summary.accepted, summary.rejected, summary.passed_over) == (20, 0, 1)


def test_endings_count_in_any_case(tmp_path, out):
    shutil.move(write(tmp_path / "in" / "a.flac"), tmp_path / "in" / "A.FLAC")
    assert prepare([tmp_path / "in"], out, PrepareOptions()).accepted == 1


def test_bad_files_are_left_out_with_their_reason(corpus, out):
    write(corpus / "silent.wav", level=0)
    write(corpus / "empty.wav", seconds=0)
    (corpus / "html.wav").write_text("<html>")
    (corpus / "link.wav").symlink_to("nowhere")
    os.mkfifo(corpus / "pipe.wav")
    half = write(corpus / "half.wav")
    half.write_bytes(half.read_bytes()[:5000])
    write(corpus / "long.wav", seconds=3)
    write(corpus / "short.wav", seconds=0.05)
    summary = prepare([corpus], out, PrepareOptions(min_duration=0.1, max_duration=2.0))
    expected = {
        "silent.wav": "silent",
        "empty.wav": "empty",
        "html.wav": "unreadable",
        "link.wav": "missing",
        "pipe.wav": "not_a_file",
        "half.wav": "truncated",
        "long.wav": "too_long",
        "short.wav": "too_short",
    }
    assert rejections(out) == expected
    assert (summary.accepted, summary.rejected) == (20, 8)
    assert summary.rejections == dict.fromkeys(sorted(expected.values()), 1)
    assert all(row["detail"] for row in rows(out / "rejected.jsonl"))


def test_a_folder_and_its_manifest_name_the_same_audio(corpus, out, tmp_path):
    prepare([corpus], tmp_path / "first", PrepareOptions(val_fraction=0))
    summary = prepare([tmp_path / "first" / "train_manifest.json", corpus], out, PrepareOptions())
    assert (summary.accepted, summary.rejections) == (20, {"duplicate_path": 20})


def test_nothing_of_an_earlier_run_stays_when_nothing_can_be_used(corpus, out):
    prepare([corpus], out, PrepareOptions())
    summary = prepare([corpus], out, PrepareOptions(min_duration=1000))
    assert (summary.accepted, summary.rejections) == (0, {"too_short": 20})
    assert summary.manifests == {"train": None, "val": None}
    visible = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert visible == ["rejected.jsonl", "summary.json"]


def test_what_is_there_twice_is_taken_once(corpus, out):
    (corpus / "spk0" / "link.wav").symlink_to(corpus / "spk1" / "0.wav")
    summary = prepare([corpus, corpus / "spk2" / "0.wav", corpus / "spk3"], out, PrepareOptions())
    assert summary.accepted == 20
    assert summary.rejections == {"duplicate_path": 7}


def test_a_name_that_is_not_utf8_is_left_out(corpus, out):
    shutil.copy(corpus / "spk0" / "0.wav", os.fsencode(corpus) + b"/\xe9.wav")
    assert prepare([corpus], out, PrepareOptions()).rejections == {"bad_name": 1}
    assert rows(out / "rejected.jsonl")[0]["audio_filepath"].endswith("\udce9.wav")


def test_what_a_manifest_knows_is_carried_over(corpus, tmp_path, out):
    given = [
        {
            "audio_filepath": "corpus/spk0/4.wav",
            "duration": 0.2,
            "offset": 0.1,
            "speaker": "x",
            "text": "hé",
            "snr": 3,
        },
        {"audio_filepath": "corpus/spk0/4.wav", "duration": 0.2, "offset": 0.3},
        {"audio_filepath": "corpus/spk1/4.wav", "lang": "fr"},
        {"audio_filepath": str(corpus / "spk2" / "4.wav"), "duration": 0.50001},
    ]
    write_manifest(tmp_path / "m.jsonl", given)
    prepare([tmp_path / "m.jsonl"], out, PrepareOptions(val_fraction=0))
    first, second, third, fourth = rows(out / "train_manifest.json")
    assert first == {**given[0], "audio_filepath": str(corpus / "spk0" / "4.wav")}
    assert (second["offset"], second["duration"]) == (0.3, 0.2)
    assert third == {"audio_filepath": str(corpus / "spk1" / "4.wav"), "duration": 0.5, "lang": "fr"}
    assert fourth["duration"] == 0.5
    assert not (out / "val_manifest.json").exists()


def test_a_manifest_that_promises_more_than_the_file_has_is_noticed(corpus, tmp_path, out):
    path = str(corpus / "spk0" / "4.wav")
    stated = [
        {"audio_filepath": path, "duration": 2.0},
        {"audio_filepath": path, "duration": 0.1, "offset": 0.5},
        {"audio_filepath": path, "duration": 0.1},
        {"audio_filepath": path, "duration": 0.1},
        {"audio_filepath": str(corpus / "gone.wav"), "duration": 0.1},
    ]
    write_manifest(tmp_path / "m.json", stated)
    summary = prepare([tmp_path / "m.json"], out, PrepareOptions())
    assert summary.accepted == 1
    assert summary.rejections == {"duplicate_path": 1, "missing": 1, "truncated": 2}
    assert "m.json, line 1" in rows(out / "rejected.jsonl")[0]["detail"]


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
@pytest.mark.parametrize("frames", [12345, 9999, 16001])
def test_durations_never_go_beyond_the_file(tmp_path, out, rate, frames):
    path = tmp_path / "a.wav"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(frames), rate)
    write_manifest(tmp_path / "m.json", [{"audio_filepath": "a.wav", "offset": 1 / 7}, {"audio_filepath": "a.wav"}])
    prepare([tmp_path / "m.json"], out, PrepareOptions(val_fraction=0))
    for row in rows(out / "train_manifest.json"):
        end = row.get("offset", 0) + row["duration"]
        assert frames / rate - 2.1e-6 < end <= frames / rate + 1e-12
        offset, duration = row.get("offset", 0.0), row["duration"]
        assert (
            abs(len(load_audio(path, sample_rate=rate, offset=offset, duration=duration)) - (end - offset) * rate) < 1
        )


# --- speakers and the split


def test_speakers_come_from_the_pattern(corpus, out):
    write(corpus / "nobody.wav")
    summary = prepare([corpus], out, PrepareOptions(speaker_pattern=r"spk(\d)/", val_fraction=0))
    assert (summary.speakers, summary.without_speaker) == (4, 1)
    by_path = {row["audio_filepath"]: row.get("speaker") for row in rows(out / "train_manifest.json")}
    assert by_path[str(corpus / "spk2" / "0.wav")] == "2"
    assert by_path[str(corpus / "nobody.wav")] is None
    options = PrepareOptions(speaker_pattern=r"(corpus)/(?P<speaker>spk\d)", val_fraction=0)
    prepare([corpus], out, options)
    assert {row.get("speaker") for row in rows(out / "train_manifest.json")} == {
        "spk0",
        "spk1",
        "spk2",
        "spk3",
        None,
    }


def test_no_speaker_stands_on_both_sides(corpus, out):
    for fraction in (0.01, 0.3, 0.6, 0.99):
        options = PrepareOptions(speaker_pattern=r"(spk\d)", split_by="speaker", val_fraction=fraction)
        prepare([corpus], out, options)
        train, val = ({row["speaker"] for row in rows(out / f"{name}_manifest.json")} for name in ("train", "val"))
        assert train
        assert val
        assert not train & val


def test_segments_of_one_file_stay_on_one_side(corpus, tmp_path, out):
    segments = [
        {"audio_filepath": str(path), "duration": 0.04, "offset": offset}
        for path in sorted(corpus.rglob("*.wav"))
        for offset in (0.0, 0.05)
    ]
    write_manifest(tmp_path / "m.json", segments)
    prepare([tmp_path / "m.json"], out, PrepareOptions(val_fraction=0.4))
    train, val = ({row["audio_filepath"] for row in rows(out / f"{n}_manifest.json")} for n in ("train", "val"))
    assert len(train | val) == 20
    assert not train & val


def test_a_growing_corpus_keeps_its_sides(corpus, tmp_path, out):
    prepare([corpus], out, PrepareOptions(val_fraction=0.3))
    before = {row["audio_filepath"] for row in rows(out / "val_manifest.json")}
    for number in range(20):
        write(corpus / "new" / f"{number}.wav", 0.1)
    prepare([corpus], out, PrepareOptions(val_fraction=0.3))
    after = {row["audio_filepath"] for row in rows(out / "val_manifest.json")}
    assert before == {path for path in after if "/new/" not in path}


def test_the_split_takes_about_the_share():
    names = [f"speaker {number}" for number in range(5000)]
    assert sum(for_validation(names, 0.05)) == pytest.approx(250, abs=60)
    assert not any(for_validation(names, 0.0))


@pytest.mark.parametrize(
    ("groups", "fraction", "in_val"),
    [
        (["a"], 0.9, 0),
        (["a", "b"], 1e-9, 1),
        (["a", "b"], 1 - 1e-9, 1),
        ([None, "a"], 1e-9, 1),
        ([None, None], 0.5, 0),
    ],
)
def test_small_splits(groups, fraction, in_val):
    assert sum(for_validation(groups, fraction)) == in_val


def test_a_validation_manifest_of_an_earlier_run_does_not_stay(corpus, out):
    prepare([corpus], out, PrepareOptions(val_fraction=0.5))
    summary = prepare([corpus], out, PrepareOptions(kind="noise"))
    assert summary.manifests["val"] is None
    assert not (out / "val_manifest.json").exists()


# --- mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_fraction": 1.0}, "validation share"),
        ({"val_fraction": -0.1}, "validation share"),
        ({"val_fraction": float("nan")}, "validation share"),
        ({"min_duration": 3.0, "max_duration": 2.0}, "maximum"),
        ({"max_duration": float("nan")}, "maximum"),
        ({"jobs": 0}, "jobs"),
        ({"speaker_pattern": "("}, "must be a valid regular expression"),
        ({"speaker_pattern": "spk"}, "no group"),
        ({"split_by": "speaker"}, "--speaker-pattern"),
    ],
)
def test_options_that_make_no_sense(corpus, out, options, said):
    with pytest.raises(DataError, match=said):
        prepare([corpus], out, PrepareOptions(**options))


def test_inputs_that_do_not_exist_stop_before_any_work(corpus, out):
    def progress(done, total):
        raise AssertionError

    with pytest.raises(DataError, match="gone does not exist"):
        prepare([corpus, corpus / "gone"], out, PrepareOptions(), progress)


def test_nothing_to_take_says_why(tmp_path, out):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").touch()
    with pytest.raises(DataError, match=r"no audio found in .* 1 other"):
        prepare([tmp_path / "in"], out, PrepareOptions())
    (tmp_path / "in" / "a.wav").touch()
    (tmp_path / "in" / "b.wav").write_text("<html>")
    summary = prepare([tmp_path / "in"], out, PrepareOptions())
    assert (summary.accepted, summary.rejections) == (0, {"empty": 1, "unreadable": 1})
    assert "a.wav: the file has no bytes" in first_rejection(out)
    assert len(rows(out / "rejected.jsonl")) == 2


def test_an_output_folder_that_cannot_be_made(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be created"):
        prepare([corpus], tmp_path / "file" / "out", PrepareOptions())


# --- real recordings


@needs_shared
def test_the_odd_files(out):
    summary = prepare([SHARED / "odd"], out, PrepareOptions())
    assert rejections(out) == {
        "alexa_128.flac": "unreadable",
        "missing_wav_header.wav": "unreadable",
        "testing.m4a": "unreadable",
        "null.wav": "empty",
    }
    assert (summary.accepted, summary.rejected, summary.passed_over) == (10, 4, 1)


@needs_shared
def test_real_speech_by_speaker(out):
    options = PrepareOptions(split_by="speaker", speaker_pattern=r"/([^/]+)/[^/]+$")
    calls = []
    summary = prepare([SHARED / "speech"], out, options, lambda done, total: calls.append((done, total)))
    assert (summary.accepted, summary.rejected, summary.speakers) == (676, 0, 220)
    assert summary.hours == pytest.approx(52.5 / 60, abs=0.01)
    assert summary.utterances["val"] > 0
    assert calls[-1] == (676, 676)
