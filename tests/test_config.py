"""Every key of NeMo's file, presets, overrides, and the messages for what is wrong."""

import json

import pytest
from omegaconf import OmegaConf

from conftest import GOLDEN
from nestcli.config import (
    PRESETS,
    config_from_dict,
    load_config,
    require,
    resolved,
    split_words,
)
from nestcli.errors import ConfigError
from nestcli.model.count import count_parameters, nemo_count
from nestcli.parity.nemo import FACTS
from nestcli.targets import TARGETS

STRUCTURE = json.loads((GOLDEN / "structure.json").read_text())


def test_every_key_of_nemos_file_with_its_value() -> None:
    theirs = json.loads((FACTS / "config.json").read_text())
    ours = OmegaConf.to_container(load_config(), resolve=False)
    assert ours == theirs


@pytest.mark.parametrize("preset", ["small", "medium", "large", "xlarge", "xxlarge"])
def test_parameter_counts_of_the_presets(preset: str) -> None:
    config, recorded = load_config(preset), STRUCTURE["presets"][preset]
    counted = count_parameters(config)
    assert (counted.total, counted.frozen) == (recorded["total"], recorded["frozen"])
    assert nemo_count(config) == recorded["total"]
    modules = {name: sum(pair) for name, pair in counted.to_depth(1).items()}
    assert modules == {name: number for name, number in recorded["modules"].items() if number}
    encoder = {key: config.model.encoder[key] for key in recorded["encoder"]}
    assert encoder == recorded["encoder"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_books=4", "model.code_dim=8"],
        ["model.encoder.subsampling_factor=4", "model.encoder.subsampling_conv_channels=-1"],
        [
            "model.decoder.use_bias=false",
            "model.encoder.ff_expansion_factor=2",
            "model.preprocessor.features=128",
        ],
    ],
)
def test_counting_by_sizes_agrees_with_counting_weights(overrides: list[str]) -> None:
    config = load_config("small", overrides)
    assert nemo_count(config) == count_parameters(config).total


def test_every_preset_loads_and_keeps_nemos_keys() -> None:
    for preset in PRESETS:
        config = load_config(preset)
        assert config.model.loss.combine_time_steps == config.model.encoder.subsampling_factor
        assert config.model.optim.sched.d_model == config.model.encoder.d_model


