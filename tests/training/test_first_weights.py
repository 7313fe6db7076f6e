"""Runs that start from existing weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from conftest import tiny_config, write_archive
from nestcli.checkpoint.nemo import write_nemo
from nestcli.checkpoint.nemo_config import to_nemo
from nestcli.cli.named import read_config
from nestcli.config import load_config
from nestcli.errors import ConfigError, NestError
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel
from nestcli.training.initial_weights import load_initial_weights, weight_sources
from nestcli.training.run import Pretraining

State = dict[str, torch.Tensor]


class Silent:
    def step(self, report: Any) -> None: ...

    def validation(self, step: int, loss: float, accuracy: float) -> None: ...

    def note(self, message: str) -> None: ...

    def finished(self) -> None: ...


def pretraining(corpus: dict[str, Path], folder: Path, *overrides: str) -> Pretraining:
    steps = [f"exp_manager.exp_dir={folder}", "exp_manager.name=run", "trainer.max_steps=1"]
    return Pretraining(tiny_config(corpus, *steps, "trainer.val_check_interval=1", *overrides), Silent())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A .nemo file of the tiny model with other weights."""
    path = tmp_path_factory.mktemp("start") / "other.nemo"
    config = tiny_config({"train": Path("t"), "val": Path("v"), "noise": Path("n")})
    return path, written(path, config, seed=77)


def written(path: Path, config: DictConfig, seed: int) -> State:
    torch.manual_seed(seed)
    state = dict(NestModel(NestConfig.from_config(config)).state_dict())
    write_nemo(path, config, state)
    return state


@pytest.mark.parametrize("key", ["init_from_nemo", "init_from_nemo_model"])
def test_a_run_starts_from_a_nemo_file(
    corpus: dict[str, Path], other: tuple[Path, State], tmp_path: Path, key: str
) -> None:
    run = pretraining(corpus, tmp_path, f"{key}={other[0]}")
    ours = run.module.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in other[1].items())
    assert run.plan.initial_weights == (f"{other[0]} (59 of 59 tensors)",)
    assert run.plan.ignored_key is None


def test_a_run_starts_from_a_checkpoint_and_a_resumed_one_does_not(corpus: dict[str, Path], tmp_path: Path) -> None:
    first = pretraining(corpus, tmp_path / "first")
    trained = first.fit()
    assert trained.last is not None
    started = pretraining(corpus, tmp_path / "second", f"init_from_ptl_ckpt={trained.last}", "seed=5")
    ours, theirs = started.module.model.state_dict(), first.module.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert started.plan.resumes_at == 0  # weights, not the optimiser or the step

    resumed = pretraining(corpus, tmp_path / "first", "init_from_nemo=gone.nemo")
    assert resumed.plan.resumes is not None
    assert resumed.plan.initial_weights == ()
    assert resumed.plan.ignored_key == "init_from_nemo"


