"""The reference encoder in the package: found by its name, read like any checkpoint, trained."""

import json
import re
from pathlib import Path

import pytest
import soundfile as sf
import torch
from safetensors import safe_open

from nestcli import load_encoder
from nestcli.checkpoint import load
from nestcli.checkpoint.encoder import encoder_config, read_encoder
from nestcli.checkpoint.load import checkpoint_config, checkpoint_weights, load_checkpoint, packaged_encoder
from nestcli.checkpoint.safetensors_file import CONFIG_KEY
from nestcli.checkpoint.transformers import write_transformers
from nestcli.cli.app import main
from nestcli.config import load_config
from nestcli.errors import CheckpointError
from nestcli.model.config import NestConfig
from nestcli.model.count import count_parameters
from nestcli.model.nest import NestModel
from nestcli.training.initial_weights import load_initial_weights, weight_sources

TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32"]
CARD = packaged_encoder().with_name("README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_is_found_by_its_name() -> None:
    encoder = load_encoder("reference")
    assert (encoder.width, encoder.n_layers, round(encoder.frame_seconds, 6)) == (240, 4, 0.04)
    assert not encoder.training
    packaged = load_checkpoint(packaged_encoder()).state_dict
    for state in (load_checkpoint("reference").state_dict, checkpoint_weights("reference")):
        assert state.keys() == packaged.keys()
        assert all(torch.equal(value.float(), packaged[name].float()) for name, value in state.items())
    assert all(torch.equal(value, packaged[name]) for name, value in read_encoder("reference").state_dict.items())
    for config in (checkpoint_config("reference"), encoder_config("reference")):
        assert config.model.encoder.d_model == 240


def test_a_path_of_that_name_wins(tmp_path: Path) -> None:
    Path("reference").mkdir()
    with pytest.raises(CheckpointError, match="It hides the encoder of that name in the package"):
        load_encoder("reference")
    config = load_config("small", TINY)
    write_transformers(tmp_path / "reference", config, NestModel(NestConfig.from_config(config)).state_dict())
    assert load_encoder("reference").width == 16


def test_a_package_without_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PACKAGED", tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=r"reference: this installation of nest lacks .*Install nestcli again"):
        load_encoder("reference")


@pytest.mark.parametrize("key", ["init_from_encoder", "init_from_nemo_model", "init_from_ptl_ckpt"])
def test_a_run_may_start_from_it(key: str) -> None:
    config = load_config("reference", [f"{key}=reference"])
    model = NestModel(NestConfig.from_config(config))
    [line] = load_initial_weights(model, weight_sources(config), config)
    assert line.startswith("reference")
    packaged, whole = load_checkpoint(packaged_encoder()).state_dict, key != "init_from_encoder"
    for name, value in model.state_dict().items():
        if whole or name.startswith("encoder."):
            assert torch.equal(value, packaged[name]), name


def nest(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["nest", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_commands_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sf.write("a.wav", 0.1 * torch.randn(16_000).numpy(), 16_000)
    assert (
        nest(
            monkeypatch, "extract", "a.wav", "--checkpoint", "reference", "--out", "features", "--format", "safetensors"
        )
        == 0
    )
    [path] = Path("features").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        [name] = file.keys()
        assert file.get_tensor(name).shape == (4, 240, 25)
    Path("below").mkdir()
    assert nest(monkeypatch, "export", "reference", "--to", "nemo", "--out", "below/again.nemo") == 0
    again, packaged = load_checkpoint("below/again.nemo").state_dict, load_checkpoint("reference").state_dict
    assert all(torch.equal(value, packaged[name]) for name, value in again.items())


# ---- the file in the package ----


def test_the_file_is_small_and_holds_nothing_of_a_machine() -> None:
    assert packaged_encoder().stat().st_size <= 8_000_000
    with safe_open(packaged_encoder(), framework="pt") as file:
        kept = json.loads(file.metadata()[CONFIG_KEY])
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118  # not a dict
    assert "/" not in json.dumps(kept)
    halves = {name for name, dtype in types.items() if dtype == torch.float16}
    assert {name.partition(".")[0] for name in halves} == {"encoder", "decoder"}
    assert not [name for name in halves if "running" in name]
    assert all(name in halves for name in types if re.match(r"encoder\.layers\.\d+\.(self_attn|feed_forward)", name))


def test_it_is_the_preset_reference() -> None:
    preset, packaged = (
        NestConfig.from_config(each) for each in (load_config("reference"), checkpoint_config("reference"))
    )
    assert packaged.encoder == preset.encoder
    assert packaged.preprocessor == preset.preprocessor
    assert packaged.decoder == preset.decoder


def test_the_card_fits_the_file() -> None:
    counted = count_parameters(checkpoint_config("reference"))
    assert f"| {sum(counted.to_depth(1)['encoder']):,} parameters: 4 layers of width 240, frames of 40 ms |" in CARD
    assert f"| whole model | {counted.total:,} parameters" in CARD
    assert f"| file | {packaged_encoder().stat().st_size / 1e6:.1f} MB" in CARD
    assert "(CC-BY-SA-4.0,\nhttps://creativecommons.org/licenses/by-sa/4.0/)" in CARD


def test_the_card_tells_of_a_run_that_learned() -> None:
    [below] = re.findall(r"\| validation loss \| [\d.]+ nats, (-?[\d.]+) below guessing by frequency", CARD)
    assert float(below) > 0
    assert "| health | no collapse in " in CARD
    assert re.search(r"^\| words \| quiet \| accuracy \(higher is better\) \| [1-9]", CARD, re.MULTILINE)


def test_it_predicts_hidden_tokens_of_real_speech(shared_audio: Path) -> None:
    """The loss is below that of a guess that knows how often each code occurs in this very speech."""
    loaded = load_checkpoint("reference")
    model = NestModel(NestConfig.from_config(loaded.config)).eval()
    model.load_state_dict(loaded.state_dict)
    paths = sorted((shared_audio / "speech" / "speechocean").rglob("*.flac"))[::6]  # one of every second speaker
    audios = [torch.from_numpy(sf.read(path, dtype="float32")[0]) for path in paths]
    lengths_B = torch.tensor([len(each) for each in audios])
    audio_BN = torch.nn.utils.rnn.pad_sequence(audios, batch_first=True)
    torch.manual_seed(1)
    with torch.no_grad():
        found = model(audio_BN, lengths_B, audio_BN, lengths_B)
    entropies = []
    for book in found.tokens_NG.unbind(1):
        share = book.bincount() / len(book)
        entropies.append(float(torch.special.entr(share).sum()))
    assert float(found.loss) < sum(entropies) / len(entropies)
