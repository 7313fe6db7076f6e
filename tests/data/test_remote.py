"""Remote paths against real servers on this machine: HTTP that misbehaves on purpose, and S3."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile as sf

from conftest import tiny_config, write_noise_wav
from nestcli.data import remote
from nestcli.data.datamodule import NestDataModule
from nestcli.data.manifest import read_manifests
from nestcli.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the clients, and of fork with threads


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.failures = 0  # answers 503 before it serves
        self.torn = 0  # breaks off half-way
        self.gets = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.gets += 1
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        content = self.server.files.get(self.path)
        if self.path == "/secret":
            return self._status(403)
        if content is None:
            return self._status(404)
        if body and self.server.failures > 0:
            self.server.failures -= 1
            return self._status(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content)}"')
        self.end_headers()
        if not body:
            return None
        if self.server.torn > 0:
            self.server.torn -= 1
            self.wfile.write(content[: len(content) // 2])
            self.connection.close()
            return None
        self.wfile.write(content)
        return None

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "_copies", {})
    return tmp_path / "cache" / "remote"


# ---- addresses


@pytest.mark.parametrize("path", ["s3://bucket/a.wav", "https://host/a.wav", "gs://b/c"])
def test_known_schemes(path):
    assert remote.is_remote(path)
    remote.check_remote(path)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("file:///etc/passwd", "unknown kind"),
        ("gopher://a/b", "unknown kind"),
        ("simplecache::s3://a/b", "unknown kind"),
        ("s3://a/b::file:///etc/passwd", "in chains"),
        ("https://user:password@host/a.wav", "a password"),
    ],
)
def test_other_addresses_are_refused_without_showing_passwords(path, why):
    with pytest.raises(ValueError, match=why) as caught:
        remote.check_remote(path)
    assert "password@" not in str(caught.value)


def test_a_manifest_may_name_addresses(tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text('{"audio_filepath": "s3://bucket/a.wav", "duration": 1.0}\n')
    assert read_manifests(str(manifest)).entry(0).audio_filepath == "s3://bucket/a.wav"
    manifest.write_text('{"audio_filepath": "ftp://host/a.wav", "duration": 1.0}\n')
    with pytest.raises(DataError, match=r"line 1: .*unknown kind; those read are s3"):
        read_manifests(str(manifest))


# ---- HTTP


def test_an_object_is_read_whole(server):
    server.files["/a.wav"] = bytes(range(256)) * 1000
    assert remote.read_bytes(f"{server.url}/a.wav") == server.files["/a.wav"]


def test_it_is_tried_again_where_that_may_help(server):
    server.files["/a.wav"] = b"x" * 100_000
    server.failures, server.torn = 1, 1
    assert remote.read_bytes(f"{server.url}/a.wav") == server.files["/a.wav"]
    server.failures = 100
    with pytest.raises(DataError, match=r"a\.wav cannot be read after 4 attempts"):
        remote.read_bytes(f"{server.url}/a.wav")


def test_what_is_not_there_or_not_allowed_is_said_at_once(server):
    for name, message in (("gone.wav", "there is no such object"), ("secret", "access is denied")):
        before = server.gets
        with pytest.raises(DataError, match=message):
            remote.read_bytes(f"{server.url}/{name}")
        assert server.gets <= before + 2


def test_a_copy_is_made_once_and_again_when_the_object_changes(server, cache, monkeypatch):
    server.files["/m.json"] = b"one" * 1000
    first = remote.local_copy(f"{server.url}/m.json")
    assert Path(first).read_bytes() == server.files["/m.json"]
    gets = server.gets
    monkeypatch.setattr(remote, "_copies", {})  # another process
    assert remote.local_copy(f"{server.url}/m.json") == first
    assert server.gets == gets
    server.files["/m.json"] = b"two" * 1001
    monkeypatch.setattr(remote, "_copies", {})
    assert Path(remote.local_copy(f"{server.url}/m.json")).read_bytes() == server.files["/m.json"]


def test_a_torn_download_leaves_nothing(server, cache):
    server.files["/m.json"] = b"x" * 1_000_000
    server.torn = 100
    with pytest.raises(DataError, match="cannot be read after"):
        remote.local_copy(f"{server.url}/m.json")
    assert [path for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_the_oldest_copies_make_room(server, cache, monkeypatch):
    monkeypatch.setenv(remote.SIZE_VARIABLE, "0.0025")
    for number in range(4):
        server.files[f"/{number}.tar"] = bytes([number]) * 1_000_000
        copy = Path(remote.local_copy(f"{server.url}/{number}.tar"))
        os.utime(copy, (number, number))
    kept = sorted(path.name[-5:] for path in cache.iterdir() if path.name.endswith(".tar"))
    assert kept == ["2.tar", "3.tar"]


def fetch_in_child(url: str, folder: str) -> None:
    os.environ[remote.CACHE_VARIABLE] = folder
    remote._copies.clear()
    assert len(Path(remote.local_copy(f"{url}/big.tar")).read_bytes()) == 3_000_000
    assert remote.read_bytes(f"{url}/a.wav") == b"audio"


def test_processes_forked_after_use_read_too_and_fetch_a_copy_once(server, cache):
    server.files.update({"/big.tar": b"x" * 3_000_000, "/a.wav": b"audio"})
    assert remote.read_bytes(f"{server.url}/a.wav") == b"audio"  # fsspec's thread runs in this process now
    gets = server.gets
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fetch_in_child, args=(server.url, str(cache.parent))) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert server.gets - gets <= 3 + 3 + 2  # each its audio; the copy in one go, or in a few ranges


# ---- S3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket on a server of its own; tests see it through the environment, as users see theirs."""
    pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(key, value)
        client = boto3.client("s3")
        for _ in range(100):
            try:
                client.create_bucket(Bucket="speech")
                break
            except Exception:
                time.sleep(0.1)
        yield client
    server.kill()
    server.wait()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_manifest_and_audio_from_s3(bucket, corpus, tmp_path, workers):
    rows = []
    for number in range(6):
        write_noise_wav(tmp_path / f"{number}.wav", 1.5, number)
        bucket.upload_file(str(tmp_path / f"{number}.wav"), "speech", f"corpus/audio/{number}.wav")
        rows.append({"audio_filepath": f"audio/{number}.wav", "duration": 1.5})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    bucket.put_object(Bucket="speech", Key="corpus/train.json", Body=text.encode())
    words = [
        "model.train_ds.batch_size=3",
        "model.train_ds.noise_manifest=null",
        f"model.train_ds.num_workers={workers}",
    ]
    data = NestDataModule(tiny_config(corpus, "model.train_ds.manifest_filepath=s3://speech/corpus/train.json", *words))
    batches = list(data.train_dataloader())
    assert sorted(item for batch in batches for item in batch.sample_ids) == list(range(6))
    for batch in batches:
        for item, audio in zip(batch.sample_ids, batch.audio, strict=True):
            assert audio.numpy() == pytest.approx(sf.read(tmp_path / f"{item}.wav", dtype="float32")[0])


