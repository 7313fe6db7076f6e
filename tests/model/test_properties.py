"""Properties that must hold whatever NeMo does: padding, batching, masks, silence, and references for fast paths."""

import math
from collections.abc import Iterator

import pytest
import torch

from conftest import assert_close
from nestcli.config import load_config
from nestcli.errors import ConfigError
from nestcli.model.attention import RelativePositions, sinusoidal_table
from nestcli.model.config import EncoderConfig, LossConfig, MaskingConfig, NestConfig, QuantizerConfig
from nestcli.model.conformer import outside_context
from nestcli.model.fast import relative_shift
from nestcli.model.features import preemphasised, slaney_mel_filters
from nestcli.model.loss import MaskedTokenLoss
from nestcli.model.masking import RandomBlockMasking, overlapping_blocks
from nestcli.model.nest import NestModel
from nestcli.model.quantizer import RandomProjectionQuantizer

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=2", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8", "model.masking.block_size=16", "model.masking.mask_prob=0.05",
]  # fmt: skip


def tiny_model(*overrides: str) -> NestModel:
    torch.manual_seed(0)
    return NestModel(NestConfig.from_config(load_config("small", [*TINY, *overrides])))


def speech_like(seconds: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([int(16000 * value) for value in seconds])
    audio = torch.randn(len(seconds), int(lengths.max()), generator=torch.Generator().manual_seed(1)) * 0.1
    audio[torch.arange(audio.size(1)) >= lengths[:, None]] = 0
    return audio, lengths


@pytest.mark.parametrize("overrides", [[], ["model.encoder.use_pytorch_sdpa=true"]], ids=["plain", "fused"])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
def test_padding_changes_nothing_in_evaluation(overrides: list[str], norm: str) -> None:
    model = tiny_model(*overrides, f"model.encoder.conv_norm_type={norm}").eval()
    audio, lengths = speech_like([1.3])
    padded = torch.nn.functional.pad(audio, (0, 9000))
    with torch.no_grad():
        features, frames = model.preprocessor(audio, lengths)
        more_features, more_frames = model.preprocessor(padded, lengths)
        encoded, tokens = model.encoder(features, frames)
        more_encoded, more_tokens = model.encoder(more_features, more_frames)
    assert torch.equal(frames, more_frames)
    assert torch.equal(tokens, more_tokens)
    assert_close(more_features[:, :, : int(frames)], features[:, :, : int(frames)], 1e-5, "features")
    assert_close(more_encoded[:, : int(tokens)], encoded[:, : int(tokens)], 1e-5, "encoder")


def test_a_batch_of_many_equals_batches_of_one() -> None:
    model = tiny_model().eval()
    audio, lengths = speech_like([1.3, 0.9, 1.1])
    with torch.no_grad():
        together, tokens = model.encoder(*model.preprocessor(audio, lengths))
        for item in range(3):
            alone, _ = model.encoder(
                *model.preprocessor(audio[item : item + 1, : lengths[item]], lengths[item : item + 1])
            )
            count = int(tokens[item])
            assert_close(together[item, :count], alone[0, :count], 1e-5, f"item {item}")


def test_batch_statistics_can_leave_padding_out() -> None:
    model = tiny_model("model.encoder.conv_norm_ignore_padding=true", "model.encoder.dropout=0.0",
                       "model.encoder.dropout_pre_encoder=0.0", "model.encoder.dropout_att=0.0")  # fmt: skip
    audio, lengths = speech_like([1.3, 0.9])
    padded = torch.nn.functional.pad(audio, (0, 16000))
    model.eval()
    features, frames = model.preprocessor(audio, lengths)
    more_features, _ = model.preprocessor(padded, lengths)
    model.train()
    encoded, tokens = model.encoder(features, frames)
    statistics = model.encoder.layers[0].conv.batch_norm.running_mean.clone()
    model.encoder.layers[0].conv.batch_norm.reset_running_stats()
    more_encoded, _ = model.encoder(more_features, frames)
    assert_close(more_encoded[0, : int(tokens[0])], encoded[0, : int(tokens[0])], 1e-5, "training mode")
    again = model.encoder.layers[0].conv.batch_norm.running_mean
    assert_close(again, statistics, 1e-6, "running mean")


def test_a_batch_without_a_masked_token_has_a_zero_loss_and_zero_gradients() -> None:
    model = tiny_model("model.masking.mask_prob=0.0").train()
    audio, lengths = speech_like([1.0, 1.0])
    output = model(audio, lengths, audio, lengths)
    assert output.loss.item() == 0.0
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    nemo = MaskedTokenLoss(LossConfig(8, 0.8, 1, False, nemo_exact=True))
    assert math.isnan(nemo(torch.zeros(0, 32, 1), torch.zeros(0, 1, dtype=torch.long)))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_training_has_the_same_loss(request: pytest.FixtureRequest) -> None:
    loss = MaskedTokenLoss(LossConfig(8, 0.8, 2, False))
    logits, tokens = torch.randn(50, 32, 2), torch.randint(32, (50, 2))
    usual = loss(logits, tokens)
    request.getfixturevalue("deterministic")
    assert loss(logits, tokens).item() == pytest.approx(usual.item(), rel=1e-6)


def test_post_conv_learns_through_the_subsampling_and_hides_masked_frames() -> None:
    model = tiny_model("model.mask_position=post_conv", "model.masking.block_size=32").train()
    audio, lengths = speech_like([3.0, 2.0])
    output = model(audio, lengths, audio, lengths)
    assert output.mask_BT.shape == (2, 38)
    assert output.selected > 0
    output.loss.backward()
    assert model.encoder.pre_encode.conv[0].weight.grad.abs().sum() > 0
    assert model.quantizer.config.feat_in == 16
    assert model.mask_processor.config.block_size == 4


@pytest.mark.parametrize("normalize", ["per_feature", "all_features"])
def test_digital_silence_gives_zeros(normalize: str) -> None:
    model = tiny_model(f"model.preprocessor.normalize={normalize}").eval()
    features, _ = model.preprocessor(torch.zeros(1, 32000), torch.tensor([32000]))
    assert not features.any()


ALL_FEATURES = "model.preprocessor.normalize=all_features"


def test_all_features_share_a_mean_and_a_deviation() -> None:
    audio, lengths = speech_like([1.3, 0.7])
    audio[1] += 0.2 * torch.sin(torch.arange(audio.size(1)) / 5)
    audio[1, lengths[1] :] = 0
    with torch.no_grad():
        model = tiny_model(ALL_FEATURES).eval()
        features, frames = model.preprocessor(audio, lengths)
        for item, count in enumerate(frames):
            alone = audio[item : item + 1, : lengths[item]]
            log_mel = model.preprocessor.featurizer(preemphasised(alone, lengths[item : item + 1]))[0, :, :count]
            expected = (log_mel - log_mel.mean()) / (log_mel.std() + 1e-5)
            assert_close(features[item, :, :count], expected, 1e-5, "features")
            assert not features[item, :, count:].any()
            assert features[item, :, :count].mean(1).abs().max() > 0.1  # of each bin: the spectrum is still there


def test_other_normalisations_are_refused() -> None:
    with pytest.raises(ConfigError, match="normalize: 'NA' is not supported, use per_feature or all_features"):
        tiny_model("model.preprocessor.normalize=NA")


@pytest.mark.parametrize("normalize", ["per_feature", "all_features"])
@pytest.mark.parametrize("lengths", [[0], [1], [159], [160], [320, 16000]])
def test_very_short_audio_gives_finite_features(lengths: list[int], normalize: str) -> None:
    audio = torch.randn(len(lengths), max(*lengths, 160))
    model = tiny_model(f"model.preprocessor.normalize={normalize}").eval()
    features, frames = model.preprocessor(audio, torch.tensor(lengths))
    assert features.isfinite().all()
    assert frames.tolist() == [length // 160 for length in lengths]


def test_mel_filters_have_slaneys_area_and_order() -> None:
    filters = slaney_mel_filters(16000, 512, 80)
    assert filters.shape == (80, 257)
    assert (filters >= 0).all()
    assert (filters.argmax(1)[1:] >= filters.argmax(1)[:-1]).all()


def test_relative_shift_against_its_definition() -> None:
    scores = torch.randn(2, 3, 7, 13)
    shifted = relative_shift(scores)
    for i in range(7):
        for j in range(7):
            assert torch.equal(shifted[:, :, i, j], scores[:, :, i, 6 - i + j])


def test_relative_shift_has_the_gradient_of_its_definition() -> None:
    scores = torch.randn(1, 2, 5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relative_shift, (scores,))


def test_rows_of_the_position_table_do_not_depend_on_its_length() -> None:
    short, long = (sinusoidal_table(n, 16, torch.device("cpu")) for n in (10, 300))
    assert torch.equal(short, long[290:-290])


def test_contexts_against_their_definition() -> None:
    for style, (left, right) in [("regular", (2, 1)), ("regular", (-1, 0)), ("chunked_limited", (4, 1))]:
        section = load_config("small", [f"model.encoder.att_context_style={style}",
                                        f"model.encoder.att_context_size=[{left},{right}]"])  # fmt: skip
        config: EncoderConfig = NestConfig.from_config(section).encoder
        outside = outside_context(9, config, torch.device("cpu"))
        for i in range(9):
            for j in range(9):
                if style == "regular":
                    seen = (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
                else:
                    seen = 0 <= i // (right + 1) - j // (right + 1) <= left // (right + 1)
                assert bool(outside[i, j]) != seen, (style, i, j)


def test_masked_share_is_the_theorys() -> None:
    torch.manual_seed(0)
    config = MaskingConfig(80, 40, 0.01, True, True)
    mask = overlapping_blocks(torch.full((64,), 2000), 2000, config)
    assert mask[:, 40:-40].float().mean().item() == pytest.approx(1 - 0.99**40, abs=0.02)


@pytest.mark.parametrize("overlap", [True, False])
def test_max_mask_ratio_is_honoured_when_set(overlap: bool) -> None:
    config = MaskingConfig(80, 10, 0.6 if not overlap else 0.2, True, overlap, max_mask_ratio=0.3)
    _, mask = RandomBlockMasking(config)(torch.randn(8, 80, 400), torch.full((8,), 400))
    assert 0.1 < mask.float().mean(1).max() <= 0.31


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.9, 1.0])
def test_a_limited_mask_drops_the_blocks_with_the_largest_draws(ratio: float) -> None:
    """Compare with dropping one block after the other."""
    config = MaskingConfig(80, 12, 0.06, True, True, max_mask_ratio=ratio)
    lengths = torch.tensor([400, 399, 123, 12, 11, 0])
    torch.manual_seed(5)
    limited = overlapping_blocks(lengths, 400, config)
    torch.manual_seed(5)
    draws = torch.rand(len(lengths), 400)
    for item, length in enumerate(lengths.tolist()):
        starts = [place for place in range(400) if draws[item, place] < 0.06 and place + 12 <= length]
        starts.sort(key=lambda place: float(draws[item, place]))
        covered = [{frame for start in starts[:kept] for frame in range(start, start + 12)} for kept in range(99)]
        expected = max((each for each in covered if len(each) <= int(length * ratio)), key=len)
        assert set(limited[item].nonzero().flatten().tolist()) == expected


def test_padding_is_never_masked() -> None:
    for overlap in (True, False):
        masking = RandomBlockMasking(MaskingConfig(80, 10, 0.3, True, overlap))
        lengths = torch.tensor([400, 123, 9])
        _, mask = masking(torch.randn(3, 80, 400), lengths)
        assert not (mask & (torch.arange(400) >= lengths[:, None])).any()


def test_tokens_against_the_nearest_code_by_distance() -> None:
    torch.manual_seed(0)
    quantizer = RandomProjectionQuantizer(QuantizerConfig(10, 4, 2, 300, "l2", True, False, 8))
    features = torch.randn(3, 10, 16 * 8 * 20)
    unit = quantizer.project(features).double()
    distances = (unit[:, :, :, None] - quantizer.codebooks).norm(dim=-1)
    assert torch.equal(quantizer(features), distances.argmin(-1))
    assert quantizer(features[:, :, :0]).shape == (3, 0, 2)


def test_no_buffer_depends_on_the_length() -> None:
    """Distributed training copies rank 0's buffers to the others, whose batches have other lengths."""
    model = tiny_model()
    shapes = {name: value.shape for name, value in model.named_buffers()}
    model(*speech_like([2.0, 1.5]), *speech_like([2.0, 1.5]))
    model(*speech_like([3.1, 1.0]), *speech_like([3.1, 1.0]))
    assert {name: value.shape for name, value in model.named_buffers()} == shapes


def test_the_dropout_of_positions_is_drawn_before_that_of_frames() -> None:
    """NeMo draws in this order. The live comparison found it swapped."""
    positions = RelativePositions(8, scale_input=False, dropout=0.3, dropout_table=0.4)
    frames = torch.randn(2, 5, 8)
    torch.manual_seed(3)
    rows = torch.nn.functional.dropout(sinusoidal_table(5, 8, torch.device("cpu")), 0.4)
    expected = torch.nn.functional.dropout(frames, 0.3), rows
    torch.manual_seed(3)
    for ours, theirs in zip(positions(frames), expected, strict=True):
        assert torch.equal(ours, theirs)
