"""Features on disk: right, in every format, whatever interrupts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import lhotse
import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.numpy import load_file

from conftest import write_noise_wav
from evaluation.tiny_encoder import TINY, tiny_checkpoint
from nestcli import SpeechEncoder, load_audio, load_encoder
from nestcli.checkpoint.encoder import fresh_encoder
from nestcli.checkpoint.nemo import write_nemo
from nestcli.config import load_config
from nestcli.errors import ConfigError, DataError
from nestcli.evaluation.extract import ExtractOptions, extract
from nestcli.evaluation.stores import Store
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

CONFIG = load_config("small", [*TINY, "model.encoder.n_layers=3"])
SECONDS = (1.5, 0.7, 2.3, 1.1, 0.9, 3.0, 1.9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven files, and a manifest of eight lines: two are parts of one file."""
    folder = tmp_path_factory.mktemp("audio")
    rows: list[dict[str, Any]] = []
    for number, seconds in enumerate(SECONDS):
        write_noise_wav(folder / f"{number % 2}" / f"a é.{number}.wav", seconds, number)
        rows.append(
            {"audio_filepath": f"{number % 2}/a é.{number}.wav", "duration": seconds, "speaker": f"s{number % 3}"}
        )
    rows[2] = {**rows[2], "duration": 1.0}
    rows.append({**rows[2], "offset": 1.0, "duration": 1.2, "text": "later"})
    (folder / "manifest.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(encoder: SpeechEncoder, row: dict[str, Any], layers: Any) -> np.ndarray:
    """The plain way: one file, one call."""
    with torch.no_grad():
        audio = load_audio(row["audio_filepath"], offset=row.get("offset", 0.0), duration=row["duration"])
        return encoder(audio, layers=layers).features[0].transpose(1, 2).numpy()


@pytest.mark.parametrize(("layers", "as_list"), [("all", "all"), ("last", [2]), ("2,0,input", [2, 0, "input"])])
def test_features_are_those_of_single_calls(
    checkpoint: str, folder: Path, tmp_path: Path, layers: str, as_list: Any
) -> None:
    done = extract(
        str(folder / "manifest.json"), checkpoint, tmp_path / "out", ExtractOptions(layers, batch_duration=5)
    )
    rows, encoder = rows_of(done.manifest), load_encoder(checkpoint)
    assert [row["duration"] for row in rows] == [1.5, 0.7, 1.0, 1.1, 0.9, 3.0, 1.9, 1.2]
    assert (rows[7]["text"], rows[7]["offset"], rows[7]["speaker"]) == ("later", 1.0, "s2")
    assert len({row["feature_path"] for row in rows}) == 8
    for row in rows:
        ours = np.load(row["feature_path"])
        np.testing.assert_allclose(ours, expected(encoder, row, as_list), atol=1e-5)
    assert (done.utterances, done.rejected, done.dim) == (8, 0, 16)
    assert done.seconds == pytest.approx(11.3)
    assert done.layers == {"all": (0, 1, 2), "last": (2,), "2,0,input": (2, 0, "input")}[layers]


def test_a_folder_a_file_and_a_manifest_without_durations(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(checkpoint)
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"audio_filepath": str(p)}) + "\n" for p in sorted(folder.glob("*/*.wav"))))
    for number, given in enumerate([folder / "0", folder / "1" / "a é.1.wav", plain]):
        rows = rows_of(extract(str(given), checkpoint, tmp_path / str(number), ExtractOptions()).manifest)
        assert len(rows) == (4, 1, 7)[number]
        for row in rows:
            np.testing.assert_allclose(np.load(row["feature_path"]), expected(encoder, row, "all"), atol=1e-5)


