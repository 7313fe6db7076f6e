"""The jail: audio outside of its folders is not read, whatever names it."""

import io
import json
import os
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from lhotse import CutSet, Recording

from conftest import write_noise_wav
from nestcli.data.manifest import Manifest
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.tarred import read_shar, read_tarred
from nestcli.data.utterance_audio import duration_of, read_audio
from nestcli.errors import DataError
from nestcli.evaluation.inputs import read_inputs
from nestcli.storage import addresses, allowed_folders, fetch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the clients of servers


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is the jail."""
    folder = tmp_path / "inside"
    folder.mkdir()
    monkeypatch.setenv(allowed_folders.VARIABLE, str(folder))
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "inside-not"  # its name begins like the jail's
    folder.mkdir()
    return folder


def manifest_of(path: Path, **row: object) -> str:
    path.write_text(json.dumps({"duration": 1.5, **row}) + "\n")
    return str(path)


def tarred(folder: Path, tmp_path: Path) -> tuple[Manifest, np.ndarray]:
    """Return the manifest of a tar with one file in `folder`, and the file's samples."""
    write_noise_wav(tmp_path / "a.wav", 1.5, 0)
    content = (tmp_path / "a.wav").read_bytes()
    with tarfile.open(folder / "audio_0.tar", "w") as tar:
        info = tarfile.TarInfo("a.wav")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    path = manifest_of(tmp_path / "m.json", audio_filepath="a.wav", shard_id=0)
    return read_tarred(path, str(folder / "audio_0.tar")), sf.read(tmp_path / "a.wav", dtype="float32")[0]


def shar(folder: Path, tmp_path: Path) -> tuple[Manifest, np.ndarray]:
    write_noise_wav(tmp_path / "a.wav", 1.5, 0)
    cuts = [Recording.from_file(tmp_path / "a.wav", recording_id="a").to_cut()]
    CutSet.from_cuts(cuts).to_shar(folder, fields={"recording": "wav"}, shard_size=4)
    return read_shar(str(folder)), sf.read(tmp_path / "a.wav", dtype="float32")[0]


@pytest.mark.parametrize("made", [tarred, shar])
def test_shards_inside_are_read(inside: Path, tmp_path: Path, made) -> None:
    manifest, samples = made(inside, tmp_path)
    assert np.array_equal(read_audio(manifest.entry(0), sample_rate=16000), samples)
    assert duration_of(manifest.entry(0)) == 1.5


@pytest.mark.parametrize("made", [tarred, shar])
def test_shards_elsewhere_are_refused(inside: Path, elsewhere: Path, tmp_path: Path, made) -> None:
    manifest, _ = made(elsewhere, tmp_path)
    with pytest.raises(DataError, match=r"audio_0\.tar is not read|recording\.000000\.tar is not read"):
        read_audio(manifest.entry(0), sample_rate=16000)


def test_a_shard_that_is_a_link_to_elsewhere_is_refused(inside: Path, elsewhere: Path, tmp_path: Path) -> None:
    tarred(elsewhere, tmp_path)
    (inside / "audio_0.tar").symlink_to(elsewhere / "audio_0.tar")
    manifest = read_tarred(str(tmp_path / "m.json"), str(inside / "audio_0.tar"))
    with pytest.raises(DataError, match=r"it is outside of .*inside"):
        read_audio(manifest.entry(0), sample_rate=16000)


def test_a_jail_that_is_a_link_holds_what_it_leads_to(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(inside)
    monkeypatch.setenv(allowed_folders.VARIABLE, f"/nowhere:{tmp_path / 'link'}")
    manifest, samples = tarred(inside, tmp_path)
    assert np.array_equal(read_audio(manifest.entry(0), sample_rate=16000), samples)


def test_loose_files(inside: Path, elsewhere: Path, tmp_path: Path) -> None:
    for folder in (inside, elsewhere):
        write_noise_wav(folder / "a.wav", 1.5, 0)
    (inside / "link.wav").symlink_to(elsewhere / "a.wav")
    for path, allowed in (
        (inside / "a.wav", True),
        (inside / ".." / "inside" / "a.wav", True),
        (inside / ".." / elsewhere.name / "a.wav", False),
        (inside / "link.wav", False),
        (elsewhere / "a.wav", False),
    ):
        entry = read_manifests(manifest_of(tmp_path / "m.json", audio_filepath=str(path))).entry(0)
        if allowed:
            assert len(read_audio(entry, sample_rate=16000)) == 24_000
        else:
            with pytest.raises(DataError, match=r"it is outside of .*NEST_JAIL"):
                read_audio(entry, sample_rate=16000)


def test_a_manifest_cannot_name_an_open_file(inside: Path, elsewhere: Path, tmp_path: Path) -> None:
    write_noise_wav(elsewhere / "a.wav", 1.5, 0)
    with (elsewhere / "a.wav").open("rb") as file:
        for process in ("self", os.getpid()):
            path = manifest_of(tmp_path / "m.json", audio_filepath=f"/proc/{process}/fd/{file.fileno()}")
            with pytest.raises(DataError, match="it is outside of"):
                read_audio(read_manifests(path).entry(0), sample_rate=16000)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def address(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a server of the files in `elsewhere`."""
    monkeypatch.setenv(addresses.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(addresses, "_copies", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(elsewhere)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_addresses_are_read_without_a_jail_and_refused_in_one(
    elsewhere: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose, samples = tarred(elsewhere, tmp_path)
    write_noise_wav(elsewhere / "a.wav", 1.5, 0)
    path = manifest_of(tmp_path / "remote.json", audio_filepath=f"{address}/a.wav")
    shard = read_tarred(str(tmp_path / "m.json"), f"{address}/audio_0.tar")
    for entry in (read_manifests(path).entry(0), shard.entry(0)):
        assert np.array_equal(read_audio(entry, sample_rate=16000), samples)
        assert duration_of(entry) == 1.5
    # extract and probe look durations up that a manifest does not state
    path = manifest_of(tmp_path / "remote.json", audio_filepath=f"{address}/a.wav", duration=None)
    assert read_inputs(path, tmp_path).manifest.durations.tolist() == [1.5]
    monkeypatch.setenv(allowed_folders.VARIABLE, f"{elsewhere}:{tmp_path}")
    with pytest.raises(DataError, match=r"127\.0\.0\.1.* is not read: it is outside of"):
        read_audio(read_manifests(path, require_duration=False).entry(0), sample_rate=16000)
    fresh = read_tarred(str(tmp_path / "m.json"), f"{address}/./audio_0.tar")
    with pytest.raises(DataError, match=r"audio_0\.tar is not read: it is outside of"):
        read_audio(fresh.entry(0), sample_rate=16000)
    assert read_inputs(path, tmp_path).manifest.durations.tolist() == [0.0]
    assert np.array_equal(read_audio(loose.entry(0), sample_rate=16000), samples)
