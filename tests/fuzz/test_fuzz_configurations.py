"""Configurations: an override changes one key or is refused, references are bounded before they are resolved."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fuzz.strategies import altered, any_text, bounded, damaged, json_values
from nestcli.checks import _MOST_LETTERS, _letters, check_plain, check_references, odd_in_yaml
from nestcli.config import (
    _known_keys,
    _parse_value,
    config_from_dict,
    leaves,
    load_config,
    resolved,
    seed_of,
    with_overrides,
)
from nestcli.errors import ConfigError, NestError
from nestcli.training.config_checks import check_settings, without_effect

KEYS = sorted(_known_keys())
TEXTS = (
    "1", "-3", "1e-3", "nan", "true", "null", "", "???", "a b", "[1, 2]", "{a: 1}", "[", "{", "[[1], {b: c}]",
    "{[1]: 2}", "${seed}", "${nowhere}", "${", "${oc.env:HOME}", "\\${x}", "os.system", "0b_", "1:30", "=", "<<",
    "- a", "a: b", "'", '"', "2020-01-01", "&a b", "*a", "!!python/name:os.system", "[" * 2000, "{a: " * 500, "#x",
    "\0", "\t", "٣", "[1]" * 3,
)  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Callable[[], DictConfig]:
    """Copies of a preset."""
    config = load_config("demo")
    return lambda: copy.deepcopy(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configurations")


def plain(config: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return content


# ---- overrides -------------------------------------------------------------------------------------------------


@given(
    key=st.sampled_from(KEYS),
    text=st.sampled_from(TEXTS) | any_text | json_values.map(lambda v: yaml.safe_dump(v).strip()),
)
@bounded(40)
def test_an_override_changes_its_key_alone_or_is_refused(base: Callable[[], DictConfig], key: str, text: str) -> None:
    before, word = dict(leaves(plain(base()))), f"{key}={text}"
    try:
        changed = with_overrides(base(), [word], "demo")
    except ConfigError as error:
        assert key in str(error) or repr(word)[:60] in str(error) or "interpolation" in str(error)
        return
    after = dict(leaves(plain(changed)))
    own = {each for each in before.keys() | after.keys() if each == key or each.startswith(f"{key}.")}
    above = {each for each in before if key.startswith(f"{each}.")}  # a null that became a block
    assert {each for each in before.keys() | after.keys() if before.get(each) != after.get(each)} <= own | above
    assert own & after.keys()


@given(
    word=st.builds("{}{}{}".format, any_text, st.sampled_from(["=", "=1", "", "[0]=1", ".=", "[=", ".a=1"]), any_text)
    | st.builds(
        "+{}={}".format,
        any_text | st.sampled_from([*KEYS, "model.encoder._target_", "a[0]", "seed.a"]),
        st.sampled_from(TEXTS),
    )
)
@example(word="model.encoder._target_=[1]")
@example(word="model.encoder._target_={a: 1}")
@bounded(60)
def test_any_word_is_an_override_or_refused(base: Callable[[], DictConfig], word: str) -> None:
    try:
        changed = with_overrides(base(), [word], "demo")
    except ConfigError as error:
        assert str(error)
        return
    assert "=" in word
    resolved(changed)


@given(text=st.sampled_from(TEXTS) | any_text | json_values.map(yaml.safe_dump))
@bounded(300)
def test_any_text_is_a_value_or_refused(text: str) -> None:
    try:
        value = _parse_value(text, f"seed={text}")
    except ConfigError as error:
        assert "seed=" in str(error)
        return
    assert value is None or isinstance(value, str | int | float | bool | list | dict)
    if isinstance(value, str):
        assert value == text


@given(
    key=st.sampled_from(KEYS),
    value=st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**5000), True])
    | st.lists(st.integers(), max_size=3),
)
@bounded(40)
def test_any_number_in_any_key_is_taken_or_refused(base: Callable[[], DictConfig], key: str, value: Any) -> None:
    config = base()
    block, _, name = key.rpartition(".")
    above = OmegaConf.select(config, block) if block else config
    if not isinstance(above, DictConfig):
        return
    above[name] = value
    try:
        check_settings(config)
    except NestError as error:
        assert str(error)
        return
    without_effect(config)


# ---- files -----------------------------------------------------------------------------------------------------

SMALL = """base: demo
model:
  encoder:
    n_layers: 3
    att_context_size: [8, 4]
  train_ds:
    manifest_filepath: ${seed}
