"""`nest augment`: what is written is what its manifest says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import typer
from typer.testing import CliRunner

from nestcli.cli.augment import augment as command
from nestcli.data.audio import load_audio
from nestcli.data.augment import AugmentOptions, augment
from nestcli.data.augmentation import AugmentationConfig
from nestcli.errors import ConfigError, DataError, RunFailedError

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
        row["clean_filepath"], sample_rate=RATE, offset=row.get("clean_offset", 0.0), duration=row.get("clean_duration")
    )


def test_the_ratio_of_the_written_audio_is_the_recorded_one(tmp_path, speech, noise):
    summary = augment(speech, noise, tmp_path / "out", AugmentOptions(MIXING, copies=2))
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
    augment(speech, noise, tmp_path / "out", AugmentOptions(MIXING))
    for row in rows(tmp_path / "out"):
        done = row["augmentation"]
        mixed = load_audio(row["audio_filepath"], sample_rate=RATE) / done["scale"] - clean_of(row)
        for segment in done["segments"]:
            source = load_audio(segment["source"], sample_rate=RATE)
            start = round(segment["source_offset"] * RATE)
            count = min(segment["samples"], len(source) - start, 400)
            ours = mixed[segment["start_sample"] :][:count]
            assert np.abs(ours - done["gain"] * source[start : start + count]).max() < 5e-4
        others = {segment.get("speaker") for segment in done["segments"]}
        assert row["speaker"] not in others
        assert (done["mode"] == "speech") == (None not in others)
        assert done["speakers"] == sorted(others - {None})


def test_what_the_speech_manifest_says_is_carried_on(tmp_path, speech, noise):
    augment(speech, noise, tmp_path / "out", AugmentOptions(MIXING))
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
    augment(speech, noise, tmp_path / "one", AugmentOptions(MIXING, jobs=1))
    augment(speech, noise, tmp_path / "two", AugmentOptions(MIXING, jobs=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")

    def stop(done: int, total: int) -> None:
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        augment(speech, noise, tmp_path / "three", AugmentOptions(MIXING, jobs=1), stop)
    assert not (tmp_path / "three" / "manifest.json").exists()
    augment(speech, noise, tmp_path / "three", AugmentOptions(MIXING, jobs=1))
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    augment(speech, noise, tmp_path / "one", AugmentOptions(MIXING, seed=1))
    other = {row["audio_filepath"] for row in rows(tmp_path / "one")}
    augment(speech, noise, tmp_path / "one", AugmentOptions(MIXING))  # as it was, whatever was written between
    again = {row["audio_filepath"] for row in rows(tmp_path / "one")}
    assert not again & other
    sound = contents(tmp_path / "two")
    assert {name: contents(tmp_path / "one")[name] for name in sound} == sound


def test_without_noise_other_speakers_are_mixed_in(tmp_path, speech):
    summary = augment(speech, None, tmp_path / "out", AugmentOptions(MIXING))
    assert summary.modes == {"speech": 24}


def test_nothing_to_mix_leaves_speech_as_it_is(tmp_path, speech, noise):
    summary = augment(
        speech, noise, tmp_path / "out", AugmentOptions(AugmentationConfig(0.0, 0.5, -5, 5, -5, 20, 0.5, 0.5))
    )
    assert summary.modes == {"none": 24}
    row = rows(tmp_path / "out")[0]
    assert np.array_equal(load_audio(row["audio_filepath"], sample_rate=RATE), clean_of(row))


def test_what_cannot_be_read_is_left_out_and_told(tmp_path, speech, noise):
    (tmp_path / "speech" / "3.wav").write_text("<html>")
    (tmp_path / "noise" / "1.wav").unlink()
    summary = augment(speech, noise, tmp_path / "out", AugmentOptions(MIXING))
    assert (summary.written, summary.rejected) == (23, 1)
    assert rows(tmp_path / "out", "rejected.jsonl")[0]["audio_filepath"].endswith("3.wav")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared recordings are not here")
def test_odd_files_as_speech_and_as_noise(tmp_path):
    odd = [{"audio_filepath": str(path), "duration": 1.0} for path in sorted((SHARED / "odd").iterdir())]
    path = manifest(tmp_path / "odd.json", odd)
    summary = augment(path, path, tmp_path / "out", AugmentOptions(MIXING))
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
        (["porb=1"], ConfigError, "Did you mean .*batch_augmentor.prob"),
        (["prob"], ConfigError, "is no key=value"),
        (["prob=2"], ConfigError, "not between 0 and 1"),
        (["--copies", "0"], DataError, "give 1 or more"),
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
