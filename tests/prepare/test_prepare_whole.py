"""Preparation at length: every kind of input, cutting and converting, interruptions, shards."""

import gzip
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from nestcli.audio.inspect import inspect_audio
from nestcli.audio.load import load_audio
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import DataError
from nestcli.files import file_name
from nestcli.jobs.journal import Journal, open_journal
from nestcli.prepare import check as check_module
from nestcli.prepare.pipeline import PrepareOptions, prepare
from nestcli.prepare.write_shards import write_shards

RATE = 16000


def write(path, seconds=0.5, rate=RATE, *, channels=1, level=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(os.fsencode(path)))
    sf.write(path, level * rng.standard_normal((int(seconds * rate), channels)), rate)
    return path


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def rejections(out):
    return {Path(row["audio_filepath"]).name: row["reason"] for row in rows(out / "rejected.jsonl")}


def taken(out):
    return rows(out / "train_manifest.json")


ALL = PrepareOptions(val_fraction=0, jobs=2)


# ---- inputs


def test_globs_name_nothing_twice_and_nothing_else(tmp_path):
    for name in ("1.wav", "a/2.wav", "a/b/3.wav"):
        write(tmp_path / "in" / name)
    (tmp_path / "in" / "about.json").write_text("{}")
    (tmp_path / "in" / "readme.txt").touch()
    for pattern in ("**", "*", "**/*", "*.wav"):
        summary = prepare([f"{tmp_path}/in/{pattern}"], tmp_path / "in" / "out", ALL)
        assert (summary.accepted, summary.rejected) == (1 if pattern == "*.wav" else 3, 0)
        assert summary.passed_over == (0 if pattern == "*.wav" else 2)
    everything = PrepareOptions(val_fraction=0, convert=True)
    for _ in range(2):  # its own output is not an input
        assert prepare([f"{tmp_path}/in/**/*.*"], tmp_path / "in" / "out", everything).accepted == 3
    manifest = tmp_path / "in" / "out" / "train_manifest.json"
    manifest.rename(tmp_path / "in" / "m.json")
    assert prepare([f"{tmp_path}/in/[m].json"], tmp_path / "other", ALL).accepted == 3


def test_globs(tmp_path):
    for name in ("a/1.wav", "a/2.wav", "b/deep/3.wav"):
        write(tmp_path / "in" / name)
    assert prepare([f"{tmp_path}/in/**/*.wav"], tmp_path / "out", ALL).accepted == 3
    assert prepare([f"{tmp_path}/in/a/[2-9].wav"], tmp_path / "out", ALL).accepted == 1
    with pytest.raises(DataError, match="nothing matches"):
        prepare([f"{tmp_path}/in/*.mp3"], tmp_path / "out", ALL)
    odd = write(tmp_path / "in" / "[x].wav")  # a name of its own, no pattern
    assert prepare([odd], tmp_path / "out", ALL).accepted == 1


def test_lhotse_recordings(tmp_path):
    from lhotse import Recording, RecordingSet

    path = write(tmp_path / "a.wav")
    RecordingSet.from_recordings([Recording.from_file(path)]).to_file(tmp_path / "recordings.jsonl.gz")
    assert prepare([tmp_path / "recordings.jsonl.gz"], tmp_path / "out", ALL).accepted == 1
    assert taken(tmp_path / "out")[0]["audio_filepath"] == str(path)
    command = {"id": "r", "sources": [{"type": "command", "channels": [0], "source": "touch /tmp/x"}]}
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(json.dumps(command).encode() + b"\n"))
    assert prepare([tmp_path / "bad.jsonl.gz"], tmp_path / "out", ALL).rejections == {"unsupported_line": 1}
    assert "a source of type 'command' is refused" in rows(tmp_path / "out" / "rejected.jsonl")[0]["detail"]


