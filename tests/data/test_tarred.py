"""Tarred data in NeMo's layout and Lhotse's Shar: each line is matched to the right member of the right tar."""

import io
import json
import resource
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from lhotse import CutSet, Recording, SupervisionSegment

from conftest import tiny_config, write_noise_wav
from nestcli.data import utterance_audio
from nestcli.data.datamodule import NestDataModule
from nestcli.data.manifest import Manifest
from nestcli.data.manifest_scan import expand
from nestcli.data.tarred import read_shar, read_tarred
from nestcli.data.utterance_audio import read_audio
from nestcli.errors import DataError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a__OP_0..2_CL_.tar", ["a_0.tar", "a_1.tar", "a_2.tar"]),
        ("{08..10}/m.json", ["08/m.json", "09/m.json", "10/m.json"]),
        ("a,b_(1..2).tar", ["a", "b_1.tar", "b_2.tar"]),
        (["x", "y_[3..3]_<0..1>"], ["x", "y_3_0", "y_3_1"]),
        ("s3://b/a__OP_0..1_CL_.tar", ["s3://b/a_0.tar", "s3://b/a_1.tar"]),
        ("a[b].json", ["a[b].json"]),
    ],
)
def test_ranges(given, expected):
    assert expand(given) == expected


def test_a_range_without_files_is_refused():
    with pytest.raises(DataError, match="names no files"):
        expand("a_{5..2}.tar")


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("audio")
    paths = [folder / f"{number}.wav" for number in range(6)]
    for number, path in enumerate(paths):
        write_noise_wav(path, 1.5, number)
    return paths


def pack(path: Path, members: dict[str, Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, source in members.items():
            info = tarfile.TarInfo(name)
            content = source.read_bytes()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples(manifest: Manifest) -> list[np.ndarray]:
    return [read_audio(manifest.entry(line), sample_rate=16000) for line in range(len(manifest))]


def of_files(paths: list[Path]) -> list[np.ndarray]:
    return [sf.read(path, dtype="float32")[0] for path in paths]


@pytest.fixture
def tars(tmp_path, audio) -> Path:
    """Two tars of three files each, one manifest of all lines and one of each tar's."""
    rows = [
        {"audio_filepath": f"{number}.wav", "duration": 1.5, "shard_id": number // 3, "speaker": "s"}
        for number in range(6)
    ]
    for shard in range(2):
        pack(tmp_path / f"audio_{shard}.tar", {f"{n}.wav": audio[n] for n in range(3 * shard, 3 * shard + 3)})
        write_rows(tmp_path / "sharded_manifests" / f"manifest_{shard}.json", rows[3 * shard : 3 * shard + 3])
    write_rows(tmp_path / "tarred_audio_manifest.json", rows)
    return tmp_path


@pytest.mark.parametrize("manifests", ["tarred_audio_manifest.json", "sharded_manifests/manifest__OP_0..1_CL_.json"])
def test_nemos_tars(tars, audio, manifests):
    manifest = read_tarred(f"{tars}/{manifests}", f"{tars}/audio__OP_0..1_CL_.tar")
    assert manifest.shard_of.tolist() == [0, 0, 0, 1, 1, 1]
    for ours, theirs in zip(samples(manifest), of_files(audio), strict=True):
        assert np.array_equal(ours, theirs)
    entry = manifest.entry(4)
    assert (entry.speaker, entry.name) == ("s", f"{tars}/audio_1.tar: 4.wav")


def test_lines_of_shards_that_are_not_given_are_left_out(tars):
    manifest = read_tarred(f"{tars}/tarred_audio_manifest.json", f"{tars}/audio_1.tar")
    assert [manifest.entry(line).audio_filepath for line in range(3)] == ["3.wav", "4.wav", "5.wav"]
    with pytest.raises(DataError, match=r"no line of .* belongs to any of the 1 tars"):
        read_tarred(f"{tars}/sharded_manifests/manifest_0.json", f"{tars}/audio_1.tar")


def test_lines_without_a_shard_id_are_found_by_their_names(tars, audio, tmp_path):
    rows = [{"audio_filepath": f"/elsewhere/{number}.flac", "duration": 1.5} for number in (5, 0)]
    path = write_rows(tmp_path / "m.json", rows)
    manifest = read_tarred(path, f"{tars}/audio__OP_0..1_CL_.tar")
    assert manifest.shard_of.tolist() == [1, 0]
    assert np.array_equal(samples(manifest)[0], of_files(audio)[5])


def test_several_lines_of_one_member(tars, audio, tmp_path):
    rows = [
        {"audio_filepath": f"4-sub{sub}.wav", "duration": 0.5, "offset": 0.5 * sub, "shard_id": 1} for sub in range(3)
    ]
    manifest = read_tarred(write_rows(tmp_path / "m.json", rows), f"{tars}/audio__OP_0..1_CL_.tar")
    assert np.array_equal(np.concatenate(samples(manifest)), of_files(audio)[4])


def test_a_member_that_is_missing_is_named(tars, tmp_path):
    path = write_rows(tmp_path / "m.json", [{"audio_filepath": "9.wav", "duration": 1.5, "shard_id": 1}])
    with pytest.raises(DataError, match=r"audio_1\.tar: 9\.wav: the shard has no such member"):
        samples(read_tarred(path, f"{tars}/audio__OP_0..1_CL_.tar"))


def test_a_member_that_is_no_audio_is_named(tmp_path):
    (tmp_path / "bad").write_bytes(b"<html>" * 100)
    pack(tmp_path / "audio_0.tar", {"bad.wav": tmp_path / "bad"})
    path = write_rows(tmp_path / "m.json", [{"audio_filepath": "bad.wav", "duration": 1.5, "shard_id": 0}])
    with pytest.raises(DataError, match=r"audio_0\.tar: bad\.wav: "):
        samples(read_tarred(path, f"{tmp_path}/audio_0.tar"))


def test_a_program_that_decodes_can_open_a_member(tars, audio, monkeypatch):
    def decoded(path, **_):
        return subprocess.run(["cat", path], check=True, capture_output=True).stdout  # as SoX opens it

    monkeypatch.setattr(utterance_audio, "load_audio", decoded)
    manifest = read_tarred(f"{tars}/tarred_audio_manifest.json", f"{tars}/audio__OP_0..1_CL_.tar")
    assert samples(manifest)[4] == audio[4].read_bytes()


def test_many_manifests_of_tars_cost_what_their_lines_do(tmp_path):
    count = 2_000
    for number in range(count):
        shard = {"shard_id": number} if number % 2 else {}  # without one it is the tar at the manifest's place
        row = {"audio_filepath": f"{number}.wav", "duration": 1.5, **shard}
        (tmp_path / f"m_{number}.json").write_text(json.dumps(row))
    tracemalloc.start()
    try:
        manifest = read_tarred(f"{tmp_path}/m__OP_0..{count - 1}_CL_.json", f"{tmp_path}/a__OP_0..{count - 1}_CL_.tar")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(manifest.shards) == count
    assert manifest.shard_of.tolist() == list(range(count))
    assert manifest.entry(1_999).shard == f"{tmp_path}/a_1999.tar"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[0], 1_024), limits[1]))
    try:  # not all of the manifests are open at once
        assert [manifest.entry(line).line for line in range(count)] == [1] * count
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert peak < 16 << 20, "a reference to every tar for every manifest is 32 MB"


