"""The encoder alone, out of every kind of file that holds one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import assert_close, write_archive
from nestcli import SpeechEncoder, load_audio, load_encoder
from nestcli.checkpoint.encoder import encoder_config, fresh_encoder, read_encoder
from nestcli.checkpoint.nemo import write_nemo
from nestcli.checkpoint.nemo_config import to_nemo
from nestcli.checkpoint.safetensors_file import write_safetensors
from nestcli.config import load_config
from nestcli.errors import CheckpointError, NestError
from nestcli.model.attention import sinusoidal_table
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

TINY = ["model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=3", "model.num_classes=32"]
CONFIG = load_config("small", TINY)


@pytest.fixture(scope="module")
def model() -> NestModel:
    torch.manual_seed(5)
    model = NestModel(NestConfig.from_config(CONFIG)).eval()
    for buffer in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)):
        buffer.running_mean.normal_(std=0.1)
    return model


def asr_config(**encoder: Any) -> dict[str, Any]:
    """Return a recogniser's configuration: the blocks that matter, and others that a NEST would refuse."""
    blocks = to_nemo(CONFIG)
    blocks["preprocessor"]["pad_to"] = 0
    return {
        "target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
        "preprocessor": blocks["preprocessor"],
        "encoder": {**blocks["encoder"], **encoder},
        "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "vocabulary": ["a", "${b}"]},
        "tokenizer": {"dir": None, "type": "bpe"},
    }