def kaldi(folder, scp, segments=None, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in {"wav.scp": scp, "segments": segments, **tables}.items():
        if lines:
            (folder / name).write_text("".join(line + "\n" for line in lines))
    return folder


def test_kaldi_folders(tmp_path):
    write(tmp_path / "k" / "one.wav", 2.0)
    write(tmp_path / "elsewhere.wav")
    made = tmp_path / "made"
    folder = kaldi(
        tmp_path / "k",
        ["r1 one.wav", f"r2\t{tmp_path}/elsewhere.wav", f"r3 touch {made} |"],
        utt2spk=["r1 ann", "r2 bob"],
        text=["r1 hello there", "r2"],
    )
    summary = prepare([folder], tmp_path / "out", ALL)
    assert (summary.accepted, summary.speakers) == (2, 2)
    assert not made.exists()
    assert rows(tmp_path / "out" / "rejected.jsonl")[0]["detail"].startswith("wav.scp has a command")
    assert [(row["id"], row.get("text")) for row in taken(tmp_path / "out")] == [("r1", "hello there"), ("r2", None)]
    kaldi(folder, ["r1 one.wav"], ["u1 r1 0.0 0.7", "u2 r1 0.7 1.5"], utt2spk=["u1 ann", "u2 eve"], text=["u1 a"])
    prepare([folder], tmp_path / "out", ALL)
    spans = [(row["id"], row.get("offset", 0), row["duration"], row["speaker"]) for row in taken(tmp_path / "out")]
    assert spans == [("u1", 0, 0.7, "ann"), ("u2", 0.7, 0.8, "eve")]


def test_kaldi_tables_are_read_as_kaldi_reads_them(tmp_path, monkeypatch):
    write(tmp_path / "k" / "one file.wav", 2.0)
    write(tmp_path / "audio" / "two.wav")
    monkeypatch.chdir(tmp_path)
    folder = kaldi(
        tmp_path / "k",
        ["r1 one file.wav", "", " r2\t audio/two.wav \r"],  # relative to here first, then to the folder
        ["u1 r1 0.5 -1", "u2 r2 0 0.5"],
        text=["u1 a\u2028b\x0bc", "u2 d\u00a0e"],
    )
    assert prepare([folder / "wav.scp"], tmp_path / "out", ALL).rejected == 0
    lines = (tmp_path / "out" / "train_manifest.json").read_text(encoding="utf-8").split("\n")
    first, second = map(json.loads, lines[:2])
    assert (first["offset"], first["duration"], first["text"]) == (0.5, 1.5, "a\u2028b\x0bc")
    assert (Path(second["audio_filepath"]), second["text"]) == (tmp_path / "audio" / "two.wav", "d\u00a0e")


def test_segments_of_a_recording_of_kaldi_stay_on_one_side(tmp_path):
    names = [f"r{number}" for number in range(12)]
    for name in names:
        write(tmp_path / "k" / f"{name}.wav", 1.0)
    segments = [f"{name}-{part} {name} {part / 5} {part / 5 + 0.2}" for name in names for part in range(5)]
    folder = kaldi(tmp_path / "k", [f"{name} {name}.wav" for name in names], segments)
    prepare([folder], tmp_path / "out", PrepareOptions(val_fraction=0.4))
    train, val = (
        {row["id"][:3] for row in rows(tmp_path / "out" / f"{side}_manifest.json")} for side in ("train", "val")
    )
    assert train
    assert val
    assert len(train | val) == 12
    assert not train & val


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["r1 one.wav", "r1 two.wav"], "r1 occurs twice"),
        (["r1 one.wav", "", "r2"], "line 3: nothing follows 'r2'"),
        (["r1 o\0e.wav"], "zero byte"),
    ],
)
def test_broken_lists_of_recordings_are_named(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        prepare([kaldi(tmp_path / "k", lines)], tmp_path / "out", ALL)


@pytest.mark.parametrize(
    ("segments", "message"),
    [(["u1 r9 0 1"], "wav.scp does not have"), (["u1 r1 0"], "START END"), (["u1 r1 2 1"], "must be later")],
)
def test_broken_kaldi_folders_are_named(tmp_path, segments, message):
    write(tmp_path / "k" / "one.wav")
    with pytest.raises(DataError, match=message):
        prepare([kaldi(tmp_path / "k", ["r1 one.wav"], segments)], tmp_path / "out", ALL)


# ---- checks


def test_the_same_samples_are_taken_once(tmp_path):
    path = write(tmp_path / "in" / "a.wav")
    samples, _ = sf.read(path)
    sf.write(tmp_path / "in" / "b.flac", samples, RATE)
    sf.write(tmp_path / "in" / "c.wav", samples, RATE // 2)  # sounds different
    summary = prepare([tmp_path / "in"], tmp_path / "out", ALL)
    assert (summary.accepted, summary.rejections) == (2, {"duplicate_content": 1})
    assert "samples are the same as those of" in rows(tmp_path / "out" / "rejected.jsonl")[0]["detail"]


def test_clipped_speech_is_left_out_and_loud_speech_is_not(tmp_path):
    time_s = np.arange(RATE) / RATE
    tone = np.sin(2 * np.pi * 200 * time_s)
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "loud.wav", 0.9999 * tone, RATE)
    sf.write(tmp_path / "in" / "cut.wav", np.clip(3 * tone, -1, 1), RATE)
    report = inspect_audio(tmp_path / "in" / "cut.wav")
    assert report.clipped == pytest.approx(1 - 2 * np.arcsin(1 / 3) / np.pi, abs=0.01)
    assert inspect_audio(tmp_path / "in" / "loud.wav").clipped < 0.005
    prepare([tmp_path / "in"], tmp_path / "out", ALL)
    assert rejections(tmp_path / "out") == {"cut.wav": "clipped"}
    assert prepare([tmp_path / "in"], tmp_path / "out", PrepareOptions(max_clipped=1.0)).accepted == 2
    for subtype in ("PCM_U8", "ULAW", "ALAW"):  # their full scale is lower
        sf.write(tmp_path / "in" / "cut.wav", np.clip(3 * tone, -1, 1), RATE, subtype=subtype)
        assert inspect_audio(tmp_path / "in" / "cut.wav").clipped == pytest.approx(report.clipped, abs=0.05)


@pytest.mark.parametrize(("ending", "share"), [("wav", 0.5), ("wav", 0.0), ("aiff", 0.5), ("flac", 0.25)])
def test_a_header_that_declares_too_little_is_noticed(tmp_path, ending, share):
    path = write(tmp_path / "in" / f"a.{ending}", 4.0)
    content = bytearray(path.read_bytes())
    frames = int(4 * RATE * share)
    if ending == "flac":
        content[22:26] = frames.to_bytes(4, "big")  # STREAMINFO's number of samples, the low bits
    else:
        place = content.index(b"data" if ending == "wav" else b"SSND") + 4
        extra, order = (0, "little") if ending == "wav" else (8, "big")
        content[place : place + 4] = (2 * frames + extra).to_bytes(4, order)
    path.write_bytes(content)
    write(tmp_path / "in" / "b.wav")
    prepare([tmp_path / "in"], tmp_path / "out", ALL)
    assert rejections(tmp_path / "out") == {f"a.{ending}": "wrong_duration"}
    detail = rows(tmp_path / "out" / "rejected.jsonl")[0]["detail"]
    assert detail.startswith(f"the header declares {4 * share:.2f} s, and more follows; convert it")


@pytest.mark.parametrize("behind", [b"LIST" + (60000).to_bytes(4, "little") + bytes(60000), bytes(60000), b"x" * 1000])
def test_what_stands_behind_the_audio_may_be_something_else(tmp_path, behind):
    path = write(tmp_path / "in" / "a.wav", 1.0)
    path.write_bytes(path.read_bytes() + behind)
    assert prepare([tmp_path / "in"], tmp_path / "out", ALL).accepted == 1


def crash_on_request(file):
    if Path(file[0]).name == "crash.wav":
        os.kill(os.getpid(), signal.SIGSEGV)
    return inspect_audio(*file)


def crash_alone(file):
    return "version", crash_on_request(file)


def crash_in_batches(files):
    return [crash_alone(file) for file in files]


def test_a_decoder_that_crashes_costs_its_file_only(tmp_path, monkeypatch):
    for name in ("a", "crash", "z"):
        write(tmp_path / "in" / f"{name}.wav")
    monkeypatch.setattr(check_module, "_inspect_all", crash_in_batches)
    monkeypatch.setattr(check_module, "_inspect", crash_alone)
    summary = prepare([tmp_path / "in"], tmp_path / "out", ALL)
    assert (summary.accepted, rejections(tmp_path / "out")) == (2, {"crash.wav": "decoder_crash"})
    assert "SIGSEGV" in rows(tmp_path / "out" / "rejected.jsonl")[0]["detail"]


# ---- cutting and converting


def test_converting(tmp_path):
    stereo = write(tmp_path / "in" / "x" / "a b.wav", 1.0, 44100, channels=2)
    write(tmp_path / "in" / "y" / "a b.wav", 1.0, 8000)
    prepare([tmp_path / "in"], tmp_path / "out", PrepareOptions(val_fraction=0, convert=True))
    made = taken(tmp_path / "out")
    assert len({row["audio_filepath"] for row in made}) == 2
    for row in made:
        info = sf.info(row["audio_filepath"])
        assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "FLAC")
        assert row["duration"] == pytest.approx(1.0, abs=1e-3)
    ours = load_audio(made[0]["audio_filepath"], sample_rate=16000)
    assert np.abs(ours - load_audio(stereo, sample_rate=16000)).max() < 1e-4
    prepare([tmp_path / "in" / "x"], tmp_path / "left", PrepareOptions(val_fraction=0, convert=True, channel=1))
    left = load_audio(taken(tmp_path / "left")[0]["audio_filepath"], sample_rate=16000)
    assert np.abs(left - load_audio(stereo, sample_rate=16000, channel=1)).max() < 1e-4
    prepare([tmp_path / "in" / "y"], tmp_path / "none", PrepareOptions(val_fraction=0, convert=True, channel=1))
    assert rejections(tmp_path / "none") == {"a b.wav": "no_such_channel"}
    assert "channel 1 does not exist: the file has 1, from 0" in rows(tmp_path / "none" / "rejected.jsonl")[0]["detail"]


