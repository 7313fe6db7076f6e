"""Folders for results, current folders and names that somebody else has prepared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from hostile.bombs import doubling_key, packed_silence, with_table
from hostile.corpus import Case, good_model, tone
from hostile.watch import Outcome, call
from nestcli.audio.inspect import inspect_audio
from nestcli.checkpoint.nemo import write_nemo
from nestcli.cli import plain
from nestcli.config import load_config
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

PRECIOUS = "somebody's file\n"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "m.json"
    tone(tmp_path / "in" / "a.wav")
    path.write_text(json.dumps({"audio_filepath": "a.wav", "duration": 1.5, "speaker": "$\\frac{$"}) + "\n")
    return path


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a file that nobody is to touch."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text(PRECIOUS)
    return tmp_path / "elsewhere"


@pytest.fixture(scope="module")
def nemo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["d_model=16", "n_heads=2", "n_layers=1", "subsampling_conv_channels=8"]
    config = load_config("small", [*(f"model.encoder.{word}" for word in words), "model.num_classes=32"])
    path = tmp_path_factory.mktemp("model") / "x.nemo"
    write_nemo(path, config, NestModel(NestConfig.from_config(config)).state_dict())
    return path


def run(tmp_path: Path, *words: str) -> Outcome:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    return call(Case(words[0], folder, words), tmp_path, folder)


def untouched(elsewhere: Path) -> bool:
    return [path.name for path in elsewhere.iterdir()] == ["file"] and (elsewhere / "file").read_text() == PRECIOUS


def plant(out: Path, name: str, target: Path) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(target)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".lock", ()),
        (".prepared.jsonl", ()),
        ("audio", ("--convert",)),
        ("train_shards", ("--shards", "1")),
    ],
)
def test_prepare_data_follows_no_link(
    name: str, words: tuple[str, ...], manifest: Path, elsewhere: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run" / "out"
    plant(out, name, elsewhere / "file" if name.startswith(".") else elsewhere)
    outcome = run(tmp_path, "prepare-data", str(manifest), "--out", str(out), "--jobs", "1", *words)
    assert outcome.code == 2
    assert name in outcome.errors
    assert "link" in outcome.errors
    assert untouched(elsewhere)


def test_a_link_deep_in_a_folder_of_converted_audio_is_found(manifest: Path, elsewhere: Path, tmp_path: Path) -> None:
    words = ("prepare-data", str(manifest.parent), "--out", str(tmp_path / "out"), "--jobs", "1", "--convert")
    assert run(tmp_path, *words).code == 0
    plant(tmp_path / "out" / "audio", "speaker", elsewhere)
    outcome = run(tmp_path, *words)
    assert outcome.code == 2
    assert "speaker is a link" in outcome.errors


def test_a_second_name_of_a_file_is_not_written_to(manifest: Path, elsewhere: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    os.link(elsewhere / "file", out / ".prepared.jsonl")
    outcome = run(tmp_path, "prepare-data", str(manifest), "--out", str(out), "--jobs", "1")
    assert outcome.code == 2
    assert "second hard link" in outcome.errors
    assert untouched(elsewhere)


@pytest.mark.parametrize("name", [".lock", ".prepared.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_stops_nothing(name: str, make: Callable[[Path], None], manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out" / name)
    outcome = run(tmp_path, "prepare-data", str(manifest), "--out", str(tmp_path / "out"), "--jobs", "1")
    assert outcome.code == 2
    assert name in outcome.errors


@pytest.mark.parametrize("name", ["audio", "preview"])
def test_augment_follows_no_link(name: str, manifest: Path, elsewhere: Path, tmp_path: Path) -> None:
    plant(tmp_path / "out", name, elsewhere)
    words = ("--out", str(tmp_path / "out"), "--jobs", "1", "--preview", "1", "prob=1.0")
    outcome = run(tmp_path, "augment", "--speech", str(manifest), *words)
    assert outcome.code == 2
    assert untouched(elsewhere)


def test_extract_follows_no_link_and_reads_nothing_planted(
    manifest: Path, elsewhere: Path, nemo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("extract", str(manifest), "--checkpoint", str(nemo), "--out", str(out))
    assert run(tmp_path, *words).code == 0
    for planted in ("features/00001", ".features"):
        plant(out, planted, elsewhere)
        outcome = run(tmp_path, *words)
        assert outcome.code == 2
        assert "is a link" in outcome.errors
        (out / planted).unlink()
    for name, text in (("features.json", '{"no": 1}\n'), ("extract.json", "[]"), ("rejected.jsonl", "no JSON\n")):
        whole = (out / name).read_text()
        (out / name).write_text(text)
        outcome = run(tmp_path, *words)
        assert outcome.code == 2, (name, outcome.errors)
        assert "internal" not in outcome.errors
        (out / name).write_text(whole)
    assert untouched(elsewhere)


@pytest.mark.parametrize("ending", ["sph", "opus"])
def test_features_for_lhotse_put_no_name_into_a_shell(ending: str, nemo: Path, tmp_path: Path) -> None:
    """Lhotse's own readers of these two would."""
    name = f"a;touch canary;$(touch canary2).{ending}"
    (tmp_path / "in").mkdir()
    tone(tmp_path / "a.wav").rename(tmp_path / "in" / name)
    words = ("--checkpoint", str(nemo), "--out", str(tmp_path / "out"), "--format", "lhotse")
    outcome = run(tmp_path, "extract", str(tmp_path / "in"), *words)
    assert outcome.code == 0, outcome.errors
    assert not outcome.started
    assert not list((tmp_path / "run").glob("canary*"))


