"""Files that are not audio are named, with a remedy; a file that never answers stops nothing but itself."""

import gzip
import io
import json
import os
import socket
import tarfile
import zipfile

import numpy as np
import pytest
import soundfile as sf

from nestcli.augment.noisy_copy import CopyOptions
from nestcli.augment.run import AugmentOptions, augment
from nestcli.data.mixing import AugmentationConfig
from nestcli.errors import DataError
from nestcli.evaluation.inputs import read_inputs
from nestcli.prepare.pipeline import PrepareOptions, prepare
from nestcli.storage.file_kinds import foreign

RATE = 16000
ALL = PrepareOptions(val_fraction=0, jobs=1)


def sound(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.1 * np.random.default_rng(seed).standard_normal(RATE), RATE)
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def packed(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def a_tar(file):
    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.wav"))


def a_zip(file):
    zipfile.ZipFile(file, "w").writestr("a.wav", b"")


FOREIGN = {
    "list.txt": (b"/corpus/a.wav\n/corpus/b.wav\n", "a list of paths"),
    "list": (b"a b.flac\n", "a list of paths"),
    "train.tsv": (b"/corpus\na.wav\t48000\nb.wav\t16000\n", "a fairseq list"),
    "validated.tsv": (b"client_id\tpath\tsentence\nx\ta.mp3\tone\n", "a table"),
    "corpus.csv": (b"path,text\na.wav,one\n", "a table"),
    "corpus.tar": (packed(a_tar), "a tar archive"),
    "shard.webdataset": (packed(a_tar), "a tar archive"),
    "corpus.zip": (packed(a_zip), "a zip archive"),
    "model.ckpt": (packed(a_zip), "never opened"),
    "corpus.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "a 7z archive"),
    "corpus.rar": (b"Rar!\x1a\x07\x01\0" + bytes(9), "a rar archive"),
    "corpus.tar.gz": (b"\x1f\x8b\x08" + bytes(20), "tar -xzf"),
    "corpus.tar.xz": (b"\xfd7zXZ\x00" + bytes(20), "tar -xJf"),
    "train.parquet": (b"PAR1aaaaaaaaPAR1", "a Parquet table"),
    "train.arrow": (b"\xff\xff\xff\xff\x10\0\0\0" + bytes(20), "an Arrow table"),
    "x.feather": (b"ARROW1\0\0" + bytes(20), "an Arrow table"),
    "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(20), "an HDF5 file"),
    "x.npy": (packed(lambda file: np.save(file, np.zeros(3))), "a NumPy array"),
    "x.pkl": (b"\x80\x04K\x01.\0", "a pickle"),
    "x.tfrecord": (bytes(40), "a file of records"),
    "feats.ark": (b"utt1 \0BFM " + bytes(20), "a Kaldi archive"),
    "feats.scp": (b"utt1 /corpus/a.wav\n", "wav.scp"),
    "utt2spk": (b"utt1 spk1\n", "its folder"),
    "array.json": (b'[{"audio_filepath": "a.wav"}]', "jq -c"),
    "page.htm": (b"<!DOCTYPE html><p>404", "fetch the audio again"),
    "notes.txt": (b"This is how the corpus was made.\n", "a text"),
    "a.TextGrid": (b'File type = "ooTextFile"\n', "a transcript"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_audio_is_named(tmp_path, name):
    content, said = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare([tmp_path / name], tmp_path / "out", ALL)
    assert str(error.value).startswith(f"{tmp_path / name}: this is ")
    assert said in str(error.value)
    assert "ffmpeg" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_beside_audio_it_costs_itself_only(tmp_path):
    (tmp_path / "list.txt").write_text("a.wav\n")
    summary = prepare([sound(tmp_path / "a.wav"), tmp_path / "list.txt"], tmp_path / "out", ALL)
    assert (summary.accepted, summary.rejections) == (1, {"not_audio": 1})


def test_a_manifest_of_any_name_is_read(tmp_path):
    sound(tmp_path / "a.wav")
    for name in ("manifest.txt", "train.manifest", "train"):
        (tmp_path / name).write_text(json.dumps({"audio_filepath": "a.wav", "speaker": "x"}) + "\n")
        assert prepare([tmp_path / name], tmp_path / "out", ALL).accepted == 1
        assert rows(tmp_path / "out" / "train_manifest.json")[0]["speaker"] == "x"
        assert len(read_inputs(tmp_path / name, tmp_path).manifest) == 1


def test_a_packed_manifest_needs_no_json_in_its_name(tmp_path):
    sound(tmp_path / "a.wav")
    (tmp_path / "m.gz").write_bytes(gzip.compress(json.dumps({"audio_filepath": "a.wav"}).encode()))
    assert prepare([tmp_path / "m.gz"], tmp_path / "out", ALL).accepted == 1
    assert len(read_inputs(tmp_path / "m.gz", tmp_path).manifest) == 1
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"word"))
    with pytest.raises(DataError, match=r"other\.gz: this is a gzip file\. Unpack it with `gunzip`"):
        prepare([tmp_path / "other.gz"], tmp_path / "out", ALL)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_audio_under_the_name_of_a_manifest_is_read(tmp_path, name):
    sound(tmp_path / "a.wav").rename(tmp_path / name)
    assert prepare([tmp_path / name], tmp_path / "out", ALL).accepted == 1
    assert read_inputs(tmp_path / name, tmp_path).manifest.durations.tolist() == [1.0]


def test_an_empty_input_is_told(tmp_path):
    with pytest.raises(DataError, match=r"^an input is empty; give folders"):
        prepare([""], tmp_path / "out", ALL)


def test_a_glob_means_what_it_ends_with(tmp_path):
    sound(tmp_path / "a.wav")
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(json.dumps({"audio_filepath": "a.wav"}) + "\n")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    assert prepare([f"{tmp_path}/1*.txt"], tmp_path / "out", ALL).accepted == 1
    with pytest.raises(DataError, match=r"x\.parquet: this is a Parquet table"):
        prepare([f"{tmp_path}/*.parquet"], tmp_path / "out", ALL)
    with pytest.raises(DataError, match=r"a file with the extension \.parquet: a Parquet table"):
        prepare([f"{tmp_path}/*.p*"], tmp_path / "out", ALL)


@pytest.mark.parametrize(
    ("name", "said"), [("x.parquet", "a Parquet table"), ("x.arrow", "Arrow"), ("x.tar", "is_tarred")]
)
def test_a_folder_without_audio_says_what_it_holds(tmp_path, name, said):
    (tmp_path / "in").mkdir()
    for number in range(2):
        (tmp_path / "in" / f"{number}{name}").write_bytes(b"PAR1")
    (tmp_path / "in" / "README").write_text("x")
    with pytest.raises(DataError, match=r"no audio file found in .*, but 2 files with the extension \.") as error:
        prepare([tmp_path / "in"], tmp_path / "out", ALL)
    assert said in str(error.value)


def test_audio_is_not_taken_for_anything_else(tmp_path):
    for ending in ("wav", "flac", "ogg", "mp3", "caf", "aiff"):
        sf.write(tmp_path / f"a.{ending}", np.random.default_rng(0).standard_normal(RATE) / 9, RATE)
        (tmp_path / f"a.{ending}").rename(tmp_path / ending)
        assert foreign(tmp_path / ending) == ""
        assert prepare([tmp_path / ending], tmp_path / "out", ALL).accepted == 1


# ---- no answer


def test_pipes_sockets_and_devices_are_refused_without_being_opened(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    sound(folder / "good.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "null.wav").symlink_to("/dev/zero")
    (folder / "console.wav").symlink_to("/dev/tty")
    monkeypatch.chdir(folder)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.wav")
        os.mkfifo(tmp_path / "pipe.txt")
        inputs = [folder, tmp_path / "pipe.txt", "/dev/random"]
        summary = prepare(inputs, tmp_path / "out", PrepareOptions(val_fraction=0, jobs=2, shards=1))
    assert (summary.accepted, summary.rejections) == (1, {"not_a_file": 6})


@pytest.mark.slow
def test_a_decoder_that_hangs_costs_its_file_only(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "sox"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    sound(tmp_path / "in" / "good.wav")
    (tmp_path / "in" / "hangs.wv").write_bytes(b"wvpk" + bytes(2000))
    for _ in range(2):  # another run tries again: a disk may answer then
        summary = prepare([tmp_path / "in"], tmp_path / "out", PrepareOptions(val_fraction=0, jobs=2, patience=3.0))
        assert (summary.accepted, summary.rejections) == (1, {"timed_out": 1})
        assert "no answer after 3 s" in rows(tmp_path / "out" / "rejected.jsonl")[0]["detail"]


@pytest.mark.parametrize("patience", [0.0, -1.0, float("nan")])
def test_a_patience_that_is_none(tmp_path, patience):
    with pytest.raises(DataError, match="--patience"):
        prepare([tmp_path], tmp_path / "out", PrepareOptions(patience=patience))


def test_a_line_that_gives_no_answer_costs_its_copies_only(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "sox"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "hangs.wv").write_bytes(b"wvpk" + bytes(2000))
    paths = [sound(tmp_path / "a.wav"), tmp_path / "hangs.wv", sound(tmp_path / "b.wav", 1)]
    lines = (json.dumps({"audio_filepath": str(path), "duration": 1.0}) + "\n" for path in paths)
    (tmp_path / "m.json").write_text("".join(lines))
    nothing = CopyOptions(AugmentationConfig(0.0, 0.5, -5, 5, -5, 5, 0.5, 0.5))
    summary = augment(str(tmp_path / "m.json"), None, tmp_path / "out", AugmentOptions(nothing, jobs=1, patience=2.0))
    assert (summary.written, summary.reasons) == (2, {"timed_out": 1})