@pytest.fixture
def long_recording(tmp_path):
    """12 s of noise with short pauses at 3.8, 7.7 and 10.1 s."""
    samples = 0.1 * np.random.default_rng(0).standard_normal(12 * RATE)
    for pause in (3.8, 7.7, 10.1):
        samples[int((pause - 0.15) * RATE) : int((pause + 0.15) * RATE)] *= 0.01
    path = tmp_path / "in" / "long.flac"
    path.parent.mkdir()
    sf.write(path, samples, RATE)
    return path


@pytest.mark.parametrize("convert", [False, True])
def test_long_recordings_are_cut_at_quiet_places(tmp_path, long_recording, convert):
    options = PrepareOptions(val_fraction=0, segment=4.0, convert=convert)
    prepare([long_recording], tmp_path / "out", options)
    pieces = taken(tmp_path / "out")
    assert all(1.0 <= row["duration"] <= 4.0 for row in pieces)
    ends = np.cumsum([row["duration"] for row in pieces])
    assert ends[-1] == pytest.approx(12.0, abs=0.01)
    assert ends[0] == pytest.approx(3.8, abs=0.1)
    assert ends[1] == pytest.approx(7.7, abs=0.1)
    assert ends[2] == pytest.approx(10.1, abs=0.1)
    joined = np.concatenate([
        load_audio(row["audio_filepath"], sample_rate=RATE, offset=row.get("offset", 0.0), duration=row["duration"])
        for row in pieces
    ])  # fmt: skip
    whole = load_audio(long_recording, sample_rate=RATE)
    assert abs(len(joined) - len(whole)) <= 4
    if convert:
        assert [Path(row["audio_filepath"]).name[-9:] for row in pieces[:2]] == ["0000.flac", "0001.flac"]
        assert all("offset" not in row for row in pieces)


