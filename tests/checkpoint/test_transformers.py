"""Folders of transformers, written and read, judged by transformers itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import assert_close, skip_without_parakeets_extractor
from nestcli import SpeechEncoder, load_audio, load_encoder
from nestcli.checkpoint.encoder import fresh_encoder, read_encoder
from nestcli.checkpoint.transformers import write_transformers
from nestcli.config import load_config
from nestcli.errors import CheckpointError, NestError

transformers = pytest.importorskip("transformers")

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=2",
    "model.encoder.subsampling_conv_channels=8",
]  # fmt: skip


def drawn(words: list[str], seed: int = 3) -> SpeechEncoder:
    """An encoder whose biases, norms and statistics are not those of the beginning."""
    torch.manual_seed(seed)
    encoder = fresh_encoder(load_config("small", [*TINY, *words])).eval()
    for name, value in encoder.encoder.state_dict().items():
        if value.is_floating_point():
            value.add_(0.1 * torch.randn_like(value).abs() if "running_var" in name else 0.1 * torch.randn_like(value))
    return encoder


def written(folder: Path, encoder: SpeechEncoder, words: list[str]) -> Path:
    write_transformers(folder, load_config("small", [*TINY, *words]), encoder.state_dict())
    return folder


def audio_of(shared_audio: Path) -> list[torch.Tensor]:
    paths = sorted((shared_audio / "speech" / "speechocean").glob("**/*.flac"))
    return [load_audio(path) for path in paths[:3]]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.encoder.xscaling=false", "model.encoder.use_bias=false"],
        ["model.encoder.untie_biases=false", "model.encoder.ff_expansion_factor=2", "model.encoder.conv_kernel_size=5"],
        ["model.encoder.subsampling_factor=4", "model.preprocessor.window_stride=0.02"],
    ],
)
def test_transformers_computes_the_same(shared_audio: Path, tmp_path: Path, words: list[str]) -> None:
    ours = drawn(words)
    folder = written(tmp_path / "parakeet", ours, words)
    theirs = transformers.ParakeetEncoder.from_pretrained(folder).eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    audio = audio_of(shared_audio)
    with torch.no_grad():
        inputs = extractor([each.numpy() for each in audio], sampling_rate=16_000, return_tensors="pt")
        output = theirs(**inputs)
        for item, samples in enumerate(audio):
            expected, lengths = ours(samples)
            assert int(output.attention_mask[item].sum()) == int(lengths[0])
            assert_close(output.last_hidden_state[item, : lengths[0]], expected[0], 1e-4)


def test_auto_classes_load_it(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", drawn([]), [])
    assert isinstance(transformers.AutoModel.from_pretrained(folder), transformers.ParakeetEncoder)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 64


def test_what_we_wrote_is_read_back(tmp_path: Path) -> None:
    words = ["model.encoder.dropout=0.2", "model.encoder.dropout_pre_encoder=0.3", "model.encoder.dropout_att=0.4"]
    ours = drawn(words)
    stored = read_encoder(written(tmp_path / "a", ours, words))
    assert (stored.kind, dict(stored.left)) == ("ParakeetEncoder", {})
    state = ours.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in stored.state_dict.items())
    before = load_config("small", [*TINY, *words]).model
    different = [key for key in before.encoder if stored.config.model.encoder.get(key) != before.encoder[key]]
    assert different == ["_target_"] or different == []
    for key in ("sample_rate", "window_size", "window_stride", "n_fft", "features", "pad_to"):
        assert stored.config.model.preprocessor[key] == before.preprocessor[key]


@pytest.mark.parametrize("whole", [False, True])
def test_what_transformers_wrote_is_read(shared_audio: Path, tmp_path: Path, whole: bool) -> None:
    skip_without_parakeets_extractor()
    torch.manual_seed(1)
    sizes = transformers.ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, subsampling_conv_channels=8
    )
    if whole:
        config = transformers.ParakeetCTCConfig(encoder_config=sizes.to_dict(), vocab_size=10, pad_token_id=9)
        model = transformers.ParakeetForCTC(config).eval()
    else:
        model = transformers.ParakeetEncoder(sizes).eval()
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")  # several files and an index
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    stored = read_encoder(tmp_path / "a")
    assert stored.kind == type(model).__name__
    assert dict(stored.left) == ({"ctc_head": 2} if whole else {})
    [samples, *_] = audio_of(shared_audio)
    extractor = transformers.ParakeetFeatureExtractor()
    with torch.no_grad():
        inputs = extractor(samples.numpy(), sampling_rate=16_000, return_tensors="pt")
        theirs = (model.encoder if whole else model)(**inputs).last_hidden_state
        ours, lengths = load_encoder(tmp_path / "a")(samples)
    assert_close(ours[0], theirs[0, : lengths[0]], 1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.encoder.att_context_size=[8,0]"], "model.encoder.att_context_size=[8, 0] cannot go into transformers"),
        (["model.encoder.conv_norm_type=layer_norm"], "model.encoder.conv_norm_type=layer_norm"),
        (["model.encoder.conv_context_size=causal"], "model.encoder.conv_context_size=causal"),
        (["model.encoder.feat_out=8", "model.decoder.feat_in=8"], "model.encoder.feat_out=8"),
        (["model.preprocessor.features=84", "model.encoder.feat_in=84"], "model.encoder.feat_in=84"),
        (["model.preprocessor.normalize=all_features"], "model.preprocessor.normalize=all_features"),
    ],
)
def test_what_the_class_cannot_express_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    config = load_config("small", [*TINY, *words])
    with pytest.raises(CheckpointError) as raised:
        write_transformers(tmp_path / "a", config, fresh_encoder(config).state_dict())
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="already exists"):
        written(tmp_path / "a", drawn([]), [])
    write_transformers(tmp_path / "a", load_config("small", TINY), drawn([]).state_dict(), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert not (tmp_path / "a" / "mine").exists()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"model_type": "whisper"}, "the model_type 'whisper' is not supported"),
        ("config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; an encoder of nest needs 'silu'"),
        ("config.json", {"convolution_bias": False}, "convolution_bias is False"),
        ("config.json", {"intermediate_size": 65}, "intermediate_size is 65"),
        ("config.json", {"hidden_size": -1}, "hidden_size is -1; it must be a number from 1 to 1,073,741,824"),
        ("config.json", {"num_hidden_layers": 10**9}, "more than the 512 that is allowed"),
        ("config.json", {"dropout": 1.5}, "dropout is 1.5; it must be a share from 0 to 1"),
        ("config.json", {"activation_dropout": float("nan")}, "activation_dropout is nan"),
        ("config.json", {"scale_input": "x"}, "xscaling"),
        ("config.json", {"num_hidden_layers": 3}, "lacks encoder.layers.2."),
        ("preprocessor_config.json", {"preemphasis": 0.9}, "preemphasis is 0.9; nest's features have 0.97"),
        ("preprocessor_config.json", {"feature_size": 128}, "feature_size is 128"),
        ("preprocessor_config.json", {"hop_length": 10**30}, "hop_length is 1000000"),
        ("preprocessor_config.json", {"n_fft": 256}, "n_fft=256"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, file: str, change: dict[str, object], message: str) -> None:
    path = written(tmp_path / "a", drawn([]), []) / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(NestError) as raised:
        read_encoder(tmp_path / "a")
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", 7, [], {}])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: object) -> None:
    folder = written(tmp_path / "a", drawn([]), [])
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="must name files in its own folder"):
        read_encoder(folder)


@pytest.mark.parametrize("text", ["[]", "{", "\xff", "[" * 100_000])
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_encoder(tmp_path)