@pytest.fixture
def shar(tmp_path, audio) -> Path:
    """A Shar as Lhotse writes it, of two shards."""
    cuts = []
    for number, path in enumerate(audio):
        cut = Recording.from_file(path, recording_id=f"id.with.dots-{number}").to_cut()
        cut.supervisions = [SupervisionSegment(f"s{number}", cut.recording.id, 0, cut.duration, speaker=f"spk{number}")]
        cuts.append(cut)
    folder = tmp_path / "shar"
    folder.mkdir()
    CutSet.from_cuts(cuts).to_shar(folder, fields={"recording": "flac"}, shard_size=4)
    return folder


def test_lhotses_shar(shar, audio):
    by_folder = read_shar(str(shar))
    by_files = read_shar(
        {
            "cuts": f"{shar}/cuts._OP_000000..000001_CL_.jsonl.gz",
            "recording": f"{shar}/recording.{{000000..000001}}.tar",
        }
    )
    for manifest in (by_folder, by_files):
        assert manifest.shard_of.tolist() == [0, 0, 0, 0, 1, 1]
        assert manifest.entry(3).speaker == "spk3"
        for ours, theirs in zip(samples(manifest), of_files(audio), strict=True):
            assert np.abs(ours - theirs).max() <= 1 / 32768


def test_a_folder_that_is_no_shar(tmp_path):
    with pytest.raises(DataError, match="0 files of cuts and 0 of recordings"):
        read_shar(str(tmp_path))
    with pytest.raises(DataError, match="recording is missing"):
        read_shar({"cuts": "a"})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_tars_and_shar_like_loose_files(corpus, tars, shar, audio, tmp_path, workers):
    rows = [{"audio_filepath": str(path), "duration": 1.5} for path in audio]
    common = ["model.train_ds.batch_size=2", f"model.train_ds.num_workers={workers}", "model.train_ds.shuffle=false"]
    settings = {
        "loose": [f"model.train_ds.manifest_filepath={write_rows(tmp_path / 'loose.json', rows)}"],
        "tars": [
            "model.train_ds.is_tarred=true",
            f"model.train_ds.manifest_filepath={tars}/tarred_audio_manifest.json",
            f"model.train_ds.tarred_audio_filepaths={tars}/audio__OP_0..1_CL_.tar",
        ],
        "shar": ["model.train_ds.use_lhotse=true", f"model.train_ds.shar_path={shar}"],
    }
    loaded = {
        name: [
            batch.noisy_audio.numpy()
            for batch in NestDataModule(tiny_config(corpus, *common, *words)).train_dataloader()
        ]
        for name, words in settings.items()
    }
    for name in ("tars", "shar"):
        assert len(loaded[name]) == 3
        for ours, theirs in zip(loaded[name], loaded["loose"], strict=True):
            assert np.abs(ours - theirs).max() < 1e-4