def test_pieces_of_a_recording_stay_on_one_side(tmp_path):
    for number in range(12):
        write(tmp_path / "in" / f"{number}.wav", 3.0)
    prepare([tmp_path / "in"], tmp_path / "out", PrepareOptions(val_fraction=0.3, segment=1.0))
    sides = [
        {row["audio_filepath"] for row in rows(tmp_path / "out" / f"{side}_manifest.json")} for side in ("train", "val")
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_what_is_too_long_is_cut_where_that_is_wanted(tmp_path, long_recording):
    options = PrepareOptions(val_fraction=0, max_duration=5.0)
    assert prepare([long_recording], tmp_path / "out", options).rejections == {"too_long": 1}
    cut = PrepareOptions(val_fraction=0, max_duration=5.0, segment=4.0)
    assert prepare([long_recording], tmp_path / "out", cut).rejections == {}


def test_names_of_converted_files():
    assert file_name("a/b c/é.wav", "/x") != file_name("a/b c/é.wav", "/y")
    for key in ("/", "..", "../../etc/passwd", "/abs/olute.wav", "-rf.wav", ".hidden.wav", "a\nb.wav", "$(x).wav"):
        name = file_name(key, "/x")
        assert not name.startswith(("/", ".", "-"))
        assert ".." not in name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_./")


# ---- interruptions


def corpus_of(folder, count=60):
    for number in range(count):
        write(folder / f"{number % 5}" / f"{number}.wav", 0.4 + 0.01 * number)
    (folder / "broken.wav").write_text("<html>")
    return folder


def visible(out):
    return {
        str(path.relative_to(out)): path.read_bytes().replace(os.fsencode(out), b"OUT")
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    folder = corpus_of(tmp_path / "in", 10)
    prepare([folder], tmp_path / "out", ALL)
    write(folder / "new.wav")
    asked = []
    real = check_module._batches
    monkeypatch.setattr(check_module, "_batches", lambda todo: real(asked.append(len(todo)) or todo))
    assert prepare([folder], tmp_path / "out", ALL).accepted == 11
    os.utime(folder / "0" / "0.wav", (0, 0))  # another file now, for all that can be known
    prepare([folder], tmp_path / "out", ALL)
    assert asked == [1, 1]


def test_a_torn_journal_is_mended(tmp_path):
    journal = Journal(tmp_path)
    journal.add("a", [1])
    journal.add("b", [2])
    journal.close()
    path = tmp_path / ".prepared.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    journal = Journal(tmp_path)
    assert (journal.get("a"), journal.get("b")) == ([1], None)
    journal.add("c", [3])
    journal.close()
    journal = Journal(tmp_path)
    assert journal.get("c") == [3]
    journal.close()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with (
        open_journal(tmp_path),
        pytest.raises(DataError, match="another run of nest is writing"),
        open_journal(tmp_path),
    ):
        pass


# ---- shards


@pytest.mark.parametrize("form", ["nemo-tar", "shar"])
def test_shards_hold_what_the_manifests_name(tmp_path, form):
    from nestcli.data.tarred import read_shar, read_tarred
    from nestcli.data.utterance_audio import read_audio

    folder = corpus_of(tmp_path / "in", 21)
    write(folder / "stereo.wav", 0.6, 44100, channels=2)
    options = PrepareOptions(val_fraction=0.2, shards=3, shard_format=form, speaker_pattern="/([^/]+)/[^/]+$")
    summary = prepare([folder], tmp_path / "out", options)
    for side in ("train", "val"):
        keys = summary.shards[side]
        packed = (
            read_tarred(keys["manifest_filepath"], keys["tarred_audio_filepaths"])
            if form == "nemo-tar"
            else read_shar(keys["shar_path"])
        )
        loose = read_manifests(str(tmp_path / "out" / f"{side}_manifest.json"))
        assert len(packed) == len(loose) == summary.utterances[side]
        assert len(set(packed.shard_of.tolist())) == (3 if side == "train" else 1)
        expected = {}
        for line in range(len(loose)):
            entry = loose.entry(line)
            expected[f"{line:07d}"] = (entry.speaker, read_audio(entry, sample_rate=RATE))
        for line in range(len(packed)):
            entry = packed.entry(line)
            speaker, samples = expected.pop(entry.audio_filepath[:7])
            ours = read_audio(entry, sample_rate=RATE)
            assert entry.speaker == speaker
            assert len(ours) == len(samples)
            assert np.abs(ours - samples).max() <= 1.01 / 32768
        assert not expected


class InThisProcess:
    jobs = 1

    def in_order(self, work, tasks, limit=None):
        return map(work, tasks)


def test_a_shar_is_the_same_bytes_at_another_time(tmp_path):
    prepare([corpus_of(tmp_path / "in", 5)], tmp_path / "out", ALL)
    contents = []
    for _ in range(2):
        made = write_shards(
            tmp_path / "out" / "train_manifest.json", tmp_path / "s", shards=2, format="shar", pool=InThisProcess()
        )
        contents.append(visible(tmp_path / "s"))
        shutil.rmtree(tmp_path / "s")
        time.sleep(1.1)  # the time in a gzip has whole seconds
    assert made.utterances == 5
    assert contents[0] == contents[1]
    assert [name for name in contents[0] if name.endswith("gz")] == ["cuts.000000.jsonl.gz", "cuts.000001.jsonl.gz"]


def test_shards_are_the_same_bytes_again_and_follow_their_number(tmp_path):
    folder = corpus_of(tmp_path / "in", 9)
    for out, jobs in (("a", 1), ("b", 3)):
        prepare([folder], tmp_path / out, PrepareOptions(val_fraction=0, shards=3, jobs=jobs))
    a, b = (visible(tmp_path / out / "train_shards") for out in "ab")
    assert a.keys() == b.keys()
    assert all(a[name] == b[name] for name in a if name.endswith(".tar"))
    before = (tmp_path / "a" / "train_shards" / "audio_1.tar").stat().st_mtime_ns
    prepare([folder], tmp_path / "a", PrepareOptions(val_fraction=0, shards=3))
    assert (tmp_path / "a" / "train_shards" / "audio_1.tar").stat().st_mtime_ns == before
    prepare([folder], tmp_path / "a", PrepareOptions(val_fraction=0, shards=2))
    assert sorted(path.name for path in (tmp_path / "a" / "train_shards").glob("audio_*")) == [
        "audio_0.tar",
        "audio_1.tar",
    ]
    prepare([folder], tmp_path / "a", PrepareOptions(val_fraction=0, shards=2, shard_format="shar"))
    assert not list((tmp_path / "a" / "train_shards").glob("audio_*"))
