"""`nest augment`: what is written is what its manifest says."""

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import typer
from typer.testing import CliRunner

from nestcli.audio.load import load_audio
from nestcli.augment.noisy_copy import CopyOptions, write_copy
from nestcli.augment.run import AugmentOptions, augment
from nestcli.cli.augment import augment as command
from nestcli.data.mixing import AugmentationConfig
from nestcli.errors import ConfigError, DataError, RunFailedError
from nestcli.jobs.pool import Died

RATE = 16000
SHARED = Path(__file__).parents[2].parent / "shared" / "audio"
MIXING = AugmentationConfig(
    prob=1.0, noise_ratio=0.5, min_r_speech=-5.0, max_r_speech=5.0, min_r_noise=-5.0, max_r_noise=20.0,
    min_mix_rate=0.3, max_mix_rate=0.9, max_num_segments=3, max_num_speakers=2,
)  # fmt: skip


def manifest(path: Path, entries: list[dict]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def sound(path: Path, seconds: float, level: float = 0.1) -> Path:
    rng = np.random.default_rng(list(os.fsencode(path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, level * rng.standard_normal(int(seconds * RATE)), RATE)
    return path


@pytest.fixture
def speech(tmp_path) -> str:
    """24 utterances of 4 speakers, some of them very quiet, some at full scale."""
    entries = []
    for number in range(24):
        level = (0.1, 0.0002, 0.35)[number % 3]
        path = sound(tmp_path / "speech" / f"{number}.wav", 1.0 + 0.05 * number, level)
        entries.append({"audio_filepath": str(path), "duration": 1.0 + 0.05 * number, "speaker": f"s{number % 4}"})
    entries[5].update(offset=0.2, duration=0.7, text="five")
    return manifest(tmp_path / "speech.json", entries)


@pytest.fixture
def noise(tmp_path) -> str:
    paths = [sound(tmp_path / "noise" / f"{number}.wav", 0.3 + number) for number in range(3)]
    return manifest(
        tmp_path / "noise.json", [{"audio_filepath": str(path), "duration": 0.3 + n} for n, path in enumerate(paths)]
    )


def rows(out: Path, name: str = "manifest.json") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def clean_of(row: dict) -> np.ndarray:
    return load_audio(
        row["clean_filepath"], sample_rate=RATE, offset=row["clean_offset"], duration=row["clean_duration"]
    )


def test_the_ratio_of_the_written_audio_is_the_recorded_one(tmp_path, speech, noise):
    summary = augment(speech, noise, tmp_path / "out", AugmentOptions(CopyOptions(MIXING), copies=2))
    written = rows(tmp_path / "out")
    assert (summary.written, summary.rejected, len(written)) == (48, 0, 48)
    assert summary.modes.keys() == {"noise", "speech"}
    assert any(row["augmentation"]["scale"] < 1 for row in written)
    assert any(len(row["augmentation"]["segments"]) > 1 for row in written)
    for row in written:
        done, clean = row["augmentation"], clean_of(row).astype(np.float64)
        noisy = load_audio(row["audio_filepath"], sample_rate=RATE)
        assert len(noisy) == len(clean)
        assert np.abs(noisy).max() <= 1
        mixed = noisy / done["scale"] - clean
        ratio = 10 * np.log10((clean**2).mean() / (mixed**2).mean())
        assert ratio == pytest.approx(done["ratio_db"], abs=0.1)
        inside = np.zeros(len(clean), bool)
        for segment in done["segments"]:
            inside[segment["start_sample"] : segment["start_sample"] + segment["samples"]] = True
            assert segment["start"] == pytest.approx(segment["start_sample"] / RATE, abs=1e-6)
        assert np.abs(mixed[~inside]).max(initial=0) < 2e-4  # the rounding of 16 bits, turned up
        span = 10 * np.log10((clean[inside] ** 2).sum() / (mixed[inside] ** 2).sum())
        assert span == pytest.approx(done["span_ratio_db"], abs=0.1)


def test_the_pieces_are_those_that_the_manifest_names(tmp_path, speech, noise):
    augment(speech, noise, tmp_path / "out", AugmentOptions(CopyOptions(MIXING)))
    for row in rows(tmp_path / "out"):
        done = row["augmentation"]
        mixed = load_audio(row["audio_filepath"], sample_rate=RATE) / done["scale"] - clean_of(row)
        for segment in done["segments"]:
            source = load_audio(segment["source"], sample_rate=RATE)
            start = segment["source_sample"]
            assert start == round(segment["source_offset"] * RATE)
            if segment["source"] == "white noise":
                continue
            count = min(segment["samples"], len(source) - start, 400)
            ours = mixed[segment["start_sample"] :][:count]
            assert np.abs(ours - done["gain"] * source[start : start + count]).max() < 5e-4
        others = {segment.get("speaker") for segment in done["segments"]}
        assert row["speaker"] not in others
        assert (done["mode"] == "speech") == (None not in others)
        assert done["speakers"] == sorted(others - {None})


def test_what_the_speech_manifest_says_is_carried_on(tmp_path, speech, noise):
    augment(speech, noise, tmp_path / "out", AugmentOptions(CopyOptions(MIXING)))
    row = rows(tmp_path / "out")[5]
    assert (row["text"], row["speaker"], row["clean_offset"], row["clean_duration"]) == ("five", "s1", 0.2, 0.7)
    assert row["duration"] == pytest.approx(0.7)
    assert "offset" not in row


def contents(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes().replace(os.fsencode(out), b"OUT")
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def test_the_result_depends_on_the_seed_and_not_on_processes_or_interruptions(tmp_path, speech, noise):
    augment(speech, noise, tmp_path / "one", AugmentOptions(CopyOptions(MIXING), jobs=1))
    augment(speech, noise, tmp_path / "two", AugmentOptions(CopyOptions(MIXING), jobs=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def stop(done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        augment(speech, noise, tmp_path / "three", AugmentOptions(CopyOptions(MIXING), jobs=1), stop)
    assert not (tmp_path / "three" / "manifest.json").exists()
    augment(speech, noise, tmp_path / "three", AugmentOptions(CopyOptions(MIXING), jobs=1))
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    augment(speech, noise, tmp_path / "one", AugmentOptions(CopyOptions(MIXING, seed=1)))
    other = {row["audio_filepath"] for row in rows(tmp_path / "one")}
    augment(speech, noise, tmp_path / "one", AugmentOptions(CopyOptions(MIXING)))  # as it was, whatever came between
    again = {row["audio_filepath"] for row in rows(tmp_path / "one")}
    assert not again & other
    sound = contents(tmp_path / "two")
    assert {name: contents(tmp_path / "one")[name] for name in sound} == sound


def test_without_noise_other_speakers_are_mixed_in(tmp_path, speech):
    summary = augment(speech, None, tmp_path / "out", AugmentOptions(CopyOptions(MIXING)))
    assert summary.modes == {"speech": 24}


def test_nothing_to_mix_leaves_speech_as_it_is(tmp_path, speech, noise):
    summary = augment(
        speech,
        noise,
        tmp_path / "out",
        AugmentOptions(CopyOptions(AugmentationConfig(0.0, 0.5, -5, 5, -5, 20, 0.5, 0.5))),
    )
    assert summary.modes == {"none": 24}
    row = rows(tmp_path / "out")[0]
    assert np.array_equal(load_audio(row["audio_filepath"], sample_rate=RATE), clean_of(row))


def test_what_cannot_be_read_is_left_out_and_told(tmp_path, speech, noise):
    (tmp_path / "speech" / "3.wav").write_text("<html>")
    cut = tmp_path / "speech" / "7.wav"
    cut.write_bytes(cut.read_bytes()[:16044])
    (tmp_path / "noise" / "1.wav").unlink()
    summary = augment(speech, noise, tmp_path / "out", AugmentOptions(CopyOptions(MIXING)))
    assert (summary.written, summary.rejected) == (22, 2)
    rejected = rows(tmp_path / "out", "rejected.jsonl")
    assert [(Path(row["audio_filepath"]).name, row["reason"]) for row in rejected if "kind" not in row] == [
        ("3.wav", "unreadable"),
        ("7.wav", "truncated"),
    ]
    assert {row["reason"] for row in rejected if "kind" in row} == {"missing"}


def test_sounds_that_cannot_be_mixed(tmp_path, noise):
    """NaN is rejected; silence, one sample, more than full scale and two channels are written as far as they can be."""
    rng = np.random.default_rng(0)
    sounds = {
        "nan": np.full(RATE, np.nan), "silent": np.zeros(RATE), "short": np.full(1, 0.5),
        "loud": 4 * rng.standard_normal(RATE), "stereo": 0.1 * rng.standard_normal((RATE, 2)),
    }  # fmt: skip
    entries = []
    for name, samples in sounds.items():
        sf.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
        entries.append({"audio_filepath": f"{name}.wav", "duration": len(samples) / RATE})
    path = manifest(tmp_path / "speech.json", entries)
    for prob in (0.0, 1.0):
        mixing = replace(MIXING, prob=prob, noise_ratio=1.0)
        summary = augment(path, noise, tmp_path / f"out{prob}", AugmentOptions(CopyOptions(mixing), jobs=1))
        assert (summary.written, summary.reasons) == (4, {"not_finite": 1})
        found = {Path(row["clean_filepath"]).stem: row for row in rows(tmp_path / f"out{prob}")}
        assert found["silent"]["augmentation"]["mode"] == "none"
        loud = found["loud"]
        assert loud["augmentation"]["scale"] < 0.5
        if prob == 0:
            ours = load_audio(loud["audio_filepath"], sample_rate=RATE) / loud["augmentation"]["scale"]
            assert np.abs(ours - clean_of(loud)).max() < 1e-3


def test_full_scale_speech_is_written_to_the_bit(tmp_path):
    samples = np.arange(-32768, 32768, 3, dtype=np.int16)
    sf.write(tmp_path / "s.wav", samples, RATE)
    path = manifest(tmp_path / "speech.json", [{"audio_filepath": "s.wav", "duration": len(samples) / RATE}])
    augment(path, None, tmp_path / "out", AugmentOptions(CopyOptions(replace(MIXING, prob=0.0)), jobs=1))
    assert np.array_equal(sf.read(rows(tmp_path / "out")[0]["audio_filepath"], dtype="int16")[0], samples)


def test_a_lone_other_speaker_is_found_and_nobody_is_mixed_with_themselves(tmp_path):
    path = sound(tmp_path / "s.wav", 0.5)
    entries = [{"audio_filepath": str(path), "duration": 0.5, "speaker": "a"} for _ in range(120)]
    entries[23]["speaker"] = "b"
    options = AugmentOptions(CopyOptions(MIXING), jobs=1)
    augment(manifest(tmp_path / "two.json", entries), None, tmp_path / "two", options)
    for row in rows(tmp_path / "two"):
        assert row["augmentation"]["speakers"] == (["a"] if row["speaker"] == "b" else ["b"])
    entries[23]["speaker"] = "a"
    summary = augment(manifest(tmp_path / "one.json", entries[20:30]), None, tmp_path / "one", options)
    assert summary.modes == {"none": 10}


def test_others_that_cannot_be_read_are_replaced(tmp_path, speech):
    for number in range(0, 24, 2):
        (tmp_path / "speech" / f"{number}.wav").write_text("<html>")
    summary = augment(speech, None, tmp_path / "out", AugmentOptions(CopyOptions(MIXING), jobs=1))
    assert (summary.written, summary.rejected, summary.modes) == (12, 12, {"speech": 12})


def test_noise_that_cannot_be_read_is_told_once_and_all_of_it_stops_the_run(tmp_path, speech, noise):
    sf.write(tmp_path / "noise" / "0.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    options = AugmentOptions(CopyOptions(replace(MIXING, noise_ratio=1.0)), jobs=1)
    summary = augment(speech, noise, tmp_path / "out", options)
    assert (summary.written, summary.noise_rejected) == (24, 1)
    (bad,) = rows(tmp_path / "out", "rejected.jsonl")
    assert (bad["kind"], Path(bad["audio_filepath"]).name) == ("noise", "0.wav")
    assert "not a number" in bad["detail"]
    for path in (tmp_path / "noise").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="none of 20 noise files"):
        augment(speech, noise, tmp_path / "other", options)
    assert not (tmp_path / "other" / "manifest.json").exists()


def test_a_full_disk_stops_the_run_and_rejects_nothing(tmp_path, speech):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(RunFailedError, match="cannot be written: File too large"):
            write_copy(speech, None, 0, 0, tmp_path / "audio", CopyOptions(MIXING))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "audio").rglob("*.*")) == []


def test_audio_that_is_gone_is_made_again(tmp_path, speech):
    options = AugmentOptions(CopyOptions(MIXING), jobs=1)
    augment(speech, None, tmp_path / "out", options)
    before = contents(tmp_path / "out")
    Path(rows(tmp_path / "out")[7]["audio_filepath"]).unlink()
    augment(speech, None, tmp_path / "out", options)
    assert contents(tmp_path / "out") == before


def test_an_interrupted_run_with_other_draws_leaves_what_is_there(tmp_path, speech):
    augment(speech, None, tmp_path / "out", AugmentOptions(CopyOptions(MIXING), jobs=1))
    before = contents(tmp_path / "out")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        augment(speech, None, tmp_path / "out", AugmentOptions(CopyOptions(MIXING, seed=1), jobs=1), stop)
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)


def test_what_is_read_is_not_replaced(tmp_path, speech):
    Path(speech).rename(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="would replace"):
        augment(str(tmp_path / "manifest.json"), None, tmp_path, AugmentOptions(CopyOptions(MIXING)))
    assert (tmp_path / "manifest.json").stat().st_size


class DyingPool:
    """A pool in this process; what works on line 5 dies."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def in_order(self, work, tasks, limit=None):
        for task in tasks:
            yield Died("killed by SIGSEGV") if task.first <= 5 < task.end else work(task)


def test_a_crash_costs_one_utterance(tmp_path, speech, monkeypatch):
    monkeypatch.setattr("nestcli.augment.run.local_pool", DyingPool)
    summary = augment(speech, None, tmp_path / "out", AugmentOptions(CopyOptions(MIXING)))
    assert (summary.written, summary.reasons) == (23, {"crashed": 1})
    assert rows(tmp_path / "out", "rejected.jsonl")[0]["line"] == 6


def test_a_killed_run_goes_on(tmp_path, speech, noise):
    """SIGKILL after the first results; the journal and files that it does not list exist by then."""
    code = (
        "import os, signal, sys\n"
        "from nestcli.augment.run import AugmentOptions, augment\n"
        "from nestcli.data.mixing import AugmentationConfig\n"
        "from nestcli.augment.noisy_copy import CopyOptions\n"
        f"options = AugmentOptions(CopyOptions({MIXING!r}), jobs=2)\n"
        "augment(*sys.argv[1:], options, lambda done, total: os.kill(os.getpid(), signal.SIGKILL))"
    )
    words = [sys.executable, "-c", code, speech, noise, str(tmp_path / "out")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    augment(speech, noise, tmp_path / "out", AugmentOptions(CopyOptions(MIXING), jobs=2))
    augment(speech, noise, tmp_path / "whole", AugmentOptions(CopyOptions(MIXING), jobs=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings are not here")
def test_odd_files_as_speech_and_as_noise(tmp_path):
    odd = [{"audio_filepath": str(path), "duration": 1.0} for path in sorted((SHARED / "odd").iterdir())]
    path = manifest(tmp_path / "odd.json", odd)
    summary = augment(path, path, tmp_path / "out", AugmentOptions(CopyOptions(MIXING)))
    assert summary.written >= 10
    assert summary.written + summary.rejected == len(odd)


def call(*words):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(tmp_path, speech, noise):
    pytest.importorskip("matplotlib")
    words = ("--speech", speech, "--noise", noise, "--out", tmp_path / "out", "--preview", 2)
    result = call(*words, "prob=1", "noise_ratio=1.0", "--json")
    document = json.loads(result.stdout)
    assert (document["written"], document["modes"]) == (24, {"noise": 24})
    assert all(Path(path).read_bytes()[:4] == b"\x89PNG" for path in document["pictures"])
    assert len(document["pictures"]) == 2
    kind = "_target_=nestcli.SpeakerNoiseAugmentation"
    assert call(*words[:6], "--json", kind).exit_code == 0


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["porb=1"], ConfigError, "unknown augmentation setting porb. Did you mean prob?"),
        (["what=1"], ConfigError, "Known: _target_, prob, noise_ratio"),
        (["prob"], ConfigError, "must be key=value"),
        (["prob=2"], ConfigError, "^prob: 2.0 must be from 0 to 1"),
        (["--copies", "0"], SystemExit, "2"),
        (["--jobs", "-1"], SystemExit, "2"),
    ],
)
def test_mistakes_are_one_message(tmp_path, speech, words, error, message):
    result = call("--speech", speech, "--out", tmp_path / "out", *words)
    assert isinstance(result.exception, error)
    with pytest.raises(error, match=message):
        raise result.exception


def test_nothing_that_can_be_read_fails(tmp_path, noise):
    path = manifest(tmp_path / "gone.json", [{"audio_filepath": "gone.wav", "duration": 1.0}])
    result = call("--speech", path, "--noise", noise, "--out", tmp_path / "out", "--json")
    assert isinstance(result.exception, RunFailedError)
    assert json.loads(result.stdout)["rejected"] == 1
