"""Our model against values recorded from NeMo 3.0.0 (tests/golden/record_nemo.py)."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import GOLDEN, Golden, assert_close
from nestcli.config import load_config, section
from nestcli.model.config import MaskingConfig, NestConfig, PreprocessorConfig, QuantizerConfig, ScheduleConfig
from nestcli.model.features import LogMelPreprocessor
from nestcli.model.masking import disjoint_blocks, overlapping_blocks
from nestcli.model.nest import NestModel
from nestcli.model.optim import NoamAnnealing
from nestcli.model.quantizer import RandomProjectionQuantizer
from nestcli.parity.inputs import TRAIN_SEED, rounding_of_features
from nestcli.parity.report import close

TINY = Golden("model_tiny")
NOBIAS = Golden("model_nobias")
GOLDENS = pytest.mark.parametrize("golden", [TINY, NOBIAS], ids=["tiny", "nobias"])


def golden_model(golden: Golden) -> NestModel:
    model = NestModel(NestConfig.from_config(golden.config()))
    state = golden.under("state.")
    state.setdefault("preprocessor.featurizer.fb", TINY["state.preprocessor.featurizer.fb"])
    model.load_state_dict(state, strict=True)
    return model


def waveforms() -> tuple[torch.Tensor, ...]:
    return (
        TINY["in.clean"].float() / 1024,
        TINY["in.clean_len"],
        TINY["in.noisy"].float() / 1024,
        TINY["in.noisy_len"],
    )


@GOLDENS
def test_encoder_and_decoder(golden: Golden) -> None:
    model = golden_model(golden).eval()
    noisy, mask = TINY["features.eval.noisy"], golden["mask"].bool()
    masked = torch.where(mask[:, None], model.mask_processor.mask_embedding[:, None], noisy)
    layers: list[torch.Tensor] = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: layers.append(output))
    with torch.no_grad():
        subsampled, lengths = model.encoder.pre_encode(masked.transpose(1, 2), TINY["features.eval.len"])
        encoded, encoded_lengths = model.encoder(masked, TINY["features.eval.len"])
        log_probs = model.decoder.log_probs(encoded)
    assert torch.equal(lengths, golden["encoder.eval.pre_encode_len"])
    assert_close(subsampled, golden["encoder.eval.pre_encode"], 1e-5, "sub-sampling")
    for number, ours in enumerate(layers):
        assert_close(ours, golden[f"encoder.eval.layer.{number}"], 1e-5, f"layer {number}")
    assert torch.equal(encoded_lengths, golden["encoder.eval.len"])
    assert_close(encoded.transpose(1, 2), golden["encoder.eval.out"], 1e-5, "encoder")
    assert_close(log_probs, golden["log_probs"], 1e-5, "log-probabilities")


def test_fused_attention_equals_plain_attention() -> None:
    model = golden_model(TINY).eval()
    for layer in model.encoder.layers:
        layer.self_attn.use_sdpa = True
    with torch.no_grad():
        encoded, _ = model.encoder(TINY["features.eval.noisy"], TINY["features.eval.len"])
        for layer in model.encoder.layers:
            layer.self_attn.use_sdpa = False
        plain, _ = model.encoder(TINY["features.eval.noisy"], TINY["features.eval.len"])
    assert_close(encoded, plain, 2e-6, "fused attention")


def test_features_in_evaluation_and_training() -> None:
    model = golden_model(TINY)
    clean, clean_len, noisy, noisy_len = waveforms()
    model.eval()
    assert torch.equal(model.preprocessor(clean, clean_len)[1], TINY["features.eval.len"])
    assert_same_features(model, {"audio": clean, "audio_len": clean_len}, "features.eval.clean")
    assert_same_features(model, {"audio": noisy, "audio_len": noisy_len}, "features.eval.noisy")
    model.train()
    assert_same_features(model, {"audio": clean, "audio_len": clean_len}, "features.train.clean", every=8)
    assert torch.equal(clean, waveforms()[0]), "the caller's waveform was dithered"


def assert_same_features(model: NestModel, audio: dict[str, torch.Tensor], name: str, every: int = 1) -> None:
    """A bin with little energy beside a loud one holds rounding, which differs from processor to processor."""
    torch.manual_seed(TRAIN_SEED)
    features, _ = model.preprocessor(audio["audio"], audio["audio_len"])
    rounding = rounding_of_features(model.preprocessor, audio, features)
    check = close(name, features[:, ::every], TINY[name], 1e-5, rounding=rounding[:, ::every])
    assert check.passed, check


@GOLDENS
def test_masks_and_tokens(golden: Golden) -> None:
    model = golden_model(golden).eval()
    torch.manual_seed(11)
    masked, mask = model.mask_processor(TINY["features.eval.noisy"], TINY["features.eval.len"])
    assert torch.equal(mask, golden["mask"].bool())
    embedding = model.mask_processor.mask_embedding.detach()
    assert (masked.transpose(1, 2)[mask] == embedding).all()
    assert (masked == TINY["features.eval.noisy"])[~mask[:, None].expand_as(masked)].all()
    tokens = model.quantizer(TINY["features.eval.clean"])
    # A window of nothing but padding has no nearest code; what NeMo gives there is decided by rounding.
    has_audio = torch.arange(tokens.size(1)) * 8 < TINY["features.eval.len"][:, None]
    assert torch.equal(tokens[has_audio], golden["tokens"].reshape(tokens.shape)[has_audio])


@GOLDENS
def test_loss_in_evaluation(golden: Golden) -> None:
    model = golden_model(golden).eval()
    torch.manual_seed(13)
    output = model(*waveforms())
    assert torch.equal(output.mask_BT, golden["forward.eval.mask"].bool())
    assert torch.equal(torch.rand(1), golden["forward.eval.draw_after"].reshape(1))
    assert_close(output.loss, golden["loss.eval"].reshape(()), 1e-6, "loss")


@GOLDENS
def test_loss_gradients_and_statistics_in_training_with_dropout(golden: Golden) -> None:
    model = golden_model(golden).train()
    torch.manual_seed(17)
    output = model(*waveforms())
    assert torch.equal(torch.rand(1), golden["forward.train.draw_after"].reshape(1)), "other random draws than NeMo"
    assert_close(output.loss, golden["loss.train"].reshape(()), 2e-6, "loss")
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, theirs in golden.under("grad.").items():
        # (a bias before batch norm has no gradient but rounding)
        rounding = 5e-6 if name.endswith("depthwise_conv.bias") else 1e-6
        assert_close(gradients[name], theirs, rounding + 1e-5 * float(theirs.abs().max()), f"gradient of {name}")
    if golden is TINY:
        assert set(gradients) == set(golden.under("grad."))
    state = model.state_dict()
    for name, theirs in golden.under("after.").items():
        assert_close(state[name], theirs, 1e-6, name)


MASKING = Golden("masking")


@pytest.mark.parametrize("number", range(len(MASKING.metadata["cases"])))
def test_masks_from_the_same_seed(number: int) -> None:
    case = MASKING.metadata["cases"][number]
    config = MaskingConfig(80, case["block_size"], case["mask_prob"], True, case["allow_overlap"])
    draw = overlapping_blocks if case["allow_overlap"] else disjoint_blocks
    torch.manual_seed(case["seed"])
    mask = draw(torch.tensor(case["lengths"]), case["frames"], config)
    assert torch.equal(mask, MASKING[f"{number:02d}"].bool())
    assert torch.rand(1).item() == pytest.approx(case["next_draw"], abs=0)


@pytest.mark.parametrize("books", [1, 4])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_tokens_of_one_and_four_codebooks(books: int, distance: str) -> None:
    golden = Golden("quantizer")
    torch.manual_seed(books)
    quantizer = RandomProjectionQuantizer(QuantizerConfig(10, 4, books, 50, distance, True, False, 8))
    ours, theirs = quantizer.state_dict(), golden.under(f"books{books}.")
    assert torch.equal(ours["proj.weight"], theirs["proj"])
    assert torch.equal(ours["codebooks"], theirs["codebooks"])
    tokens = quantizer(theirs["feats"])
    assert torch.equal(tokens, theirs["tokens"].reshape(tokens.shape))
    unit = quantizer.project(theirs["feats"])
    distances = (unit[:, :, :, None] - quantizer.codebooks).norm(dim=-1)
    assert torch.equal(tokens.reshape(distances.shape[:3]), distances.argmin(-1))


def test_initial_weights_from_the_same_seed() -> None:
    golden = Golden("init")
    torch.manual_seed(0)
    model = NestModel(NestConfig.from_config(golden.config()))
    state = model.state_dict()
    sums = golden.under("sum.")
    assert set(state) == set(sums)
    for name, value in state.items():
        head = golden[f"head.{name}"]
        assert torch.equal(value.flatten()[: head.numel()].to(head.dtype), head.flatten()), name
        assert value.double().sum().item() == pytest.approx(sums[name].item(), rel=1e-12, abs=1e-12), name


STRUCTURE = json.loads((GOLDEN / "structure.json").read_text())


def test_names_shapes_types_and_order_of_small() -> None:
    recorded = STRUCTURE["state_dict"]["small"]
    with torch.device("meta"):
        model = NestModel(NestConfig.from_config(load_config("small")))
    ours = [
        [name, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for name, value in model.state_dict().items()
        if not name.startswith("encoder.layers.") or name.startswith("encoder.layers.0.")
    ]
    assert ours == recorded["entries"]
    assert len(model.encoder.layers) == recorded["layers"]


@pytest.mark.parametrize("case", json.loads((GOLDEN / "noise_and_schedule.json").read_text())["noam"])
def test_learning_rates_are_equal_to_the_last_bit(case: dict) -> None:
    settings = case["settings"]
    schedule = ScheduleConfig(
        name="NoamAnnealing",
        d_model=settings["d_model"],
        min_lr=settings["min_lr"],
        warmup_steps=settings.get("warmup_steps"),
        warmup_ratio=settings.get("warmup_ratio"),
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings["lr"])
    noam = NoamAnnealing(
        optimizer,
        d_model=schedule.d_model,
        warmup_steps=schedule.warmup(settings.get("max_steps", -1)),
        min_lr=schedule.min_lr,
    )
    rates = []
    for step in case["steps"]:
        noam.last_epoch = step
        rates.append(noam.get_lr()[0])
    assert rates == case["lr"]


PADDING = Golden("padding")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("number", ["0", "1", "2", "3"])
def test_padding_has_its_value(number: str, mode: str) -> None:
    case = PADDING.metadata["cases"][number]
    config = section(PreprocessorConfig, load_config("small", ["model.preprocessor.features=8"]), "model.preprocessor")
    preprocessor = LogMelPreprocessor(replace(config, nemo_exact=True, **case)).train(mode == "train")
    torch.manual_seed(5)
    features, frames = preprocessor(PADDING["audio"].float(), PADDING["lengths"])
    assert torch.equal(frames, PADDING[f"{number}.{mode}_frames"])
    assert features.shape[2] % case["pad_to"] == 0
    assert (features[1, :, int(frames[1]) :] == case["pad_value"]).all()
    assert_close(features, PADDING[f"{number}.{mode}"], 1e-4, f"{case} in {mode}")