def test_parts_of_several_checkpoints(corpus: dict[str, Path], other: tuple[Path, State], tmp_path: Path) -> None:
    before = pretraining(corpus, tmp_path).module.model.state_dict()
    larger = tmp_path / "larger.nemo"
    books = written(larger, tiny_config(corpus, "model.encoder.d_model=32", "model.encoder.n_layers=2"), seed=5)
    parts = f"{{a: {{path: {other[0]}, include: [encoder], exclude: [layers.0.conv, .bias]}}, "
    parts += f"b: {{path: {larger}, include: [quantizer.]}}}}"
    run = pretraining(corpus, tmp_path, f"init_from_nemo_model={parts}")
    ours = run.module.model.state_dict()
    for name, value in ours.items():
        from_other = "encoder" in name and "layers.0.conv" not in name and ".bias" not in name
        expected = other[1] if from_other else books if "quantizer." in name else before
        assert torch.equal(value, expected[name]), name
    assert [line.rpartition("(")[2] for line in run.plan.initial_weights] == ["22 of 59 tensors)", "2 of 59 tensors)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from_pretrained_model=ssl_en_nest_large_v1.0"], "nest downloads nothing"),
        (["init_from_nemo=a.nemo", "init_from_ptl_ckpt=b.ckpt"], "init_from_nemo and init_from_ptl_ckpt are both set"),
        (["init_from_nemo=[a.nemo]"], "init_from_nemo: ['a.nemo']: give a path"),
        (["+init_from_nemo_model={a: {pth: a.nemo}}"], "init_from_nemo_model.a needs a path"),
        (
            ["init_from_nemo_model={a: {path: a.nemo, include: [1]}}"],
            "init_from_nemo_model.a.include: [1] must be a list",
        ),
        (["init_from_nemo_model.a.pth=x"], "unknown key init_from_nemo_model.a.pth"),
    ],
)
def test_starts_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        weight_sources(load_config("small", words))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("init_from_nemo=gone.nemo", "init_from_nemo: gone.nemo: no such checkpoint"),
        ("init_from_nemo={path}", "quantizer.codebooks has the shape [1, 32, 16], the model's has [1, 64, 16]"),
        ("init_from_nemo={path}  model.num_classes=32", "lacks encoder.layers.1."),
        ("init_from_nemo_model={{a: {{path: {path}, include: [nothing]}}}}", "none of its 59 tensors is selected"),
        (
            "init_from_nemo_model={{a: {{path: {path}, include: [decoder]}}}}",
            "decoder.decoder_layers.0.weight has the shape [32, 16, 1], the model's has [64, 16, 1]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(words: str, message: str, other: tuple[Path, State]) -> None:
    sizes = {"train": Path("t"), "val": Path("v"), "noise": Path("n")}
    config = tiny_config(
        sizes, "model.encoder.n_layers=2", "model.num_classes=64", *words.format(path=other[0]).split("  ")
    )
    model = NestModel(NestConfig.from_config(config))
    with pytest.raises(NestError) as raised:
        load_initial_weights(model, weight_sources(config), config)
    assert message in str(raised.value)
    assert "init_from_nemo" in str(raised.value)


def test_tensors_that_the_model_lacks_are_named(other: tuple[Path, State], tmp_path: Path) -> None:
    model, config = torch.nn.Linear(2, 2), load_config("small", [f"init_from_nemo={other[0]}"])
    with pytest.raises(ConfigError, match=r"holds preprocessor\.featurizer\.window \(and 58 more\), which this model"):
        load_initial_weights(model, weight_sources(config), config)


# ---- an encoder alone, out of a model of another kind ----


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory, other: tuple[Path, State]) -> Path:
    """A recogniser's archive with the tiny model's encoder: other target, other decoder, no quantizer."""
    path = tmp_path_factory.mktemp("asr") / "asr.nemo"
    config = tiny_config({"train": Path("t"), "val": Path("v"), "noise": Path("n")})
    blocks = {key: to_nemo(config)[key] for key in ("preprocessor", "encoder")}
    state = {name: value for name, value in other[1].items() if name.startswith(("encoder.", "preprocessor."))}
    return write_archive(path, {"target": "a.EncDecCTCModel", **blocks}, {**state, "decoder.weight": torch.ones(3)})


def test_a_run_starts_from_the_encoder_of_a_recogniser(
    corpus: dict[str, Path], other: tuple[Path, State], recogniser: Path, tmp_path: Path
) -> None:
    fresh = pretraining(corpus, tmp_path / "fresh").module.model.state_dict()
    run = pretraining(corpus, tmp_path / "started", f"init_from_encoder={recogniser}")
    for name, value in run.module.model.state_dict().items():
        assert torch.equal(value, (other[1] if name.startswith("encoder.") else fresh)[name]), name
    [line] = run.plan.initial_weights
    assert line == (
        f"{recogniser}: the encoder of its EncDecCTCModel (52 tensors); left: decoder (1); "
        "fresh: quantizer (2), mask_processor (1), decoder (2)"
    )
    assert run.fit().step == 1