def test_overrides_keep_types_and_follow_interpolations() -> None:
    config = load_config(
        "small",
        [
            "model.encoder.d_model=88",
            "model.optim.lr=2",
            "model.encoder.att_context_size=[8,4]",
            "model.train_ds.manifest_filepath=my data/a #1, b.json",
            "model.train_ds.batch_augmentor=null",
            "+my.note=1e-3",
        ],
    )
    assert config.model.optim.sched.d_model == 88
    assert config.model.encoder.att_context_size == [8, 4]
    assert config.model.train_ds.manifest_filepath == "my data/a #1, b.json"
    assert config.model.train_ds.batch_augmentor is None
    assert config.my.note == 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.encoder.n_layer=4"], "Did you mean model.encoder.n_layers"),
        (["trainer.max_step=4"], "Did you mean trainer.max_steps"),
        (["model.encoder={n_layer: 4}"], "unknown key model.encoder.n_layer"),
        (["model.encoder.n_layers"], "Write key=value"),
        (["model.encoder.d_model=${nowhere}"], "nowhere"),
        (["model.encoder._target_=os.system"], "not a supported class"),
        (["+model._target_=os.system"], "names a class where no class is allowed"),
        (["model.encoder._target_=nemo.collections.asr.losses.MultiMLMLoss"], "Supported here: ConformerEncoder"),
        (["model.encoder.att_context_size=[1,"], "not valid YAML"),
        (["model.sample_rate=[1, 2]"], "model.sample_rate takes one value, which other keys repeat"),
        (["model.encoder={d_model: [1]}"], "model.encoder.d_model takes one value"),
        (["+model.sample_rate.a=1"], "model.sample_rate takes one value"),
    ],
)
def test_overrides_that_are_wrong(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config("small", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.encoder.n_layers=many"], "model.encoder.n_layers: 'many' is not of type int"),
        (["model.encoder.d_model=90"], "multiple of n_heads=4"),
        (["model.encoder.subsampling=striding"], "only dw_striding is"),
        (
            ["model.quantizer.num_classes=5"],
            "model.decoder.num_classes is 8192, but the other blocks make it 5",
        ),
        (["model.mask_position=nowhere"], "pre_conv or post_conv"),
        (["model.preprocessor.pad_to=0"], "multiple of model.encoder.subsampling_factor"),
        (["model.masking.mask_prob=2"], "mask_prob: 2"),
    ],
)
def test_values_that_do_not_fit(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        count_parameters(load_config("small", words))
    assert message in str(raised.value)


def test_a_preset_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'medium'"):
        load_config("meduim")


def test_files_lay_over_a_base_or_stand_alone(tmp_path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("base: small\nmodel:\n  encoder:\n    n_layers: 3\n  train_ds:\n    batch_augmentor: null\n")
    config = load_config(str(overlay))
    assert (config.model.encoder.n_layers, config.model.encoder.d_model) == (3, 176)
    assert config.model.train_ds.batch_augmentor is None

    alone = tmp_path / "alone.yaml"
    OmegaConf.save(load_config("small"), alone)
    assert load_config(str(alone)) == load_config("small")

    partial = tmp_path / "partial.yaml"
    partial.write_text("model:\n  encoder:\n    n_layers: 3\n")
    with pytest.raises(ConfigError, match="put `base: nest_fast-conformer`"):
        load_config(str(partial))

    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text("base: small\nmodel:\n  encoder:\n    n_layer: 3\n")
    with pytest.raises(ConfigError, match=r"misspelt.yaml: unknown key model.encoder.n_layer. Did you mean"):
        load_config(str(misspelt))


def test_a_file_that_stands_alone_may_leave_out_data_and_trainer(tmp_path) -> None:
    content = OmegaConf.to_container(load_config("small"), resolve=False)
    del content["trainer"], content["exp_manager"], content["model"]["validation_ds"]
    del content["model"]["train_ds"]["batch_augmentor"]
    path = tmp_path / "model.yaml"
    OmegaConf.save(OmegaConf.create(content), path)
    config = load_config(str(path))
    assert config.trainer.max_steps == 500000
    assert config.model.train_ds.batch_augmentor is None
    assert config.model.validation_ds.manifest_filepath is None


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "just text"])
def test_files_that_are_no_configuration(tmp_path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(str(path))


def test_dotted_keys_in_a_file_are_refused(tmp_path) -> None:
    path = tmp_path / "dotted.yaml"
    path.write_text("base: small\nmodel.encoder.n_layers: 4\n")
    with pytest.raises(ConfigError, match="keys in a file must not contain dots"):
        load_config(str(path))


def test_a_key_of_ones_own_stays_readable_in_a_checkpoint() -> None:
    config = load_config("small", ["+my.note=1"])
    assert config_from_dict(resolved(config), "run.ckpt").my.note == 1


def test_configurations_inside_checkpoints_call_no_resolver() -> None:
    content = resolved(load_config("small"))
    content["name"] = "${oc.env:HOME}"
    with pytest.raises(ConfigError, match="calls a resolver at name"):
        config_from_dict(content, "x.ckpt")


def test_required_keys_say_how_to_set_them() -> None:
    with pytest.raises(ConfigError, match=r"Add model.train_ds.manifest_filepath=\.\.\."):
        require(load_config("small"), "model.train_ds.manifest_filepath", "the manifest")


def test_words_of_a_command() -> None:
    assert split_words([]) == ("nest_fast-conformer", [])
    assert split_words(["a=1"]) == ("nest_fast-conformer", ["a=1"])
    assert split_words(["small", "a=1"]) == ("small", ["a=1"])
    checkpoint = "runs/NEST--val_loss=8.1-step=9.ckpt"
    assert split_words([checkpoint, "a=1"]) == (checkpoint, ["a=1"])
    assert split_words([checkpoint[5:]]) == (checkpoint[5:], [])
    with pytest.raises(ConfigError, match="'large' is neither"):
        split_words(["small", "large"])


def test_targets_are_names_of_nemo_and_ours() -> None:
    assert TARGETS["nemo.collections.asr.modules.ConformerEncoder"] == "encoder"
    assert TARGETS["nestcli.ConformerEncoder"] == "encoder"
    assert all(name.startswith(("nemo.collections.asr.", "nestcli.")) for name in TARGETS)


def test_weights_to_start_from_on_the_command_line_replace_those_of_the_file() -> None:
    config = load_config("small", ["init_from_nemo_model=a.nemo"])
    content = resolved(config)
    again = config_from_dict(content, "a.ckpt", ["init_from_ptl_ckpt=b.ckpt"])
    assert (again.get("init_from_nemo_model"), again.init_from_ptl_ckpt) == (None, "b.ckpt")
    part = config_from_dict(content, "a.ckpt", ["+init_from_ptl_ckpt.a.path=b.ckpt"])
    assert (part.get("init_from_nemo_model"), part.init_from_ptl_ckpt.a.path) == (None, "b.ckpt")
    assert config_from_dict(content, "a.ckpt", ["init_from_ptl_ckpt=null"]).init_from_nemo_model == "a.nemo"
    both = config_from_dict(content, "a.ckpt", ["init_from_nemo_model=c.nemo", "init_from_ptl_ckpt=b.ckpt"])
    assert (both.init_from_nemo_model, both.init_from_ptl_ckpt) == ("c.nemo", "b.ckpt")  # refused by the run