def test_an_object_that_is_gone_from_s3_is_named(bucket):
    with pytest.raises(DataError, match=r"s3://speech/gone\.wav: there is no such object"):
        remote.read_bytes("s3://speech/gone.wav")


def test_training_reads_shards_from_s3(bucket, corpus, tmp_path):
    from nestcli.data.prepare import PrepareOptions, prepare

    for number in range(6):
        write_noise_wav(tmp_path / "in" / f"{number}.wav", 1.5, number)
    summary = prepare([tmp_path / "in"], tmp_path / "out", PrepareOptions(val_fraction=0, shards=2))
    folder = Path(summary.shards["train"]["manifest_filepath"]).parent
    for path in folder.glob("*.*"):
        bucket.upload_file(str(path), "speech", f"shards/{path.name}")
    words = [
        "model.train_ds.is_tarred=true",
        "model.train_ds.manifest_filepath=s3://speech/shards/tarred_audio_manifest.json",
        "model.train_ds.tarred_audio_filepaths=s3://speech/shards/audio__OP_0..1_CL_.tar",
        "model.train_ds.batch_size=3",
        "model.train_ds.noise_manifest=null",
        "model.train_ds.num_workers=2",
    ]
    batches = list(NestDataModule(tiny_config(corpus, *words)).train_dataloader())
    ours = {round(float(audio.abs().sum()), 3) for batch in batches for audio in batch.audio}
    theirs = {
        round(float(abs(sf.read(tmp_path / "in" / f"{number}.wav", dtype="float32")[0]).sum()), 3)
        for number in range(6)
    }
    assert len(ours) == 6
    assert sorted(ours) == pytest.approx(sorted(theirs), abs=0.01)
    assert len(list((tmp_path / "cache" / "remote").glob("*.tar"))) == 2