def test_nemos_form_takes_parts_of_a_recogniser(
    corpus: dict[str, Path], other: tuple[Path, State], recogniser: Path, tmp_path: Path
) -> None:
    parts = f"init_from_nemo_model={{a: {{path: {recogniser}, include: [encoder]}}}}"
    ours = pretraining(corpus, tmp_path, parts).module.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in other[1].items() if name.startswith("encoder."))
    with pytest.raises(ConfigError, match=r"For its encoder alone: init_from_encoder=.*asr\.nemo"):
        pretraining(corpus, tmp_path / "whole", f"init_from_nemo={recogniser}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_from_encoder=gone.nemo"], "init_from_encoder: gone.nemo: no such checkpoint"),
        (["init_from_encoder=[a, b]"], "init_from_encoder: ['a', 'b'] must be a path"),
        (["init_from_encoder={path}", "model.encoder.n_layers=2"], "lacks encoder.layers.1."),
        (["init_from_encoder={path}", "model.encoder.conv_kernel_size=5"], "depthwise_conv.weight has the shape"),
        (
            ["init_from_encoder={path}", "model.encoder.xscaling=false"],
            "trained with model.encoder.xscaling=True; here",
        ),
        (
            ["init_from_encoder={path}", "model.encoder.att_context_size=[8,8]"],
            "model.encoder.att_context_size=[-1, -1]",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_named(recogniser: Path, words: list[str], message: str) -> None:
    sizes = {"train": Path("t"), "val": Path("v"), "noise": Path("n")}
    config = tiny_config(sizes, *(word.format(path=recogniser) for word in words))
    model = NestModel(NestConfig.from_config(config))
    with pytest.raises(NestError) as raised:
        load_initial_weights(model, weight_sources(config), config)
    assert message in str(raised.value)
    if "no such" not in message and "must be a path" not in message:
        assert f"nest pretrain {recogniser} init_from_encoder={recogniser}" in str(raised.value)


def test_the_archive_is_the_configuration_too(corpus: dict[str, Path], recogniser: Path) -> None:
    config = read_config([str(recogniser), f"model.train_ds.manifest_filepath={corpus['train']}"], training=True).config
    model = NestModel(NestConfig.from_config(config))
    [line] = load_initial_weights(
        model, weight_sources(OmegaConf.merge(config, {"init_from_encoder": str(recogniser)})), config
    )
    assert "(52 tensors)" in line


# ---- the quantizer fitted to the data -------------------------------------------------------------------------------

FITTED = ("model.quantizer.init=kmeans", "model.num_classes=4")


def codes(run: Pretraining) -> torch.Tensor:
    run.fit_quantizer()
    return run.module.model.quantizer.codebooks.detach().clone()


def test_the_quantizer_is_fitted_once_to_the_data_and_a_resumed_run_keeps_it(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    run = pretraining(corpus, tmp_path, *FITTED)
    random = run.module.model.quantizer.codebooks.detach().clone()
    others = {name: value.clone() for name, value in run.module.model.state_dict().items() if "quantizer" not in name}
    fitted = codes(run)
    assert not torch.equal(fitted, random)
    assert torch.equal(codes(run), fitted)
    assert all(torch.equal(run.module.model.state_dict()[name], value) for name, value in others.items())
    assert torch.equal(codes(pretraining(corpus, tmp_path, *FITTED, "seed=9")), fitted)
    result = run.fit()
    assert result.last is not None
    resumed = pretraining(corpus, tmp_path, *FITTED, "trainer.max_steps=2")
    assert resumed.resumes == result.last
    resumed.fit_quantizer()
    resumed.fit()
    assert torch.equal(resumed.module.model.quantizer.codebooks, fitted)


def test_a_quantizer_that_a_checkpoint_gives_is_kept(corpus: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "given.nemo"
    state = written(path, tiny_config(corpus, *FITTED), seed=5)
    whole = pretraining(corpus, tmp_path / "a", *FITTED, f"init_from_nemo_model={path}")
    assert torch.equal(codes(whole), state["quantizer.codebooks"])
    encoder = pretraining(corpus, tmp_path / "b", *FITTED, f"init_from_encoder={path}")
    assert not torch.equal(codes(encoder), state["quantizer.codebooks"])


def test_a_quantizer_cannot_be_fitted_to_too_little_speech(corpus: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NestError, match=r"model\.quantizer\.init=kmeans: .* tokens are too few for 8,192 codes"):
        pretraining(corpus, tmp_path, FITTED[0], "model.num_classes=8192").fit_quantizer()
    with pytest.raises(ConfigError, match=r"model\.quantizer\.init: kmeans needs model\.mask_position=pre_conv"):
        pretraining(corpus, tmp_path, *FITTED, "model.mask_position=post_conv")
    with pytest.raises(ConfigError, match=r"model\.quantizer\.init"):
        pretraining(corpus, tmp_path, "model.quantizer.init=magic")