def test_one_file_formats(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    given = str(folder / "manifest.json")
    plain = {
        Path(row["feature_path"]).stem: np.load(row["feature_path"])
        for row in rows_of(extract(given, checkpoint, tmp_path / "npy", ExtractOptions()).manifest)
    }
    tensors = extract(given, checkpoint, tmp_path / "st", ExtractOptions(format="safetensors"))
    loaded = load_file(tensors.path)
    assert loaded.keys() == plain.keys()
    half = extract(given, checkpoint, tmp_path / "h5", ExtractOptions(format="hdf5", store="float16"))
    with h5py.File(half.path) as content:
        assert set(content) == plain.keys()
        for name, array in plain.items():
            assert np.array_equal(loaded[name], array)
            assert content[name].dtype == np.float16
            assert np.array_equal(content[name][:], array.astype(np.float16))
    assert [row["feature_key"] for row in rows_of(half.manifest)] == sorted(plain)
    assert not (tmp_path / "h5" / ".features").exists()


def test_lhotse_reads_its_own(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    given, encoder = str(folder / "manifest.json"), load_encoder(checkpoint)
    one = extract(given, checkpoint, tmp_path / "one", ExtractOptions("last", format="lhotse"))
    several = extract(given, checkpoint, tmp_path / "several", ExtractOptions("0,2", format="lhotse"))
    singles, layered = list(lhotse.load_manifest(one.path)), list(lhotse.load_manifest(several.path))
    for single, many, row in zip(singles, layered, rows_of(one.manifest), strict=True):
        wanted = expected(encoder, row, [0, 2])
        frames = int(row["duration"] / 0.08 + 0.5)  # Lhotse's: a last frame that is less than half full is not loaded
        assert frames <= wanted.shape[2] <= frames + 1
        np.testing.assert_allclose(single.load_features(), wanted[1].T[:frames], atol=1e-5)
        np.testing.assert_allclose(many.load_layers(), wanted.transpose(2, 0, 1)[:frames], atol=1e-5)
        assert single.load_audio().shape == (1, round(row["duration"] * 16_000))
        assert single.supervisions[0].speaker == row["speaker"]


# ---- bad audio -------------------------------------------------------------------------------------------------


def test_bad_lines_are_left_out_and_named(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    sf.write(tmp_path / "short.wav", np.ones(100) / 9, 16_000)
    sf.write(tmp_path / "nan.wav", np.full(9000, np.nan), 16_000, subtype="FLOAT")
    good = rows_of(folder / "manifest.json")[0]
    rows = [
        {"audio_filepath": "bad.wav", "duration": 1.0},
        {"audio_filepath": str(folder / good["audio_filepath"]), "duration": 1.5},
        {"audio_filepath": "short.wav", "duration": 100 / 16_000},
        {"audio_filepath": "gone.wav", "duration": 1.0},
        {"audio_filepath": str(folder / good["audio_filepath"]), "duration": 300.0},
        {"audio_filepath": "nan.wav", "duration": 9000 / 16_000},
        {"audio_filepath": "half.wav", "duration": 2.0},
        {"audio_filepath": str(folder / good["audio_filepath"]), "duration": 2.0},
    ]
    write_noise_wav(tmp_path / "half.wav", 2.0, 7)
    (tmp_path / "half.wav").write_bytes((tmp_path / "half.wav").read_bytes()[:32044])
    (tmp_path / "m.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = extract(str(tmp_path / "m.json"), checkpoint, tmp_path / "out", ExtractOptions())
    assert (done.utterances, done.rejected) == (1, 7)
    rejected = rows_of(tmp_path / "out" / "rejected.jsonl")
    assert [row["reason"] for row in rejected] == [
        "unreadable", "too_short", "missing", "too_long", "not_finite", "truncated", "truncated"
    ]  # fmt: skip
    assert "the manifest promises 2.00 s from 0 s on, the file has 1.50 s there" in rejected[-1]["detail"]
    assert all("audio_filepath" in row and row["detail"] for row in rejected)
    (tmp_path / "m2.json").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="none of 1 utterances could be used"):
        extract(str(tmp_path / "m2.json"), checkpoint, tmp_path / "out2", ExtractOptions())


# ---- going on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["npy", "safetensors", "hdf5"])
def test_a_broken_off_extraction_goes_on(
    checkpoint: str, folder: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, options = str(folder / "manifest.json"), ExtractOptions(format=format, batch_duration=5)
    extract(given, checkpoint, tmp_path / "whole", options)
    put, left = Store.put, [3]

    def dies(self: Store, name: str, array: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        put(self, name, array)

    monkeypatch.setattr(Store, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        extract(given, checkpoint, tmp_path / "cut", options)
    assert not (tmp_path / "cut" / "features.json").exists()
    left[0] = 6  # the batch that was cut is made again, the one before is not
    done = extract(given, checkpoint, tmp_path / "cut", options)
    assert not done.was_done
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    left[0] = 0
    assert extract(given, checkpoint, tmp_path / "cut", options).was_done


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the settings; paths in manifests without the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "extract.json"]
    return {str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"") for path in files}


def test_a_folder_with_other_features_is_kept(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    given, out = str(folder / "manifest.json"), tmp_path / "out"
    extract(given, checkpoint, out, ExtractOptions("last"))
    before = contents(out)
    with pytest.raises(ConfigError, match=r"holds features with another layers \('last', now 'all'\)"):
        extract(given, checkpoint, out, ExtractOptions("all"))
    torch.manual_seed(9)
    other = tmp_path / "other.nemo"
    write_nemo(other, CONFIG, NestModel(NestConfig.from_config(CONFIG)).state_dict())
    with pytest.raises(ConfigError, match="with another checkpoint"):
        extract(given, str(other), out, ExtractOptions("last"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="already holds other files"):
        extract(given, checkpoint, tmp_path / "mine", ExtractOptions())
    assert contents(out) == before


@pytest.mark.slow
def test_kills_and_flat_memory(checkpoint: str, tmp_path: Path) -> None:
    """Killed at any moment the result is the same, and ten times the lines take no more memory."""
    write_noise_wav(tmp_path / "a.wav", 1.3, 1)
    peaks = []
    for count in (300, 3000):
        rows = [{"audio_filepath": "a.wav", "duration": 1.0 + 0.0001 * (n % 900)} for n in range(count)]
        (tmp_path / f"{count}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        peaks.append(_peak_of(checkpoint, tmp_path / f"{count}.json", tmp_path / str(count)))
    assert peaks[1] < 1.05 * peaks[0] + (20 << 10), peaks
    rng = np.random.default_rng(0)
    command = _command(checkpoint, tmp_path / "300.json", tmp_path / "killed")
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(3, 7)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "300")


def _command(checkpoint: str, manifest: Path, out: Path) -> list[str]:
    words = [str(manifest), "--checkpoint", checkpoint, "--out", str(out), "--batch-duration", "20"]
    return [sys.executable, "-m", "nestcli", "extract", *words]


def _peak_of(checkpoint: str, manifest: Path, out: Path) -> int:
    """Peak memory of the command in KiB."""
    process = subprocess.Popen(_command(checkpoint, manifest, out), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss


# ---- calls that are wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "3"}, "layer 3 does not exist: the 3 layers are 0 to 2"),
        ({"layers": "first"}, "'first' is not a layer"),
        ({"format": "csv"}, "--format csv: unknown format"),
        ({"store": "int8"}, "--store int8"),
        ({"precision": "fp8"}, "--precision fp8"),
        ({"device": "tpu"}, "--device tpu"),
        ({"device": "cuda:77"}, "--device cuda:77: this machine has"),
        ({"batch_duration": 0}, "must be more than 0 seconds"),
    ],
)
def test_calls_that_are_wrong(
    checkpoint: str, folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        extract(str(folder / "manifest.json"), checkpoint, tmp_path / "out", ExtractOptions(**options))
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_bf16(checkpoint: str, folder: Path, tmp_path: Path) -> None:
    given = str(folder / "1")
    rows = [
        rows_of(extract(given, checkpoint, tmp_path / precision, ExtractOptions(precision=precision)).manifest)[0]
        for precision in ("fp32", "bf16")
    ]
    full, short = (np.load(row["feature_path"]) for row in rows)
    assert short.dtype == np.float32
    assert 0 < np.abs(full - short).max() < 0.2


def test_an_encoder_without_weights_of_its_own(tmp_path: Path) -> None:
    """Two draws differ, which the other tests rely on."""
    torch.manual_seed(1)
    first, second = (fresh_encoder(CONFIG).eval()(0.1 * torch.ones(16_000).cumsum(0).sin()) for _ in range(2))
    assert not torch.allclose(first.features, second.features)
