"""Faults that the property tests and atheris have found, each as its smallest example."""

from __future__ import annotations

import io
import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

from fuzz.strategies import one_line
from nestcli.audio.inspect import inspect_audio
from nestcli.checkpoint.load import load_checkpoint
from nestcli.checkpoint.nemo_config import plain_yaml
from nestcli.checkpoint.weights import load_weights
from nestcli.checks import check_references
from nestcli.config import load_config
from nestcli.data.corpus import _parts_of_input
from nestcli.data.manifest_scan import expand, read_manifests, scan
from nestcli.data.tarred import _shar_row
from nestcli.errors import CheckpointError, ConfigError, DataError
from nestcli.prepare.kaldi import read_kaldi

CUT: dict[str, Any] = {"start": 0, "duration": 1, "recording": {"sources": [{"type": "file", "source": "/a.wav"}]}}


@pytest.mark.parametrize(
    "change", [{"supervisions": 3}, {"supervisions": True}, {"recording": {**CUT["recording"], "transforms": 3}}]
)
def test_parts_of_a_cut_that_are_no_lists(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(one_line({**CUT, **change}))
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: .* must be a list"):
        read_manifests(str(path))


@pytest.mark.parametrize("sources", [3, [{"type": []}], [{"type": "shar"}, 3], {}])
def test_sources_of_a_shar_that_are_none(tmp_path: Path, sources: Any) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(one_line({"id": "c", "duration": 1, "recording": {"sources": sources}}))
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: this is not a cut of a Shar"):
        scan(str(path), to_row=_shar_row)


def test_names_joined_to_more_than_a_file_name_can_have(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(one_line({"audio_filepath": "a.wav", "duration": 1}))
    assert len(read_manifests(",".join([str(path)] * 300))) == 300
    with pytest.raises(DataError, match="File name too long"):
        read_manifests("a" * 300)


@pytest.mark.parametrize(("path", "message"), [
    ("{0..999999}{0..999999}.tar", "more than 1,000,000 files"), ("a{0..1}" * 400, "more than 1,000,000 files"),
    ("{0.." + "9" * 5000 + "}", "names no files"),
])  # fmt: skip
def test_ranges_without_end(path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand(path)


def test_paths_of_shards_that_pathlib_has_no_answer_for() -> None:
    assert expand("~nobody-of-that-name/a.tar") == ["~nobody-of-that-name/a.tar"]
    assert expand("a" * 300) == ["a" * 300]
    assert expand(["~\0", "~\ud800"]) == ["~\0", "~\ud800"]


def test_a_home_of_a_user_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(one_line({"audio_filepath": "~\ud800/a.wav", "duration": 1}))
    assert read_manifests(str(path)).entry(0).audio_filepath == "~\ud800/a.wav"


@pytest.mark.parametrize("path", ["~nobody-of-that-name/a.wav", "a" * 300])
def test_recordings_of_kaldi_that_pathlib_has_no_answer_for(tmp_path: Path, path: str) -> None:
    (tmp_path / "wav.scp").write_text(f"r1 {path}\n")
    assert [each.path for each in read_kaldi(tmp_path)] == [str(tmp_path / path)]


@pytest.mark.parametrize("end", ["inf", "1e7"])
def test_segments_of_kaldi_without_end(tmp_path: Path, end: str) -> None:
    (tmp_path / "wav.scp").write_text("r1 a.wav\n")
    (tmp_path / "segments").write_text(f"u1 r1 0 {end}\n")
    with pytest.raises(DataError, match="must be later, at most 1e"):
        list(read_kaldi(tmp_path))


# ---- configurations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["[1]", "{a: 1}", "[]"])
def test_a_class_that_is_no_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"not a supported class|unknown key"):
        load_config("demo", [f"model.encoder._target_={value}"])


def doubling(first: str, way: str) -> dict[str, Any]:
    """Each value doubles the one before, which is referenced as `way`; the last has 2^40 letters."""
    chain = [first, *((way.format(number) + way.format(number)) for number in range(40))]
    return {"list": chain, "block": {f"k{number}": value for number, value in enumerate(chain)}, "via": "${block}"}


@pytest.mark.parametrize(
    "way", ["${{list[{0}]}}", "${{block.k{0}}}", "${{via.k{0}}}", "${{..via.k{0}}}", "${{list.+{0}}}"]
)
def test_references_that_double_are_refused_however_they_are_named(way: str) -> None:
    with pytest.raises(ConfigError, match="refers to more than a single value"):
        check_references(doubling("lol", way), "x.yaml")


def test_references_that_count_from_the_end_are_counted() -> None:
    content = {"c": ["lol", *(f"${{c.{number - 41}}}" * 2 for number in range(40))]}
    with pytest.raises(ConfigError, match="refers to more than a single value"):
        check_references(content, "x.yaml")


def test_references_below_keys_that_are_no_text_are_counted() -> None:
    with pytest.raises(ConfigError, match="calls a resolver"):
        check_references({"a": {1: "${oc.env:HOME}"}}, "x.yaml")


def test_a_block_within_a_text_is_refused() -> None:
    """Its backslashes would double at every reference."""
    with pytest.raises(ConfigError, match="refers to more than a single value"):
        check_references({"a": ["\\"], "b": ["x${a}"], "c": ["x${b}"]}, "x.yaml")
    with pytest.raises(ConfigError, match="refers to more than a single value"):
        check_references({"a": ["\\"], "b": "${a}", "c": "x${b[0]}"}, "x.yaml")
    check_references({"a": "\\", "b": "${a}", "c": {"d": "x${a}"}}, "x.yaml")


def test_a_number_of_many_digits(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"base: small\nname: 0x{'f' * 5000}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: name is a number of many digits"):
        load_config(str(path))


def test_a_file_that_is_a_number_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("3")
    with pytest.raises(ConfigError, match=r"a\.yaml: a configuration must be a mapping of keys, not a single val"):
        load_config(str(path))
    with pytest.raises(CheckpointError, match=r"a\.nemo: .* a single value"):
        plain_yaml(b"3", "a.nemo")


@pytest.mark.parametrize(
    "key", ["name", "model.train_ds.cuts_path", "model.train_ds.use_start_end_token", "+mine", "+mine.weight"]
)
def test_a_number_of_many_digits_in_an_override(key: str) -> None:
    """Python cannot print it, so no later message could."""
    with pytest.raises(ConfigError, match=rf"{key.lstrip('+')} is a number of many digits"):
        load_config("demo", [f"{key}=0x{'f' * 5000}"])


def test_a_number_of_many_digits_inside_a_list() -> None:
    with pytest.raises(ConfigError, match=r"input_cfg\.weight is a number of many digits"):
        load_config("demo", [f"model.train_ds.input_cfg=[{{type: nemo, weight: 0x{'f' * 5000}}}]"])


def test_a_place_in_digits_that_are_none() -> None:
    with pytest.raises(ConfigError, match="refers to more than a single value"):
        check_references({"c": ["x"], "a": "${c.²}"}, "x.yaml")


def test_an_input_cfg_that_names_itself_or_calls_resolvers(tmp_path: Path) -> None:
    path = tmp_path / "input.yaml"
    path.write_text(f"[{{type: group, input_cfg: {path}}}]")
    with pytest.raises(ConfigError, match="Does a file name itself"):
        _parts_of_input(str(path), None, itertools.count())
    for text, message in [
        ("[{type: '${oc.env:HOME}'}]", "calls a resolver"),
        ("[&a {type: b}, *a]", "an anchor"),
        ("[", "cannot be read"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            _parts_of_input(str(path), None, itertools.count())
    with pytest.raises(ConfigError, match="cannot be read"):
        _parts_of_input("~nobody-of-that-name/a.yaml", None, itertools.count())


# ---- audio -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["CAF", "AU", "W64", "RF64"])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_a_part_of_a_file_in_a_rarer_format_is_no_whole_one(tmp_path: Path, format: str, subtype: str) -> None:
    path = tmp_path / "a.bin"
    sf.write(path, 0.1 * np.random.default_rng(0).standard_normal(9000), 16000, format=format, subtype=subtype)
    assert inspect_audio(path).reason is None
    content = path.read_bytes()
    for share in (0.3, 0.75, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        report = inspect_audio(path)
        assert report.reason in ("truncated", "unreadable")  # libsndfile refuses half a CAF itself
    assert report.reason == "truncated"
    path.write_bytes(content + b"a tag")
    assert inspect_audio(path).reason is None


# ---- weights ---------------------------------------------------------------------------------------------------


def zipped(table: bytes) -> bytes:
    """Return weights that contain our own pickle."""
    out, buffer = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, table if entry.filename.endswith("/data.pkl") else old.read(entry))
    return out.getvalue()


@pytest.mark.parametrize(
    "table",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",  # TypeError: called without arguments
        b"\x80\x02K\x01Q.",  # AssertionError: a storage that is a number
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # TypeError, or a warning that such storages are deprecated
        b"\x89\x02}.",  # another protocol: a warning
        b"\x80\x02S'\\s'\n.",  # an unknown escape: a warning
    ],
)
def test_pickles_that_make_torch_raise_and_warn(tmp_path: Path, table: bytes) -> None:
    content = zipped(table)
    with pytest.raises(CheckpointError, match=r"a\.nemo: the weights"):
        load_weights(io.BytesIO(content), len(content), "a.nemo")
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        load_checkpoint(path)