def test_pretraining_writes_only_where_it_is_told(manifest: Path, elsewhere: Path, tmp_path: Path) -> None:
    data = (f"model.train_ds.manifest_filepath={manifest}", "model.train_ds.noise_manifest=null",
            "model.validation_ds.manifest_filepath=null", "model.train_ds.batch_size=1", "trainer.accelerator=cpu",
            "model.train_ds.num_workers=0", "model.optim.sched.warmup_steps=2", "model.encoder.d_model=16",
            "model.encoder.n_layers=1", "trainer.max_steps=1", "--dry-run")  # fmt: skip
    exp = f"exp_manager.exp_dir={tmp_path / 'out'}"
    plant(tmp_path / "out" / "x", "checkpoints", elsewhere)
    for words, said in (
        (("exp_manager.name=x", exp), "is a link"),
        (("exp_manager.name=../../x", exp), "leads outside"),
        ((f"exp_manager.name={elsewhere}", exp), "leads outside"),
        (("exp_manager.checkpoint_callback_params.filename=../x", exp), "must be a name such as"),
        (("exp_manager.checkpoint_callback_params.filename=x{{val_loss:999999999}}", exp), "must be a name such as"),
        (("exp_manager.checkpoint_callback_params.filename=x{{val_loss.__class__}}", exp), "must be a name such as"),
        (("trainer.devices=100000", exp), "100,000 processes"),
        (("model.encoder.n_layers=512", "model.encoder.d_model=65536", "model.encoder.n_heads=8", exp), "GiB"),
    ):
        outcome = run(tmp_path, "pretrain", "demo", *data, *words)
        assert outcome.code == 2, (words, outcome.errors)
        assert said in outcome.errors
    assert untouched(elsewhere)


def test_a_checkpoint_does_not_say_where_a_run_is_written() -> None:
    from nestcli.config import config_from_dict, resolved

    content = resolved(load_config("demo", ["exp_manager.exp_dir=/elsewhere", "exp_manager.create_wandb_logger=true"]))
    config = config_from_dict(content, "x.ckpt")
    assert config.exp_manager.exp_dir is None
    assert config.exp_manager.create_wandb_logger is False


def test_a_planted_checkpoint_is_looked_at_before_a_run_goes_on_from_it(tmp_path: Path) -> None:
    from nestcli.checkpoint.lightning import load_lightning_checkpoint
    from nestcli.errors import CheckpointError

    path = tmp_path / "x-step=1-last.ckpt"
    path.write_bytes(with_table(doubling_key()))
    for mmap in (True, False):
        with pytest.raises(CheckpointError, match="tuples that grow"):
            load_lightning_checkpoint(path, mmap=mmap)