def write_asr(path: Path, state: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    return write_archive(path, config or asr_config(), state)


def asr_state(model: NestModel) -> dict[str, torch.Tensor]:
    encoder = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
    return {**encoder, "decoder.weight": torch.ones(4, 16), "decoder.bias": torch.ones(4)}


def reference(model: NestModel, audio_BN: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        features_BDT, frames_B = model.preprocessor(audio_BN, lengths_B)
        encoded: tuple[torch.Tensor, torch.Tensor] = model.encoder(features_BDT, frames_B)
    return encoded


@pytest.mark.parametrize("kind", ["nest.nemo", "nest.safetensors", "asr.nemo"])
def test_the_encoder_of_every_file_is_the_same(model: NestModel, tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "asr.nemo":
        write_asr(path, asr_state(model))
    else:
        {"nest.nemo": write_nemo, "nest.safetensors": write_safetensors}[kind](path, CONFIG, model.state_dict())
    encoder = load_encoder(path)
    assert isinstance(encoder, SpeechEncoder)
    assert not encoder.training
    audio_BN, lengths_B = 0.1 * torch.randn(2, 20_000), torch.tensor([20_000, 9_000])
    with torch.no_grad():
        ours, frames_B = encoder(audio_BN, lengths_B)
    theirs, theirs_B = reference(model, audio_BN, lengths_B)
    assert torch.equal(frames_B, theirs_B)
    for item, count in enumerate(frames_B):
        assert_close(ours[item, :count], theirs[item, :count], 0.0)


def test_what_was_taken_and_left_is_known(model: NestModel, tmp_path: Path) -> None:
    stored = read_encoder(write_asr(tmp_path / "a.nemo", asr_state(model)))
    assert (stored.kind, dict(stored.left)) == ("EncDecCTCModelBPE", {"decoder": 2})
    assert stored.config.model.encoder.d_model == stored.config.model.decoder.feat_in == 16
    assert stored.config.model.preprocessor.pad_to == 16
    write_nemo(tmp_path / "b.nemo", CONFIG, model.state_dict())
    stored = read_encoder(tmp_path / "b.nemo")
    assert (stored.kind, dict(stored.left)) == ("NEST", {"quantizer": 2, "mask_processor": 1, "decoder": 2})


def test_a_configuration_around_an_encoder_trains(model: NestModel, tmp_path: Path) -> None:
    path = write_asr(tmp_path / "a.nemo", asr_state(model))
    config = encoder_config(path, ["model.num_classes=64"])
    nest = NestModel(NestConfig.from_config(config))
    assert nest.decoder.layer.weight.shape[:2] == (64, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"self_attention_model": "abs_pos"}, "self_attention_model"),
        ({"subsampling": "striding"}, "subsampling"),
        ({"reduction": "pooling"}, "encoder.reduction: 'pooling' has no counterpart here"),
        ({"n_layers": 100_000}, "more than the 512"),
        ({"n_layers": 2}, "holds encoder.layers.2."),
        ({"n_layers": 4}, "lacks encoder.layers.3."),
        ({"d_model": 32}, "has the shape"),
        ({"_target_": "os.system"}, "names code to call"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused(
    model: NestModel, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_asr(tmp_path / "a.nemo", asr_state(model), asr_config(**change))
    with pytest.raises(NestError) as raised:
        read_encoder(path)
    assert message in str(raised.value)
    assert "a.nemo" in str(raised.value)


def test_weights_that_are_not_finite_are_refused(model: NestModel, tmp_path: Path) -> None:
    state = asr_state(model)
    state["encoder.layers.0.norm_out.bias"] = torch.full((16,), float("nan"))
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.0\.norm_out\.bias holds NaN"):
        read_encoder(write_asr(tmp_path / "a.nemo", state))


# ---- the module ----


def test_layers(model: NestModel) -> None:
    encoder = fresh_encoder(CONFIG).eval()
    audio_N = 0.1 * torch.randn(16_000)
    outputs: list[torch.Tensor] = []
    for layer in encoder.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        whole = encoder(audio_N)
        first = [output[:, :13] for output in outputs]
        every = encoder(audio_N, layers="all")
        some = encoder(audio_N, layers=["input", -1, 0])
    assert every.features.shape == (1, 3, 13, 16)
    assert all(torch.equal(every.features[:, place], output) for place, output in enumerate(first))
    assert torch.equal(whole.features, every.features[:, -1])
    assert torch.equal(some.features[:, 1], first[-1])
    assert torch.equal(some.features[:, 2], first[0])
    with torch.no_grad():
        features_BDT, frames_B = encoder.preprocessor(audio_N[None], torch.tensor([16_000]))
        subsampled_BSM, _ = encoder.encoder.pre_encode(features_BDT.transpose(1, 2), frames_B)
    assert torch.equal(some.features[:, 0], subsampled_BSM[:, :13] * 4)  # scaled by the square root of the width
    with pytest.raises(ValueError, match="layer 3 does not exist: the 3 layers are 0 to 2"):
        encoder(audio_N, layers=[3])
    with pytest.raises(ValueError, match="100 samples are less than one frame"):
        encoder(audio_N[:100])


def test_padding_changes_nothing() -> None:
    encoder = fresh_encoder(CONFIG).eval()
    long_N, short_N = 0.1 * torch.randn(30_000), 0.1 * torch.randn(12_345)
    audio_BN = torch.zeros(2, 30_000)
    audio_BN[0], audio_BN[1, :12_345] = long_N, short_N
    with torch.no_grad():
        together = encoder(audio_BN, torch.tensor([30_000, 12_345]), layers="all")
        alone = encoder(short_N, layers="all")
    count = int(alone.lengths[0])
    assert int(together.lengths[1]) == count
    assert_close(together.features[1, :, :count], alone.features[0], 1e-5)


def test_it_can_be_fine_tuned(model: NestModel, tmp_path: Path) -> None:
    write_nemo(tmp_path / "a.nemo", CONFIG, model.state_dict())
    encoder = load_encoder(tmp_path / "a.nemo").train()
    head = torch.nn.Linear(encoder.width, 2)
    features, _ = encoder(0.1 * torch.randn(2, 16_000))
    torch.nn.functional.cross_entropy(head(features.mean(1)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert (encoder.sample_rate, encoder.frame_seconds, encoder.width, encoder.n_layers) == (16_000, 0.08, 16, 3)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("loaded_inside", [False, True])
def test_it_can_be_fine_tuned_after_features_were_taken(
    model: NestModel, tmp_path: Path, mode: Any, loaded_inside: bool
) -> None:
    write_nemo(tmp_path / "a.nemo", CONFIG, model.state_dict())
    audio_BN = 0.1 * torch.randn(2, 16_000)
    encoder, used = (load_encoder(tmp_path / "a.nemo") for _ in range(2))
    with mode():
        used = load_encoder(tmp_path / "a.nemo") if loaded_inside else used
        used(audio_BN)
    for each in (encoder, used):
        torch.manual_seed(0)
        features, _ = each.train()(audio_BN)
        features.square().mean().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for (name, ours), (_, theirs) in zip(encoder.named_parameters(), used.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("first", [torch.float64, torch.float32])
def test_an_encoder_follows_its_dtype_after_inference_mode(
    model: NestModel, tmp_path: Path, first: torch.dtype
) -> None:
    write_nemo(tmp_path / "a.nemo", CONFIG, model.state_dict())
    encoder = load_encoder(tmp_path / "a.nemo")
    audio_BN = 0.1 * torch.randn(1, 16_000)
    with torch.inference_mode():
        encoder.to(first)(audio_BN)
        expected = encoder.to(torch.float32)(audio_BN).features
    encoder.to(torch.float64).to(torch.float32)
    features, _ = encoder(audio_BN)
    features.sum().backward()
    assert features.dtype == torch.float32
    assert_close(features, expected.clone(), 1e-5)  # the kernels with and without gradients round differently
    longer, _ = encoder(0.1 * torch.randn(1, 48_000))  # the table of positions grows
    longer.sum().backward()


def test_the_table_of_positions_follows_the_device(model: NestModel) -> None:
    positions = model.encoder.pos_enc
    with torch.inference_mode():
        assert positions(torch.zeros(1, 7, 16, device="meta"))[1].device.type == "meta"
    _, rows_RM = positions(torch.zeros(1, 5, 16))
    assert rows_RM.device.type == "cpu"
    assert not rows_RM.is_inference()
    assert_close(rows_RM, sinusoidal_table(5, 16, torch.device("cpu")), 0.0)


def test_three_lines(shared_audio: Path, model: NestModel, tmp_path: Path) -> None:
    write_nemo(tmp_path / "nest.nemo", CONFIG, model.state_dict())
    speech = next((shared_audio / "speech" / "kerstin_de").glob("**/*.flac"))
    encoder = load_encoder(tmp_path / "nest.nemo")
    features, lengths = encoder(load_audio(speech))
    assert features.shape == (1, int(lengths[0]), encoder.width)
