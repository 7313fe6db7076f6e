"""The section `loader`: the timed part, the arguments for NeMo, and the reads of the floor."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

from conftest import tiny_config, write_noise_wav
from data.loader.late_stream import LateStream
from nestcli.bench import ours, side, stages
from nestcli.bench.context import BenchContext, Options, plain
from nestcli.bench.corpus import make_bench_corpus
from nestcli.bench.floor import chosen_reads, read_and_mix
from nestcli.bench.loader import loader_section, nemo_block
from nestcli.bench.material import read_material
from nestcli.bench.peer import nemo_version, our_peer
from nestcli.config import load_config
from nestcli.conversation import DiedError
from nestcli.data.datamodule import NestDataModule
from nestcli.data.dataset import NoiseBatch
from nestcli.errors import DataError, MissingDependencyError, NestError


def context_of(config: Any, folder: Path, **options: Any) -> BenchContext:
    return BenchContext(config, Options(**options), folder, lambda doing: None)


def test_a_round_counts_only_what_is_delivered_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    delivered = iter([100.0, 100.0, 1.0, 2.0, 3.0, 4.0])
    monkeypatch.setitem(side.STATE, "batches", delivered)
    facts = side.timed_round({"skip": 2, "seconds": 0.0, "least": 3})
    assert (facts["audio_seconds"], facts["batches"]) == (6.0, 3)
    assert 0 <= facts["processor_seconds"] < 1

    def slow() -> Any:
        while True:
            time.sleep(0.02)
            yield 1.0

    monkeypatch.setitem(side.STATE, "batches", slow())
    facts = side.timed_round({"skip": 0, "seconds": 0.1, "least": 1})
    assert 0.1 <= facts["seconds"] < 1
    assert facts["batches"] == pytest.approx(facts["seconds"] / 0.02, rel=0.5)


def test_epochs_follow_one_another() -> None:
    batches = side.endless([1, 2], float)
    assert [next(batches) for _ in range(5)] == [1.0, 2.0, 1.0, 2.0, 1.0]


@pytest.mark.slow
def test_the_section(corpus: dict[str, Path], tmp_path: Path) -> None:
    context = context_of(tiny_config(corpus), tmp_path, rounds=2, seconds=0.2)
    section = loader_section(context).to_json()
    assert section["name"] == "loader"
    assert (section["nemo"], section["ratio"], section["peak_memory_bytes"]["nemo"]) == (None, None, None)
    assert 0 < section["ours"]["min"] <= section["ours"]["median"] <= section["ours"]["max"]
    assert section["peak_memory_bytes"]["ours"] > 100e6
    assert 0 < section["floor"]["share"] < 2
    busy = section["per_processor_second"]
    assert busy["share_of_floor"] == pytest.approx(busy["ours"] / busy["floor"])
    assert (set(busy), busy["ratio"]) == ({"ours", "floor", "ratio", "share_of_floor"}, None)
    cost = section["microseconds_per_second_of_audio"]
    assert {"decode", "noise: decode"} <= set(cost["ours"]) <= {*stages.STAGES, "loader process"}
    assert sum(cost["floor"].values()) == pytest.approx(cost["floor_total"], rel=0.5)
    json.dumps(section)


@pytest.mark.slow
def test_no_manifest_no_matter(tmp_path: Path) -> None:
    context = context_of(load_config("demo"), tmp_path)
    config = context.loader_config()
    assert (config.model.train_ds.num_workers, config.model.validation_ds.manifest_filepath) == (1, None)
    material = read_material(config)
    assert len(material.speech) > 20
    assert material.noise is not None
    batch = NestDataModule(config).train_batch(0, 0)
    assert float(batch.noisy_audio.abs().max()) > 0.01
    assert context.made() == context.made()


def test_the_corpus_is_what_it_says(tmp_path: Path) -> None:
    speech, _ = make_bench_corpus(tmp_path, speech=3, noise=1, seconds=(1.0, 2.0), noise_seconds=(1.0, 1.0))
    for line in speech.read_text().splitlines():
        row = json.loads(line)
        samples, rate = sf.read(row["audio_filepath"])
        assert rate == 16_000
        assert len(samples) / rate == row["duration"]
        assert 0.2 < np.abs(samples).max() <= 0.31
        packed = Path(row["audio_filepath"]).stat().st_size / (2 * len(samples))
        assert 0.35 < packed < 0.8  # speech packs to about half: noise that packs worse would be slow to read


def test_the_floor_reads_what_the_loader_reads(tmp_path: Path) -> None:
    for name, seconds, rate in (("a", 2.0, 16_000), ("b", 3.0, 8_000), ("noise", 2.5, 16_000)):
        write_noise_wav(tmp_path / f"{name}.wav", seconds, 1, rate=rate)
    rows = [
        {"audio_filepath": "a.wav", "duration": 1.5, "offset": 0.25},
        {"audio_filepath": "b.wav", "duration": 3.0},
    ]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "noise.json").write_text(json.dumps({"audio_filepath": "noise.wav", "duration": 2.5}) + "\n")
    manifests = {"train": tmp_path / "train.json", "val": tmp_path / "train.json", "noise": tmp_path / "noise.json"}
    config = context_of(tiny_config(manifests), tmp_path).loader_config()
    found = {Path(read.speech).name: read for read in chosen_reads(plain(config))}
    a, b = found["a.wav"], found["b.wav"]
    assert (a.speech_start, a.speech_frames, a.noise_frames) == (4_000, 24_000, 24_000)
    assert (b.speech_start, b.speech_frames, b.noise_frames) == (0, 24_000, 40_000)
    assert 0 <= a.noise_start <= 16_000
    facts = read_and_mix([a, b], 0.05)
    assert facts["audio_seconds"] >= 1.5
    assert sum(facts["stages"].values()) == pytest.approx(facts["seconds"], rel=0.2)


def test_nemo_is_told_its_own_words() -> None:
    words = [
        "model.train_ds.manifest_filepath=[a.json,b.json]",
        "model.train_ds.batch_augmentor._target_=nestcli.MultiSpeakerNoiseAugmentation",
        "model.train_ds.batch_augmentor.nemo_exact=true",
    ]
    block = nemo_block(load_config("small", words), seconds=20_000.0)
    assert block["manifest_filepath"] == "a.json,b.json,a.json,b.json,a.json,b.json"
    assert block["batch_augmentor"]["_target_"].startswith("nemo.collections.asr.modules.ssl_modules")
    assert "nemo_exact" not in block["batch_augmentor"]
    assert block["batch_augmentor"]["prob"] == 0.5
    assert block["sample_rate"] == 16_000
    assert nemo_block(load_config("small", words))["manifest_filepath"] == ["a.json", "b.json"]
    without = load_config("small", ["model.train_ds.batch_augmentor=null", *words[:1]])
    assert "batch_augmentor" not in nemo_block(without)


@pytest.mark.parametrize(("device", "copied"), [("cpu", False), ("cuda", True)])
def test_the_loader_delivers_where_training_uses_it(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, copied: bool
) -> None:
    stream = LateStream()
    monkeypatch.setattr("nestcli.data.datamodule.CudaStream", lambda device: stream)
    monkeypatch.setattr(NoiseBatch, "to", lambda batch, device: batch)
    monkeypatch.setitem(side.STATE, "batches", None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    config = plain(context_of(tiny_config(corpus), tmp_path).loader_config())
    assert config["model"]["train_ds"]["pin_memory"] is True
    ours.open_loader({"config": config, "device": device})
    assert next(side.STATE["batches"]) > 1
    assert bool(stream.handed) is copied


# ---- stages ------------------------------------------------------------------------------------------------------


def test_all_time_is_booked(corpus: dict[str, Path]) -> None:
    data = NestDataModule(tiny_config(corpus))
    start = time.perf_counter()
    with stages.StageClock() as clock:
        for number in range(60):
            data.train_batch(number, 0)
    elapsed = time.perf_counter() - start
    assert sum(clock.seconds.values()) == pytest.approx(elapsed, rel=0.1)
    assert clock.seconds["decode"] > 0
    assert set(clock.seconds) <= set(stages.STAGES)


def frames_of(*codes: tuple[str, str]) -> Any:
    """A stack of frames, the innermost first."""

    class Code:
        def __init__(self, file: str, name: str) -> None:
            self.co_filename, self.co_name = file, name

    class Frame:
        def __init__(self, code: Code, back: Any) -> None:
            self.f_code, self.f_back = code, back

    frame = None
    for file, name in reversed(codes):
        frame = Frame(Code(file, name), frame)
    return frame


NOISE = "/x/nestcli/data/utterance_audio.py"


@pytest.mark.parametrize(
    ("codes", "stage"),
    [
        ([("/x/soundfile.py", "read"), ("/x/nestcli/audio/load.py", "load_audio")], "decode"),
        ([("/x/soundfile.py", "_open"), ("/x/nestcli/audio/load.py", "decoder")], "open"),
        ([("/x/soundfile.py", "read"), ("/x/nestcli/audio/load.py", "f"), (NOISE, "draw")], "noise: decode"),
        ([(NOISE, "_white_noise"), (NOISE, "draw"), ("/x/nestcli/data/dataset.py", "_batch")], "noise"),
        ([("/x/nestcli/data/dataset.py", "_stacked"), ("/x/nestcli/data/dataset.py", "collate")], "collate"),
        ([("/x/json/decoder.py", "decode"), ("/x/nestcli/data/manifest.py", "row")], "manifest entry"),
        ([("/x/torch/functional.py", "split"), ("/x/nestcli/data/dataset.py", "_mixed")], "mix"),
        ([("/x/nestcli/data/dataset.py", "_batch")], "other"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_stage_of_a_stack(codes: list[tuple[str, str]], stage: str) -> None:
    assert stages.stage_of(frames_of(*codes)) == stage


# ---- processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_says_what_is_wrong(corpus: dict[str, Path], tmp_path: Path) -> None:
    missing = {**corpus, "train": tmp_path / "missing.json"}
    config = plain(context_of(tiny_config(missing), tmp_path).loader_config())
    with our_peer() as peer:
        with pytest.raises(DataError, match=r"missing\.json"):
            peer.ask("open_loader", config=config)
        with pytest.raises(NestError, match="KeyError"):
            peer.ask("no such thing")
        own = peer.ask("memory")["main"]
        assert own["peak"] >= own["resident"] > 1e6
        assert own["own"] <= own["proportional"] <= own["resident"] * 1.1


def test_a_process_that_dies_is_told_from_one_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with our_peer() as peer:
        peer._process.kill()
        with pytest.raises(DiedError, match="ended with -9"):
            peer.ask("memory")
    assert peer._process.poll() is not None


@pytest.mark.slow
def test_a_python_without_nemo(tmp_path: Path) -> None:
    import sys

    with pytest.raises(MissingDependencyError, match="NeMo does not work there"):
        nemo_version(sys.executable)
    with pytest.raises(NestError, match="program not found"):
        nemo_version(str(tmp_path / "python"))