seed: 3
"""


def load_or_refused(path: Path) -> None:
    try:
        config = load_config(str(path))
    except ConfigError as error:
        assert str(path) in str(error)
        return
    assert config.keys() >= {"model", "trainer"}
    resolved(config)


@given(content=damaged(SMALL.encode()) | st.binary(max_size=30))
@bounded(15)
def test_any_file_is_loaded_or_refused(folder: Path, content: bytes) -> None:
    path = folder / "any.yaml"
    path.write_bytes(content)
    load_or_refused(path)


@given(
    content=altered(yaml.safe_load(SMALL), None, "demo", {}, [], "???", "${model}", "${.n_layers}", 1.5, {1: 2}, True)
)
@bounded(12)
def test_any_block_is_loaded_or_refused(folder: Path, content: Any) -> None:
    path = folder / "blocks.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8", errors="replace")
    load_or_refused(path)


@given(
    preset=st.sampled_from(["demo", "small", "xlarge"]),
    keys=st.lists(st.sampled_from(KEYS), max_size=3),
    values=st.lists(st.sampled_from(["1", "0.5", "null", "a b", "[1, 2]", "true"]), min_size=3, max_size=3),
)
@bounded(5)
def test_a_configuration_that_is_written_is_loaded_again(
    folder: Path, preset: str, keys: list[str], values: list[str]
) -> None:
    words = [f"{key}={value}" for key, value in zip(keys, values, strict=False)]
    try:
        config = load_config(preset, words)
    except ConfigError:
        assume(False)
        return
    taken = resolved(config)
    taken["exp_manager"] |= {"exp_dir": None, "create_wandb_logger": False}  # where a checkpoint was made binds nobody
    taken["model"]["encoder"].pop("backend", None)
    assert config_from_dict(resolved(config), "x.ckpt") == OmegaConf.create(taken)
    path = folder / "written.yaml"
    OmegaConf.save(config, path)
    assert load_config(str(path)) == config


# ---- what a stranger's may hold --------------------------------------------------------------------------------

inside = st.sampled_from(
    [
        "a",
        "b",
        "a.b",
        ".a",
        ".b",
        "..a",
        "...b",
        "c[0]",
        "c.1",
        "c.-1",
        "c[-1]",
        "c",
        "d.a",
        ".0",
        ".1",
        ".-1",
        " a ",
        "a..b",
        "",
        "[a]",
        "²",
        "c.²",
        "c. 1",
        "c.+1",
        "c.1_0",
        "d",
        "d.c.0",
        "oc.env:HOME",
        "a${b}",
    ]
)
text_with_references = st.lists(
    inside.map("${{{}}}".format) | st.sampled_from(["x", "lol" * 9, "\\", "'", "$", "{", "}"]), max_size=4
).map("".join)
values = text_with_references | st.sampled_from([1, None, True, 1.5, "???"])
trees = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]),
    st.recursive(
        values,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c", 1, True]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    min_size=1,
)


def letters_of(value: Any) -> int:
    if isinstance(value, dict):
        return sum(letters_of(inner) for inner in value.values())
    return sum(letters_of(inner) for inner in value) if isinstance(value, list) else len(str(value))


def resolved_or_none(content: dict[str, Any]) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except (OmegaConfBaseException, RecursionError):
        return None


@given(content=trees)
@example(content={"a": {"c": "lol" * 9}, "b": "${a}", "d": "${b.c}${b.c}"})
@example(content={"a": {"c": "lol" * 9}, "d": "x${a.c}${a.c}", "b": ["${d.a}"]})
@example(content={"a": "\\", "b": "\\${a}", "c": "${a}\\"})
@example(content={"c": ["lol" * 9, "${c.-2}${c.-2}"]})
@example(content={"c": ["x"], "a": "${c.²}"})
@example(content={"a": ["\\"], "b": ["x${a}"], "c": ["x${b}"], "d": ["x${c}"]})
@bounded(200)
def test_what_passes_resolves_to_no_more_letters_than_were_counted(content: dict[str, Any]) -> None:
    try:
        check_references(content, "x.yaml")
    except ConfigError as error:
        assert "x.yaml" in str(error)
        return
    counted = _letters(content, "x.yaml")
    assert counted <= _MOST_LETTERS
    found = resolved_or_none(content)
    assert found is None or letters_of(found) <= counted


@given(
    seed=st.integers(0, 2**32),
    width=st.integers(2, 4),
    length=st.integers(1, 40),
    way=st.sampled_from(["{}", "c.{}", ".{}", "c[{}]", "via.{}"]),
)
@example(seed=0, width=2, length=40, way="via.{}")
@bounded(60)
def test_chains_that_double_are_refused_before_they_are_resolved(seed: int, width: int, length: int, way: str) -> None:
    """Each value repeats the one before it; only references to a plain value pass, however it is named."""
    names = [f"k{number}" for number in range(length)]
    chain = {names[0]: "lol"}
    for before, name in itertools.pairwise(names):
        chain[name] = ("${" + way.format(before) + "}") * width
    shuffled = list(chain.items())
    random.Random(seed).shuffle(shuffled)
    content = {**dict(shuffled), "c": dict(shuffled), **({"via": "${c}"} if way.startswith("via") else {})}
    true_length = 3 * width ** (length - 1)
    plain = way in ("{}", "c.{}") and length <= 2
    try:
        check_references(content, "x.yaml")
    except ConfigError:
        assert not plain
        return
    assert plain or (length == 1 and not way.startswith("via"))
    assert true_length <= _MOST_LETTERS
    assert letters_of(resolved_or_none(content) or {}) <= _MOST_LETTERS


@given(width=st.integers(1, 2000), letters=st.integers(0, 2000))
@bounded(60)
def test_a_text_that_repeats_a_value_is_refused_where_it_grows(width: int, letters: int) -> None:
    content = {"a": "x" * letters, "b": "${a}" * width}
    try:
        check_references(content, "x.yaml")
    except ConfigError as error:
        assert "grow beyond" in str(error)
        assert letters + width * (letters + 4) > _MOST_LETTERS
        return
    assert letters_of(resolved_or_none(content)) <= _MOST_LETTERS


@given(
    content=altered(
        {"model": {"encoder": {"_target_": "nestcli.ConformerEncoder", "n": [1, {"a": None}]}}, "name": "x"},
        "${a}",
        {"_target_": "os.system"},
        {"_target_": []},
        {"_partial_": True},
        {"class_path": 1},
        [[]],
        {},
    )
)
@bounded(200)
def test_what_is_plain_has_no_reference_and_calls_nothing(content: Any) -> None:
    try:
        check_plain(content, "x.ckpt")
    except ConfigError as error:
        assert "x.ckpt" in str(error)
        return
    text = repr(content)
    assert "${" not in text
    assert not any(word in text for word in ("os.system", "_partial_", "class_path"))
    assert OmegaConf.to_container(OmegaConf.create({"a": content}), resolve=True) == {"a": content}


@given(content=damaged(SMALL.encode()))
@bounded(200)
def test_yaml_that_is_not_odd_expands_to_nothing_more(content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    try:
        if odd_in_yaml(text):
            return
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return
    assert letters_of(value) <= 2 * len(text) + 10


@given(value=json_values)
@bounded(50)
def test_a_seed_is_a_number_or_refused(value: Any) -> None:
    config = OmegaConf.create({"seed": None})
    config._set_flag("allow_objects", True)
    try:
        config.seed = value
        assert seed_of(config) >= 0
    except (ConfigError, OmegaConfBaseException):
        return