def test_no_module_of_the_current_folder_is_imported(manifest: Path, tmp_path: Path) -> None:
    """Processes of ours are started in the folder where the user stands, which may be a stranger's corpus."""
    for name in ("nestcli", "json", "pickle", "soundfile", "sitecustomize", "numpy"):
        (manifest.parent / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    nest = [sys.executable, "-c", "import sys; del sys.path[0]; from nestcli.cli.app import main; main()"]
    words = ["prepare-data", manifest.name, "--out", str(tmp_path / "out"), "--jobs", "1"]
    done = subprocess.run(
        [*nest, *words], cwd=manifest.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(load_config.__code__.co_filename).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


# ---- words -----------------------------------------------------------------------------------------------------


def test_names_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    names = ["\x1b[31mred\x1b]0;title\x07.wav", "turned\u202egpj.wav", "two\nerror: lines.wav", "\x9b31m.wav", "-x.wav"]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(b"RIFFxxxxWAVE" + bytes(100))
        outcome = run(
            tmp_path, "prepare-data", str(tmp_path / "in" / name), "--out", str(tmp_path / "out"), "--jobs", "1"
        )
        printed = outcome.errors + (tmp_path / "run" / "stdout").read_text()
        assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(printed)
        assert not [line for line in printed.splitlines()[1:] if line.startswith("error")]
    for words in (("prepare-data", "\x1b[31m.json", "--out", "x"), ("count-params", "\x1b[31m.yaml"),
                  ("count-params", "\x1b[31m.nemo", "--debug"), ("extract", "x", "--checkpoint", "\x1b.nemo"),
                  ("compare", "demo", "--only", "\x1b[31m")):  # fmt: skip
        assert "\x1b" not in run(tmp_path, *words).errors


def test_what_is_shown_and_what_is_not() -> None:
    assert plain.shown("Zürich 中文 שלום\tab\n‌👩‍👩") == "Zürich 中文 שלום\tab\n‌👩‍👩"
    assert plain.shown("a\x1b[0m\x7f\x85\u2028\u2066\udcff") == r"a\x1b[0m\x7f\x85\u2028\u2066\udcff"
    assert len(plain.message("x" * 100_000)) < 5_000
    text = json.dumps({"a\x7f\u202e": "\U000e0041\udcff"}, ensure_ascii=False)
    assert json.loads(plain.json_text(text)) == json.loads(text)
    assert plain.json_text(text).isascii()


def test_tables_and_json_are_shown_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    from nestcli.cli import console

    evil = "\x1b]8;;http://x\x07[red]\u202e"
    console.table(evil, [evil], [[evil]])
    console.emit_json({evil: evil})
    console.line(evil)
    console.note(evil)
    console.error(evil)
    printed = "".join(capsys.readouterr())
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert printed.count("[red]") == 8


def test_names_in_pictures_are_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from nestcli.pictures import new_figure, save, words

    figure = new_figure(7, 9)
    axes = figure.subplots()
    axes.set_xticks(range(3), [words(name) for name in ("$\\frac{$", "a$b$c", "x" * 100_000)])
    save(figure, tmp_path / "x.png")
    assert len(words("x" * 100_000)) < 100


def test_names_in_the_page_of_a_comparison_are_no_markup() -> None:
    from datetime import datetime, timezone

    from nestcli.parity.page import document_of
    from nestcli.parity.report import Check, KnownDifference, Report, Section

    evil = '<script>alert(1)</script>"onload="x'
    checks = [Check(evil, False, evil, [evil], 1.0, 0.5, evil, evil)]
    difference = KnownDifference(evil, evil, evil, evil)
    page = document_of(
        Report(evil, evil, True, [Section("config", checks)], [difference], [evil]), datetime.now(timezone.utc)
    )
    assert "<script" not in page
    assert '"onload="' not in page


# ---- audio -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg", "aiff", "opus", "au", "caf", "w64"])
def test_audio_cut_anywhere_is_no_good_audio(kind: str, tmp_path: Path) -> None:
    """Whatever is left of it: a reason, or the same audio where only padding is gone; never a crash or a wait."""
    formats = {"opus": ("OGG", "OPUS"), "ogg": ("OGG", "VORBIS")}
    container, subtype = formats.get(kind, (kind.upper(), None))
    path = tmp_path / f"a.{kind}"
    samples = 0.1 * np.random.default_rng(3).standard_normal(24000)
    sf.write(path, samples, 16000, format=container, subtype=subtype)
    whole = path.read_bytes()
    length = inspect_audio(path).duration
    for end in [0, 1, 3, 4, 11, 12, 44, *np.linspace(50, len(whole) - 200, 30).astype(int).tolist()]:
        path.write_bytes(whole[:end])
        report = inspect_audio(path)
        assert report.reason or abs(report.duration - length) < 0.15 or kind in ("au", "caf", "w64"), end


@pytest.mark.skipif(shutil.which("sox") is None, reason="the program sox is not installed")
def test_sox_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        path = packed_silence(tmp_path / "a.wv", minutes=5)
    except subprocess.CalledProcessError:
        pytest.skip("this sox cannot write wv")
    monkeypatch.setattr("nestcli.audio.sox._LEAST_LIMIT", 1 << 20)
    report = inspect_audio(path)
    assert report.reason == "unreadable"
    assert "it decodes to more than" in report.detail


def test_good_weights_pass_the_look_at_their_pickle() -> None:
    from nestcli.checkpoint.pickled import check_pickle

    _, state = good_model()
    import io
    import zipfile

    from hostile.corpus import saved

    content = saved({"state_dict": state, "rng": tuple(range(700)), "nested": ((1, (2, 3)), torch.zeros(2))})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        [table] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        check_pickle(archive.read(table), "x")
