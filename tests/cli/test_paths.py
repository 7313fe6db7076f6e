"""Every path that a person can write is read alike: `~`, file:// and relative ones, in any option, key or line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import typer.main
from omegaconf import OmegaConf

from nestcli.cli.app import app
from nestcli.cli.paths import PATHS
from nestcli.config import load_config
from nestcli.data.corpus import noise_manifest, read_corpus
from nestcli.data.manifest_scan import read_manifests
from nestcli.training.initial_weights import weight_sources
from nestcli.training.run_folder import experiment_folder

COMMANDS = typer.main.get_command(app).commands
NO_PATHS = {  # texts with another meaning
    "SECTION", "FORMAT", "FIELD", "ADDRESS", "REGEX", "LIST", "PART", "DEVICE", "TYPE", "[key=value ...]",
}  # fmt: skip
WORDS = {"format", "store", "device", "precision", "split", "task"}  # without a metavar


def values_of(name):
    """(command, parameter) of every parameter that is a text or a path."""
    return [(command, param) for command, made in COMMANDS.items() for param in made.params if name(param)]


@pytest.mark.parametrize(
    ("command", "param"),
    values_of(lambda param: (param.metavar or "") in PATHS),
    ids=lambda each: each if isinstance(each, str) else each.name,
)
@pytest.mark.parametrize(("written", "meant"), [("~/a b", "/home/x/a b"), ("file:///a%20b", "/a b"), ("a~b", "a~b")])
def test_every_option_and_argument(command, param, written, meant, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    words = []
    for other in COMMANDS[command].params:  # what must be given
        text = written if other is param else "x"
        if other is param or other.required:
            words += [f"{other.opts[0]}={text}"] if other.param_type_name == "option" else [text]
    found = COMMANDS[command].make_context(command, words).params[param.name]
    assert found in (meant, [meant], (meant,))


def test_no_path_was_forgotten():
    """A new option that takes a text must have a path's metavar, or be listed above as not a path."""
    texts = values_of(lambda param: param.type.name in ("str", "path", "file"))
    others = [param for _, param in texts if (param.metavar or "") not in PATHS]
    assert all(param.type.name == "str" for param in others)
    metavars = {param.metavar for param in others if param.metavar and not param.metavar.startswith("[CONFIG")}
    assert metavars <= NO_PATHS
    assert {param.name for param in others if not param.metavar} <= WORDS
    assert len(texts) > 20


