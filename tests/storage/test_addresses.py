"""Remote paths against real servers on this machine: HTTP that misbehaves on purpose, and S3."""

import errno
import gc
import gzip
import io
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
from nestcli.data.datamodule import NestDataModule
from nestcli.data.manifest_scan import read_manifests
from nestcli.errors import DataError, MissingDependencyError, NestError
from nestcli.files import is_remote
from nestcli.storage import addresses, fetch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the clients, and of fork with threads


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.failures = 0  # answers 503 before it serves
        self.torn = 0  # breaks off half-way
        self.dropped = 0  # ends connections without an answer
        self.forbidden = "/secret"
        self.slow = 0.0  # s before each answer
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, request: str) -> int:
        return self.requests.count(request)


class Handler(BaseHTTPRequestHandler):
    """Server that keeps connections open, as real ones do, and sends whole files even if a part was requested."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.requests.append(f"{self.command} {path}")
        time.sleep(server.slow)
        if server.dropped > 0:
            server.dropped -= 1
            self.close_connection = True
            return
        content = server.files.get(path)
        if content is None:
            return self._status({server.forbidden: 403, "/teapot": 418}.get(path, 404))
        if body and server.failures > 0:
            server.failures -= 1
            return self._status(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        for header, value in ({"ETag": f'"{hash(content)}"'} | server.headers).items():
            self.send_header(header, value)
        self.end_headers()
        if not body:
            return None
        if server.torn > 0:
            server.torn -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
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
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(addresses.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(addresses, "_copies", {})
    return tmp_path / "cache" / "remote"


# ---- addresses


@pytest.mark.parametrize(
    "path",
    [
        "s3://bucket/a.wav",
        "s3://bucket/a@b:c d.wav",
        "https://host/a.wav?sig=x%3A@y",
        "gs://b/c",
        "abfs://box@account.dfs.core.windows.net/a.wav",
        "hdfs:///a.wav",
        "hdfs://name:8020/a.wav",
    ],
)
def test_known_schemes(path):
    assert is_remote(path)
    addresses.check_remote(path)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("file:///etc/passwd", "unknown kind"),
        ("gopher://a/b", "unknown kind"),
        ("/a/b.wav", "unknown kind"),
        ("simplecache::s3://a/b", "unknown kind"),
        ("simplecache::s3://user:password@a/b", "unknown kind"),
        ("s3://a/b::file:///etc/passwd", "chained addresses"),
        ("https://user:password@host/a.wav", "a password.*FSSPEC_HTTP"),
        ("https://token@host/a.wav", "a password"),
        ("s3://user:password@bucket/a.wav", "a password.*AWS_ACCESS_KEY_ID"),
        ("s3://", "names no object"),
        ("s3:///a.wav", "names no object"),
        ("http://[::1", "chained|not a valid address"),
        ("http://[1/a.wav", "not a valid address"),
        ("s3://bucket/a\n.wav", "unprintable characters"),
    ],
)
def test_other_addresses_are_refused_without_showing_passwords(path, why):
    with pytest.raises(ValueError, match=why) as caught:
        addresses.check_remote(path)
    assert "password@" not in str(caught.value)
    for call in (addresses.read_bytes, addresses.local_copy):
        with pytest.raises(DataError, match=why):
            call(path)


@pytest.mark.parametrize(
    ("folder", "path", "joined"),
    [
        ("s3://b/data", "wavs/a.wav", "s3://b/data/wavs/a.wav"),
        ("s3://b/data/", "./a.wav", "s3://b/data/a.wav"),
        ("s3://b/data/sets", "../../a.wav", "s3://b/a.wav"),
        ("s3://b/data", "../../../../c/a.wav", "s3://b/c/a.wav"),
        ("s3://b", "a.wav", "s3://b/a.wav"),
        ("s3://b/x//y", "a?b#c%20.wav", "s3://b/x//y/a?b#c%20.wav"),
        ("https://host:80/d", "é b#1?.wav", "https://host:80/d/%C3%A9%20b%231%3F.wav"),
        ("s3://b/data", "gs://c/a.wav", "gs://c/a.wav"),
    ],
)
def test_relative_paths(folder, path, joined):
    assert addresses.join(folder, path) == joined


def test_a_manifest_may_name_addresses(tmp_path):
    manifest = tmp_path / "m.json"
    manifest.write_text('{"audio_filepath": "s3://bucket/a.wav", "duration": 1.0}\n')
    assert read_manifests(str(manifest)).entry(0).audio_filepath == "s3://bucket/a.wav"
    manifest.write_text('{"audio_filepath": "ftp://host/a.wav", "duration": 1.0}\n')
    with pytest.raises(DataError, match=r"line 1: .*unknown kind; nest reads s3"):
        read_manifests(str(manifest))


# ---- HTTP


def test_an_object_is_read_whole_by_one_request(server):
    server.files["/a.wav"] = bytes(range(256)) * 1000
    assert addresses.read_bytes(f"{server.url}/a.wav") == server.files["/a.wav"]
    assert server.requests == ["GET /a.wav"]
    server.files["/empty"] = b""
    assert addresses.read_bytes(f"{server.url}/empty") == b""


def test_it_is_tried_again_where_that_may_help(server):
    server.files["/a.wav"] = b"x" * 100_000
    server.failures, server.torn = 1, 1
    assert addresses.read_bytes(f"{server.url}/a.wav") == server.files["/a.wav"]
    assert server.count("GET /a.wav") == 3
    server.failures = 100
    with pytest.raises(DataError, match=r"a\.wav cannot be read after 4 attempts: the server answers 503"):
        addresses.read_bytes(f"{server.url}/a.wav")
    assert server.count("GET /a.wav") == 7


def test_a_dropped_connection_is_no_missing_file(server):
    server.files["/a.wav"] = b"x"
    server.dropped = 2
    assert addresses.read_bytes(f"{server.url}/a.wav") == b"x"
    server.dropped = 1000
    with pytest.raises(DataError, match="after 4 attempts: Server disconnected"):
        addresses.read_bytes(f"{server.url}/a.wav")
    with pytest.raises(DataError, match="after 4 attempts: Server disconnected"):
        addresses.local_copy(f"{server.url}/a.wav")
    with pytest.raises(DataError, match="after 4 attempts"):
        fetch.describe(f"{server.url}/a.wav")


def test_nobody_listens(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match="after 4 attempts: Cannot connect"):
            addresses.read_bytes(f"http://127.0.0.1:{free.getsockname()[1]}/a.wav")


def test_a_server_that_says_nothing_more_is_given_up(server, monkeypatch):
    monkeypatch.setattr(fetch, "_SILENCE", 0.1)
    monkeypatch.setattr(fetch, "_filesystems", {})
    server.files["/a.wav"] = b"x"
    server.slow = 1.0
    with pytest.raises(DataError, match=r"a\.wav cannot be read after 4 attempts: .*[Tt]imeout"):
        addresses.read_bytes(f"{server.url}/a.wav")


def test_what_is_not_there_or_not_allowed_is_said_at_once(server):
    for name, message in (
        ("gone.wav", "the object does not exist"),
        ("secret", "access is denied; credentials are taken from ~/.netrc"),
        ("teapot", "cannot be read: the server answers 418"),
    ):
        for call in (addresses.read_bytes, addresses.local_copy):
            server.requests.clear()
            with pytest.raises(DataError, match=message):
                call(f"{server.url}/{name}")
            assert len(server.requests) <= 2


def test_an_object_is_described(server):
    server.files["/a.wav"] = b"x"
    assert fetch.describe(f"{server.url}/a.wav").size == 1
    with pytest.raises(DataError, match="the object does not exist"):
        fetch.describe(f"{server.url}/b.wav")
    with pytest.raises(DataError, match="denied"):
        fetch.describe(f"{server.url}/secret")


def test_signatures_are_not_shown(server):
    for path in ("gone.wav", "secret", "teapot"):
        with pytest.raises(DataError) as caught:
            addresses.read_bytes(f"{server.url}/{path}?signature=hidden")
        assert "hidden" not in str(caught.value)
        assert f"{path}?***" in str(caught.value)


def test_what_is_too_large_is_not_read_to_its_end(server, monkeypatch):
    server.files["/a.wav"] = b"x" * 1001
    monkeypatch.setattr(addresses, "MAX_OBJECT", 1000)
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        addresses.read_bytes(f"{server.url}/a.wav")
    assert server.count("GET /a.wav") == 1


def test_a_package_that_is_missing_is_named(monkeypatch):
    for package in ("gcsfs", "adlfs", "ocifs"):
        monkeypatch.setitem(sys.modules, package, None)
    for path, name in (
        ("gs://b/a.wav", r"nestcli\[gcs\]"),
        ("az://b/a.wav", r"nestcli\[azure\]"),
        ("oci://b/a", "ocifs"),
    ):
        with pytest.raises(MissingDependencyError, match=f"needs a package that is missing.*pip install '{name}'"):
            addresses.read_bytes(path)


def test_importing_it_imports_no_client():
    clients = "('fsspec', 'aiohttp', 'torch')"
    code = f"import nestcli.storage.addresses, sys; sys.exit(sum(name in sys.modules for name in {clients}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- copies


def another_process(monkeypatch):
    """Forget the copies that this process remembers, as a new process would."""
    monkeypatch.setattr(addresses, "_copies", {})


def test_a_copy_is_made_once_and_again_when_the_object_changes(server, cache, monkeypatch):
    server.files["/m.json"] = b"one" * 1000
    url = f"{server.url}/m.json"
    first = addresses.local_copy(url)
    assert Path(first).read_bytes() == server.files["/m.json"]
    assert Path(first).name.endswith("-m.json")
    seen = len(server.requests)
    assert addresses.local_copy(url) == first
    assert len(server.requests) == seen  # a process asks once
    another_process(monkeypatch)
    assert addresses.local_copy(url) == first
    assert server.requests[seen:] == ["HEAD /m.json"]
    server.files["/m.json"] = b"two" * 1000
    another_process(monkeypatch)
    assert Path(addresses.local_copy(url)).read_bytes() == server.files["/m.json"]


def test_a_copy_that_was_removed_is_made_again(server, cache):
    server.files["/m.json"] = b"one"
    copy = Path(addresses.local_copy(f"{server.url}/m.json"))
    copy.unlink()
    assert Path(addresses.local_copy(f"{server.url}/m.json")).read_bytes() == b"one"


def test_a_damaged_copy_is_made_again(server, cache, monkeypatch):
    server.files["/m.json"] = b"one" * 100
    copy = Path(addresses.local_copy(f"{server.url}/m.json"))
    copy.write_bytes(b"half")
    another_process(monkeypatch)
    assert Path(addresses.local_copy(f"{server.url}/m.json")).read_bytes() == server.files["/m.json"]


def test_a_large_file_comes_from_a_server_that_knows_no_ranges(server, cache):
    server.files["/big.tar"] = os.urandom(1 << 20) * 20
    assert Path(addresses.local_copy(f"{server.url}/big.tar")).read_bytes() == server.files["/big.tar"]


def test_a_gz_that_the_server_calls_encoded_stays_one(server, cache):
    server.files["/m.json.gz"] = gzip.compress(b'{"audio_filepath": "a.wav", "duration": 1.0}\n')
    server.headers = {"Content-Encoding": "x-gzip"}
    copy = addresses.local_copy(f"{server.url}/m.json.gz")
    assert Path(copy).read_bytes() == server.files["/m.json.gz"]
    assert len(read_manifests(f"{server.url}/m.json.gz")) == 1


def test_a_torn_download_leaves_nothing(server, cache):
    server.files["/m.json"] = b"x" * 1_000_000
    server.torn = 100
    with pytest.raises(DataError, match="cannot be read after"):
        addresses.local_copy(f"{server.url}/m.json")
    assert list(cache.iterdir()) == []
    server.torn = 1
    assert len(Path(addresses.local_copy(f"{server.url}/m.json")).read_bytes()) == 1_000_000


def test_an_object_that_is_replaced_while_it_is_read_is_read_again(server, cache, monkeypatch):
    server.files["/m.json"] = b"old" * 1000
    download = fetch.download

    def replaced_meanwhile(path, found, file, limit):
        download(path, found, file, limit)
        server.files["/m.json"] = b"new" * 1000

    monkeypatch.setattr(fetch, "download", replaced_meanwhile)
    copy = Path(addresses.local_copy(f"{server.url}/m.json"))
    assert copy.read_bytes() == b"new" * 1000
    assert list(cache.iterdir()) == [copy]


def test_the_oldest_copies_make_room(server, cache, monkeypatch):
    monkeypatch.setenv(addresses.SIZE_VARIABLE, "0.0025")
    for number in range(4):
        server.files[f"/{number}.tar"] = bytes([number]) * 1_000_000
        copy = Path(addresses.local_copy(f"{server.url}/{number}.tar"))
        os.utime(copy, (number, number))
    kept = sorted(path.name[-5:] for path in cache.iterdir())
    assert kept == ["2.tar", "3.tar"]
    monkeypatch.setenv(addresses.SIZE_VARIABLE, "0.0005")
    server.files["/4.tar"] = bytes(1_000_000)
    with pytest.raises(NestError, match="does not fit into a cache of 500,000"):
        addresses.local_copy(f"{server.url}/4.tar")
    monkeypatch.setenv(addresses.SIZE_VARIABLE, "much")
    with pytest.raises(NestError, match="NEST_CACHE_GB is 'much'"):
        addresses.local_copy(f"{server.url}/4.tar")


class FullDisk(io.BytesIO):
    def write(self, block):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_no_bad_object(server, cache, monkeypatch):
    server.files["/a"] = b"x" * 100_000
    download = fetch.download
    monkeypatch.setattr(fetch, "download", lambda path, found, file, limit: download(path, found, FullDisk(), limit))
    with pytest.raises(NestError, match=r"cannot hold copies.*No space left.*Set \$NEST_CACHE") as caught:
        addresses.local_copy(f"{server.url}/a")
    assert not isinstance(caught.value, DataError)  # a run is to stop, not to skip utterance after utterance
    assert server.count("GET /a") == 1
    assert list(cache.iterdir()) == []


# ---- forks


def fork(work) -> None:
    """Run `work` in three forked processes at once; its exceptions fail the test."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_parent_and_forked_processes_read_in_turn(server):
    """The parent's connection stays open: a child must not take it out of the parent's event loop."""
    server.files["/a.wav"] = b"audio"

    def read() -> None:
        started = time.monotonic()
        assert addresses.read_bytes(f"{server.url}/a.wav") == b"audio"
        gc.collect()
        assert time.monotonic() - started < 5

    for _ in range(2):
        read()
        fork(read)
    read()