@pytest.mark.parametrize("command", ["pretrain", "count-params", "compare", "bench"])
def test_a_configuration_or_checkpoint_as_first_word(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/x")
    words = COMMANDS[command].make_context(command, ["~/a.yaml", "seed=~/b"]).params["words"]
    assert list(words) == ["/home/x/a.yaml", "seed=~/b"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with data in every form, and the current folder elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sf.write(tmp_path / "a b.wav", 0.1 * np.random.default_rng(0).standard_normal(32000), 16000)
    row = {"audio_filepath": str(tmp_path / "a b.wav"), "duration": 2.0}
    (tmp_path / "m.json").write_text(json.dumps(row) + "\n")
    recording = {"id": "r", "sources": [{"type": "file", "channels": [0], "source": "~/a b.wav"}]}
    cut = {"id": "c", "start": 0, "duration": 2.0, "channel": 0, "type": "MonoCut", "recording": recording}
    (tmp_path / "c.jsonl").write_text(json.dumps(cut) + "\n")
    placeholder = {**cut, "recording": {"sources": [{"type": "shar", "channels": [0], "source": ""}]}}
    (tmp_path / "shar").mkdir()
    (tmp_path / "shar" / "cuts.000000.jsonl").write_text(json.dumps(placeholder) + "\n")
    (tmp_path / "shar" / "recording.000000.tar").touch()
    (tmp_path / "audio_0.tar").touch()
    (tmp_path / "input.yaml").write_text("- {type: nemo, manifest_filepath: ~/m.json}\n")
    return tmp_path


PREFIXES = ["~", "file://{}", "..", "{}"]
KEYS = {
    "manifest": {"manifest_filepath": "H/m.json"},
    "manifests": {"manifest_filepath": ["H/m.json", "H/m.json"]},
    "joined": {"manifest_filepath": "H/m.json,H/m.json"},
    "buckets": {"manifest_filepath": [["H/m.json"], ["H/m.json"]]},
    "tars": {"is_tarred": True, "manifest_filepath": "H/m.json", "tarred_audio_filepaths": "H/audio_{0..0}.tar"},
    "cuts": {"use_lhotse": True, "cuts_path": "H/c.jsonl"},
    "shar": {"use_lhotse": True, "shar_path": "H/shar"},
    "weighted shar": {"use_lhotse": True, "shar_path": [["H/shar", 0.5], ["H/shar", 0.5]]},
    "shar's files": {
        "use_lhotse": True,
        "shar_path": {"cuts": "H/shar/cuts.000000.jsonl", "recording": "H/shar/recording.000000.tar"},
    },
    "input": {"use_lhotse": True, "input_cfg": [{"type": "nemo", "manifest_filepath": "H/m.json"}]},
    "input's file": {"use_lhotse": True, "input_cfg": "H/input.yaml"},
}


def under(prefix, value):
    if isinstance(value, dict):
        return {key: under(prefix, each) for key, each in value.items()}
    if isinstance(value, list):
        return [under(prefix, each) for each in value]
    return prefix + value[1:] if isinstance(value, str) and value.startswith("H/") else (
        value.replace(",H/", f",{prefix}/") if isinstance(value, str) else value
    )  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_data_set(home, key, prefix):
    prefix = prefix.format(home)
    values = under(prefix, KEYS[key])
    if key == "joined":
        values["manifest_filepath"] = f"{prefix}/m.json,{prefix}/m.json"
    config = load_config("small")
    for name, value in values.items():
        OmegaConf.update(config, f"model.train_ds.{name}", value, force_add=True)
    assert len(read_corpus(config, "model.train_ds").speech) >= 1


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_other_keys(home, prefix):
    prefix = prefix.format(home)
    words = [f"model.train_ds.noise_manifest={prefix}/m.json", f"exp_manager.exp_dir={prefix}/runs"]
    config = load_config("small", [*words, f"init_from_nemo_model={prefix}/m.nemo"])
    assert len(noise_manifest(config, "model.train_ds")) == 1
    assert experiment_folder(config).parent.parent.resolve() == home.resolve()
    assert Path(weight_sources(config)[0].path).parent.resolve() == home.resolve()
    part = f"init_from_nemo={{x: {{path: '{prefix}/m.nemo'}}}}"
    assert Path(weight_sources(load_config("small", [part]))[0].path).parent.resolve() == home.resolve()


@pytest.mark.parametrize("path", ["~/a b.wav", "file://H/a%20b.wav", "a b.wav", "H/a b.wav"])
def test_lines_of_manifests(home, path):
    row = {"audio_filepath": path.replace("H", str(home)), "duration": 2.0}
    (home / "l.json").write_text(json.dumps(row) + "\n")
    assert read_manifests("~/l.json").entry(0).audio_filepath == str(home / "a b.wav")
    assert read_manifests("~/c.jsonl").entry(0).audio_filepath == str(home / "a b.wav")


@pytest.mark.parametrize("locale", [{"PYTHONUTF8": "0", "LC_ALL": "POSIX"}, {"LC_ALL": "en_US.ISO-8859-1"}])
def test_names_are_utf8_in_any_locale(tmp_path, locale):
    folder = tmp_path / "Größe 语音"
    folder.mkdir()
    sf.write(folder / "é.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    words = ["prepare-data", str(folder), "--out", str(tmp_path / "aus 1 ö"), "--val-fraction", "0", "-j", "1"]
    call = [sys.executable, "-m", "nestcli", *words]
    done = subprocess.run(call, env={**environment, **locale}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    row = json.loads((tmp_path / "aus 1 ö" / "train_manifest.json").read_text(encoding="utf-8"))
    assert row["audio_filepath"] == str(folder / "é.wav")
    assert "aus 1 ö" in done.stdout.decode()