def test_forked_processes_make_a_copy_once(server, cache):
    server.files.update({"/big.tar": b"x" * 3_000_000, "/a.wav": b"audio"})
    assert addresses.read_bytes(f"{server.url}/a.wav") == b"audio"  # fsspec's thread runs in this process now
    server.slow = 0.2

    def fetch() -> None:
        assert len(Path(addresses.local_copy(f"{server.url}/big.tar")).read_bytes()) == 3_000_000

    fork(fetch)
    assert server.count("GET /big.tar") == 1


# ---- S3


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Start a server with a bucket; tests reach it through the environment, as users do."""
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
    fetch._filesystems.clear()
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


def test_what_is_gone_from_s3_is_named(bucket):
    for path in ("s3://speech/gone.wav", "s3://no-bucket/gone.wav"):
        with pytest.raises(DataError, match=rf"{path}: the object does not exist"):
            addresses.read_bytes(path)
        with pytest.raises(DataError, match=rf"{path}: the object does not exist"):
            addresses.local_copy(path)
        with pytest.raises(DataError, match=rf"{path}: the object does not exist"):
            fetch.describe(path)
    bucket.put_object(Bucket="speech", Key="folder/a.wav", Body=b"x")
    assert fetch.describe("s3://speech/folder/a.wav").size == 1
    for call in (fetch.describe, addresses.local_copy):
        with pytest.raises(DataError, match="is a folder, not a file"):
            call("s3://speech/folder")


def test_objects_of_any_size_come_from_s3_whole(bucket, monkeypatch):
    monkeypatch.setattr(fetch, "_BLOCK", 1 << 16)
    for size in (0, 1, 1 << 16, (1 << 19) + 1):
        content = os.urandom(size)
        bucket.put_object(Bucket="speech", Key=f"{size}.wav", Body=content)
        assert addresses.read_bytes(f"s3://speech/{size}.wav") == content
        assert Path(addresses.local_copy(f"s3://speech/{size}.wav")).read_bytes() == content
    monkeypatch.setattr(addresses, "MAX_OBJECT", 1000)
    with pytest.raises(DataError, match="more than 1,000 bytes"):
        addresses.read_bytes(f"s3://speech/{1 << 16}.wav")


def test_an_object_that_changes_on_s3_is_copied_again(bucket, monkeypatch):
    for content in (b"one", b"two"):
        bucket.put_object(Bucket="speech", Key="m.json", Body=content)
        another_process(monkeypatch)
        assert Path(addresses.local_copy("s3://speech/m.json")).read_bytes() == content


def test_parent_and_forked_processes_read_s3_in_turn(bucket):
    bucket.put_object(Bucket="speech", Key="a.wav", Body=b"audio")

    def read() -> None:
        started = time.monotonic()
        assert addresses.read_bytes("s3://speech/a.wav") == b"audio"
        gc.collect()
        assert time.monotonic() - started < 10

    read()
    fork(read)
    read()


@pytest.fixture
def odd_s3(server, monkeypatch):
    """Use the misbehaving server as S3."""
    pytest.importorskip("s3fs")
    for key, value in (
        ("AWS_ENDPOINT_URL", server.url),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_SHARED_CREDENTIALS_FILE", os.devnull),
        ("AWS_CONFIG_FILE", os.devnull),
    ):
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(fetch, "_filesystems", {})
    return server


def test_s3_is_tried_four_times_and_no_more(odd_s3):
    odd_s3.files["/b/a.wav"] = b"x" * 100_000
    odd_s3.failures, odd_s3.torn, odd_s3.dropped = 1, 1, 1
    assert addresses.read_bytes("s3://b/a.wav") == odd_s3.files["/b/a.wav"]
    assert odd_s3.count("GET /b/a.wav") == 4
    odd_s3.failures = 100
    with pytest.raises(DataError, match=r"s3://b/a\.wav cannot be read after 4 attempts"):
        addresses.read_bytes("s3://b/a.wav")
    assert odd_s3.count("GET /b/a.wav") == 8


def test_a_torn_copy_from_s3_leaves_nothing(odd_s3, cache):
    odd_s3.files["/b/a.tar"] = b"x" * 100_000
    odd_s3.torn = 100
    with pytest.raises(DataError, match=r"s3://b/a\.tar cannot be read after 4 attempts"):
        addresses.local_copy("s3://b/a.tar")
    assert list(cache.iterdir()) == []
    odd_s3.torn = 2
    assert len(Path(addresses.local_copy("s3://b/a.tar")).read_bytes()) == 100_000


def test_credentials_that_lack_or_do_not_open(odd_s3, monkeypatch):
    odd_s3.files["/b/a.wav"] = b"x"
    expected = r"s3://b/secret: access is denied; credentials are taken from AWS_ACCESS_KEY_ID"
    odd_s3.forbidden = "/b/secret"
    with pytest.raises(DataError, match=expected):
        addresses.read_bytes("s3://b/secret")
    assert odd_s3.count("GET /b/secret") == 1
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(fetch, "_filesystems", {})
    with pytest.raises(DataError, match=r"s3://b/a\.wav: access is denied; credentials"):
        addresses.read_bytes("s3://b/a.wav")
    assert odd_s3.count("GET /b/a.wav") == 0


def test_training_reads_shards_from_s3(bucket, corpus, tmp_path):
    from nestcli.prepare.pipeline import PrepareOptions, prepare

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
