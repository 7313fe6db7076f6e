""".nemo files: what we write, what we read, and every archive that is refused."""

import copy
import gzip
import io
import os
import pickle
import resource
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from nestcli.checkpoint import archive
from nestcli.checkpoint.load import load_checkpoint
from nestcli.checkpoint.nemo import read_nemo, read_nemo_config, write_nemo
from nestcli.config import load_config, resolved
from nestcli.errors import CheckpointError, NestError
from nestcli.model.config import NestConfig
from nestcli.model.nest import NestModel

TINY = [
    "model.encoder.d_model=16", "model.encoder.n_heads=2", "model.encoder.n_layers=1", "model.num_classes=32",
    "model.encoder.subsampling_conv_channels=8",
]  # fmt: skip
State = dict[str, torch.Tensor]


def tiny(*overrides: str) -> tuple[DictConfig, State]:
    config = load_config("small", [*TINY, *overrides])
    torch.manual_seed(3)
    return config, dict(NestModel(NestConfig.from_config(config)).state_dict())


@pytest.fixture(scope="module")
def model() -> tuple[DictConfig, State]:
    return tiny()


@pytest.fixture(scope="module")
def parts(model: tuple[DictConfig, State], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The two files of an archive: configuration and weights."""
    path = tmp_path_factory.mktemp("nemo") / "tiny.nemo"
    write_nemo(path, *model)
    with tarfile.open(path) as tar:
        config, weights = (tar.extractfile(name) for name in ("./model_config.yaml", "./model_weights.ckpt"))
        assert config is not None
        assert weights is not None
        return config.read(), weights.read()


def pack(path: Path, *members: tuple[str, bytes], mode: str = "w:", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def packed(path: Path, parts: tuple[bytes, bytes], **options: Any) -> Path:
    return pack(path, ("./model_config.yaml", parts[0]), ("./model_weights.ckpt", parts[1]), **options)


def refusal(path: Path) -> str:
    """The message with which a file is refused; reading it leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(NestError) as raised:
        read_nemo(path)
    assert sorted(path.parent.iterdir()) == before
    assert str(path) in str(raised.value)
    return str(raised.value)


# ---- out and in again ------------------------------------------------------------------------------------------


def test_a_model_goes_out_and_comes_back(model: tuple[DictConfig, State], tmp_path: Path) -> None:
    config, state = model
    write_nemo(tmp_path / "a.nemo", config, state)
    restored, weights = read_nemo(tmp_path / "a.nemo")
    assert resolved(restored)["model"] == resolved(config)["model"]
    assert list(weights) == list(state)
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert weights["quantizer.codebooks"].dtype == torch.float64
    assert restored.trainer.max_steps == 500000
    NestModel(NestConfig.from_config(restored)).load_state_dict(weights, strict=True)


def test_the_archive_is_the_one_that_nemo_writes(parts: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.nemo"
    write_nemo(path, *tiny())
    with tarfile.open(path, "r:") as tar:
        assert [(member.name, member.type) for member in tar] == [
            (".", tarfile.DIRTYPE),
            ("./model_config.yaml", tarfile.REGTYPE),
            ("./model_weights.ckpt", tarfile.REGTYPE),
        ]
    content = yaml.safe_load(parts[0])
    assert content["target"] == "nemo.collections.asr.models.ssl_models.EncDecDenoiseMaskedTokenPredModel"
    assert "${" not in parts[0].decode()
    assert "nestcli" not in content
    state = torch.load(io.BytesIO(parts[1]), weights_only=True)
    assert type(state) is OrderedDict
    assert next(iter(state)) == "preprocessor.featurizer.window"
    assert state["quantizer.codebooks"].dtype == torch.float64


def test_the_same_model_gives_the_same_bytes(
    model: tuple[DictConfig, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nemo(tmp_path / "a.nemo", *model)
    monkeypatch.setattr("time.time", lambda: 1.0)
    write_nemo(tmp_path / "b.nemo", model[0], dict(reversed(model[1].items())))
    assert (tmp_path / "a.nemo").read_bytes() == (tmp_path / "b.nemo").read_bytes()


def test_settings_of_our_own_stand_where_nemo_lets_them_pass(tmp_path: Path) -> None:
    own = [
        "model.encoder.conv_norm_ignore_padding=true", "model.masking.max_mask_ratio=0.5",
        "model.train_ds.batch_augmentor.nemo_exact=true", "model.encoder._target_=nestcli.ConformerEncoder",
        "model.preprocessor.nemo_exact=false",
    ]  # fmt: skip
    config, state = tiny(*own)
    write_nemo(tmp_path / "a.nemo", config, state)
    with tarfile.open(tmp_path / "a.nemo") as tar:
        stored = yaml.safe_load(tar.extractfile("./model_config.yaml"))  # type: ignore[arg-type]
    assert stored["nestcli"] == {
        "encoder": {"conv_norm_ignore_padding": True},
        "masking": {"max_mask_ratio": 0.5},
        "train_ds": {"batch_augmentor": {"nemo_exact": True}},
    }
    assert "conv_norm_ignore_padding" not in stored["encoder"]
    assert stored["encoder"]["_target_"] == "nemo.collections.asr.modules.ConformerEncoder"
    assert "nemo_exact" not in stored["preprocessor"]
    restored, _ = read_nemo(tmp_path / "a.nemo")
    assert restored.model.encoder.conv_norm_ignore_padding is True
    assert restored.model.masking.max_mask_ratio == 0.5
    assert restored.model.train_ds.batch_augmentor.nemo_exact is True


def test_weights_in_bf16_are_stored_in_full(tmp_path: Path) -> None:
    config, state = tiny("model.num_books=2", "model.encoder.use_bias=false")
    halves = {name: value.bfloat16() if value.dtype == torch.float32 else value for name, value in state.items()}
    write_nemo(tmp_path / "a.nemo", config, halves)
    _, weights = read_nemo(tmp_path / "a.nemo")
    assert {value.dtype for value in weights.values()} == {torch.float32, torch.float64, torch.int64}


def test_what_cannot_be_written_says_so(model: tuple[DictConfig, State], tmp_path: Path) -> None:
    config, state = model
    after = load_config("small", [*TINY, "model.mask_position=post_conv"])
    with pytest.raises(CheckpointError, match=r"post_conv cannot go into a \.nemo file"):
        write_nemo(tmp_path / "a.nemo", after, state)
    with pytest.raises(CheckpointError, match=r"lacks decoder\.decoder_layers\.0\.bias"):
        write_nemo(
            tmp_path / "a.nemo", config, {k: v for k, v in state.items() if k != "decoder.decoder_layers.0.bias"}
        )
    with pytest.raises(
        CheckpointError, match=r"decoder.decoder_layers.0.bias has the shape \[3\], the model's has \[32\]"
    ):
        write_nemo(tmp_path / "a.nemo", config, {**state, "decoder.decoder_layers.0.bias": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "limit", [2_000, 100_000, 170_000]
)  # bytes: in the configuration, in the weights, near the end
def test_a_full_disk_leaves_the_old_file(model: tuple[DictConfig, State], tmp_path: Path, limit: int) -> None:
    path = tmp_path / "a.nemo"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(CheckpointError, match=r"a\.nemo cannot be written: File too large"):
            write_nemo(path, *model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.nemo"]


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
@pytest.mark.parametrize("prefix", ["./", ""])
def test_plain_and_compressed_with_and_without_a_folder(
    parts: tuple[bytes, bytes], tmp_path: Path, mode: str, prefix: str
) -> None:
    path = pack(
        tmp_path / "a.nemo",
        (f"{prefix}model_weights.ckpt", parts[1]),  # any order
        (f"{prefix}0123_tokenizer.model", b"never looked at"),
        (f"{prefix}model_config.yaml", parts[0]),
        mode=mode,
    )
    config, weights = read_nemo(path)
    assert config.model.encoder.d_model == 16
    assert len(weights) == 59
    assert load_checkpoint(path, ["model.encoder.dropout=0.5"]).config.model.encoder.dropout == 0.5


def test_headers_that_note_times_and_owners_are_no_harm(parts: tuple[bytes, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "model_config.yaml").write_bytes(parts[0])
    (folder / "model_weights.ckpt").write_bytes(parts[1])
    os.utime(folder / "model_config.yaml", (1.5, 1.5))
    with tarfile.open(tmp_path / "a.nemo", "w:") as tar:  # as NeMo does it: times as fractions
        tar.add(folder, arcname=".")
    read_nemo(tmp_path / "a.nemo")


def test_codebooks_in_fp32_become_fp64(
    model: tuple[DictConfig, State], parts: tuple[bytes, bytes], tmp_path: Path
) -> None:
    state = {**model[1], "quantizer.codebooks": model[1]["quantizer.codebooks"].float()}
    _, weights = read_nemo(packed(tmp_path / "a.nemo", (parts[0], saved(state))))
    assert weights["quantizer.codebooks"].dtype == torch.float64


# ---- archives that are refused ---------------------------------------------------------------------------------


def saved(state: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def odd_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> Callable[..., bytes]:
    """A good archive with one odd member in it."""

    def make(parts: tuple[bytes, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:") as tar:
            for file, data in zip(("./model_config.yaml", "./model_weights.ckpt"), parts, strict=True):
                info = tarfile.TarInfo(file)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            tar.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    return make


def with_pax(**headers: str) -> Callable[..., bytes]:
    def make(parts: tuple[bytes, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("notes.txt")
            info.pax_headers = headers
            tar.addfile(info)
        return buffer.getvalue()

    return make


def global_pax(parts: tuple[bytes, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x"}):
        pass
    return buffer.getvalue()


def crowded(parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(archive.header_of(f"{number}", 0) for number in range(10_000)) + bytes(1024)


def claiming(size: int) -> Callable[..., bytes]:
    """A header that claims `size` bytes for the configuration; tar stores large and negative numbers in base 256."""

    def make(parts: tuple[bytes, bytes]) -> bytes:
        header = bytearray(archive.header_of("model_config.yaml", 0))
        header[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
        if size < 0:
            header[124] = 0xFF
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + bytes(10240)

    return make


def gzip_bomb(parts: tuple[bytes, bytes]) -> bytes:
    return gzip.compress(archive.header_of("model_weights.ckpt", 80 << 20) + bytes(80 << 20), 9)


ODD_ARCHIVES: list[tuple[Callable[..., bytes], str]] = [
    (odd_member("../model_config.yaml"), "outside of it"),
    (odd_member("a/../../b"), "outside of it"),
    (odd_member("/etc/passwd"), "outside of it"),
    (odd_member("a\\..\\b"), "outside of it"),
    (odd_member("a\nb"), "outside of it"),
    (odd_member("link", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
    (odd_member("model", tarfile.LNKTYPE, "./model_config.yaml"), "a hard link"),
    (odd_member("null", tarfile.CHRTYPE), "a device"),
    (odd_member("sda", tarfile.BLKTYPE), "a device"),
    (odd_member("pipe", tarfile.FIFOTYPE), "a pipe"),
    (odd_member("x", b"!"), "something unknown"),
    (odd_member("x", tarfile.GNUTYPE_LONGNAME, content=b"../../x\0"), "a renaming header"),
    (odd_member("x", tarfile.GNUTYPE_SPARSE), "a sparse file"),
    (odd_member("x", tarfile.DIRTYPE, content=b"x" * 600), "a folder with content of its own"),
    (odd_member("model_config.yaml"), "'model_config.yaml' twice"),
    (odd_member("././/model_weights.ckpt"), "'model_weights.ckpt' twice"),
    (odd_member("n" * 300), "changes 'path' of a member"),
    (with_pax(path="../x"), "changes 'path'"),
    (with_pax(size="99999999999"), "changes 'size'"),
    (with_pax(linkpath="/x"), "changes 'linkpath'"),
    (with_pax(**{"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000000000"}), "changes 'GNU.sparse"),
    (with_pax(comment="x" * (1 << 17)), "PAX header"),
    (global_pax, "a global PAX header"),
    (crowded, "more than 256 members"),
    (claiming(1 << 60), "claims more bytes than there are"),
    (claiming(-512), "claims more bytes than there are"),
    (gzip_bomb, "grows beyond"),
    (lambda parts: gzip.compress(b"x" * 1000)[:-20], "compression is damaged"),
    (lambda parts: odd_member("a")(parts) + b"more", "has data behind its end"),
    (lambda parts: odd_member("a")(parts)[:-12_000], "cut off"),
    (lambda parts: archive.header_of("model_config.yaml", 0), "its end is missing"),
    (lambda parts: b"<html>not found</html>" * 100, "not a tar file"),
    (lambda parts: b"", "not a tar file"),
    (lambda parts: parts[1], "not a tar file"),
    (lambda parts: bytes(10240), "holds no model_config.yaml"),
]


@pytest.mark.parametrize(("make", "message"), ODD_ARCHIVES, ids=[message for _, message in ODD_ARCHIVES])
def test_odd_archives_are_refused_whole(
    make: Callable[..., bytes], message: str, parts: tuple[bytes, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "odd.nemo"
    path.write_bytes(make(parts))
    assert message in refusal(path)


def test_a_folder_or_a_pipe_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "folder.nemo").mkdir()
    os.mkfifo(tmp_path / "pipe.nemo")
    for name in ("folder.nemo", "pipe.nemo", "gone.nemo"):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"its name must end with \.ckpt, \.nemo"):
        load_checkpoint(tmp_path / "model.bin")


# ---- weights that are refused ----------------------------------------------------------------------------------


class Runs:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch hacked",)


class Takes:
    """Memory without end, by a function that PyTorch's own safe loader lets pass."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return bytearray, (1 << 45,)


def rezipped(weights: bytes, change: Callable[[dict[str, bytes]], None], **options: Any) -> bytes:
    with zipfile.ZipFile(io.BytesIO(weights)) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as new:
        for name, data in entries.items():
            new.writestr(name, data)
    return buffer.getvalue()


def legacy_tar(state: State) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(data := pickle.dumps({}))
        tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def numel_lie(state: State) -> bytes:
    """A table that claims a larger storage than its record."""

    def change(entries: dict[str, bytes]) -> None:
        table = entries["archive/data.pkl"]
        entries["archive/data.pkl"] = table.replace(struct.pack("<BH", 0x4D, 400), struct.pack("<BH", 0x4D, 60_000), 1)

    return rezipped(saved(state), change)


def with_value(name: str, value: Any) -> Callable[[State], bytes]:
    return lambda state: saved({**state, name: value})


def without(name: str) -> Callable[[State], bytes]:
    return lambda state: saved({key: value for key, value in state.items() if key != name})


BIAS = "decoder.decoder_layers.0.bias"
ODD_WEIGHTS: list[tuple[Callable[[State], bytes], str]] = [
    (with_value(BIAS, Runs()), "name code to call ('posix system')"),
    (lambda state: saved(Runs()), "name code to call ('posix system')"),
    (with_value(BIAS, Takes()), "name code to call ('__builtin__ bytearray')"),
    (lambda state: saved(state, _use_new_zipfile_serialization=False), "not in PyTorch's zip format"),
    (lambda state: pickle.dumps(state), "not in PyTorch's zip format"),
    (legacy_tar, "not in PyTorch's zip format"),
    (lambda state: saved(state)[:-1000], "they are cut off"),
    (lambda state: saved(state) + saved(state)[:-1], "they are cut off, or more data follows their end"),
    (numel_lie, "cannot be read"),
    (lambda state: rezipped(saved(state), lambda e: e.update({"a/code/x": b""})), "does not write: 'a/code/x'"),
    (lambda state: rezipped(saved(state), lambda e: e.update({"../../x": b""})), "does not write: '../../x'"),
    (lambda state: rezipped(saved(state), lambda e: None, compression=zipfile.ZIP_DEFLATED), "does not write"),
    (lambda state: rezipped(saved(state), lambda e: e.pop("archive/data.pkl")), "must have one table of tensors"),
    (lambda state: saved([1, 2]), "not a table of tensors but a list"),
    (with_value(BIAS, [1.0]), f"'{BIAS}' among the weights is not an ordinary tensor"),
    (with_value(BIAS, torch.eye(4).to_sparse()), "name code to call"),
    (with_value(BIAS, torch.zeros(32, dtype=torch.int64)), f"{BIAS} is of type torch.int64"),
    (with_value(BIAS, torch.full((32,), float("nan"))), f"{BIAS} holds NaN or infinite values"),
    (with_value(BIAS, torch.full((32,), float("inf"))), f"{BIAS} holds NaN or infinite values"),
    (with_value(BIAS, torch.zeros(31)), f"{BIAS} has the shape [31], the model's has [32]"),
    (with_value(BIAS, torch.zeros(1).expand(1 << 45)), f"{BIAS} has the shape [{1 << 45}]"),
    (with_value("encoder.extra", torch.zeros(1)), "holds, and the model lacks, encoder.extra"),
    (without(BIAS), f"lacks {BIAS}"),
    (without("preprocessor.featurizer.fb"), "lacks preprocessor.featurizer.fb"),
    (lambda state: b"PK\x03\x04" + bytes(10_000_000), "more than the"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), ODD_WEIGHTS, ids=[message for _, message in ODD_WEIGHTS])
def test_odd_weights_are_refused(
    make: Callable[[State], bytes],
    message: str,
    model: tuple[DictConfig, State],
    parts: tuple[bytes, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(packed(tmp_path / "odd.nemo", (parts[0], make(dict(model[1])))))
    assert [entry.name for entry in tmp_path.iterdir()] == ["odd.nemo"]


# ---- configurations that are refused ---------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[bytes], bytes]:
    """The configuration with values set at dotted keys (`__` for the dot)."""

    def make(text: bytes) -> bytes:
        config = OmegaConf.create(yaml.safe_load(text))
        for key, value in changes.items():
            OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
        return OmegaConf.to_yaml(config).encode()

    return make


def appended(more: str) -> Callable[[bytes], bytes]:
    return lambda text: text + more.encode()


ALIAS_BOMB = "a: &a [x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)
)
ODD_CONFIGS: list[tuple[Callable[[bytes], bytes], str]] = [
    (changed(encoder___target_="os.system"), "names code to call, at encoder._target_: 'os.system'"),
    (changed(encoder___target_="nestcli.checkpoint.logging.os.system"), "names code to call"),
    (changed(encoder___target_="nemo.collections.asr.modules.MultiSoftmaxDecoder"), "is not a supported class"),
    (changed(quantizer__extra={"_target_": "builtins.eval"}), "names code to call"),
    (changed(test_ds={"list": [[{"_target_": "builtins.eval"}]]}), "names code to call, at test_ds.list.0.0"),
    (changed(optim={"_target_": ["os.system"]}), "names code to call"),
    (changed(encoder___instantiator="x"), "names code to call"),
    (changed(trainer={"_class_path": "x"}), "names code to call"),
    (appended("home: ${oc.env:HOME}\n"), "calls a resolver"),
    (appended("list: ['${oc.env:HOME}']\n"), "calls a resolver"),
    (appended("x: ${encoder.d_model}\n"), "refers to another key"),
    (appended("'${oc.env:HOME}': 1\n"), "calls a resolver"),
    (appended(ALIAS_BOMB), "an anchor, alias or tag"),
    (appended("a: &a {b: *a}\n"), "an anchor, alias or tag"),
    (appended("a: !!python/object/apply:os.system [ls]\n"), "an anchor, alias or tag"),
    (appended("a: !!python/object/apply:pathlib.Path [x]\n"), "an anchor, alias or tag"),
    (appended("a: " + "[" * 1000 + "]" * 1000 + "\n"), "too deep"),
    (appended("".join(f"{number}: 1\n" for number in range(21_000))), "too many keys"),
    (appended("".join(f"k{number}: 1\n" for number in range(1_000_000))), "more than 262,144"),
    (appended("7: 1\n"), "has the key 7"),
    (appended("a: 1\na: 2\n"), "is not YAML"),
    (lambda text: b"a: [", "is not YAML"),
    (lambda text: b"\xff\xfe", "is not YAML"),
    (lambda text: b"- 1\n- 2\n", "must be a mapping of keys"),
    (lambda text: b"{}", "has no block preprocessor"),
    (changed(target="nemo.collections.asr.models.EncDecCTCModel"), "not a NEST"),
    (changed(target="subprocess.Popen"), "not a NEST"),
    (changed(target=["x"]), "not a NEST"),
    (changed(mask_position="post_conv"), "mask_position is 'post_conv'"),
    (changed(encoder__n_layers=10**9), "model.encoder.n_layers is 1,000,000,000, more than the"),
    (changed(encoder__d_model=10**12), "model.encoder.d_model is"),
    (changed(preprocessor__n_fft=10**9), "model.preprocessor.n_fft is"),
    (changed(preprocessor__features=10**9), "model.preprocessor.features is"),
    (changed(encoder__d_model=-16), "model.encoder.d_model"),
    (changed(encoder__d_model="16; rm"), "model.encoder.d_model: '16; rm' is not of type int"),
    (changed(encoder__n_heads=0), "model.encoder.n_heads"),
    (changed(encoder=None), "has no block encoder"),
    (changed(nestcli={"encoder": {"future": 1}}), "nestcli.encoder.future is unknown to this version"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), ODD_CONFIGS, ids=[message for _, message in ODD_CONFIGS])
def test_odd_configurations_are_refused(
    make: Callable[[bytes], bytes], message: str, parts: tuple[bytes, bytes], tmp_path: Path
) -> None:
    assert message in refusal(packed(tmp_path / "odd.nemo", (make(parts[0]), parts[1])))


# ---- archives of older versions --------------------------------------------------------------------------------


def old_content(text: bytes) -> dict[str, Any]:
    """A configuration as NeMo 1.23 to 2.x might have stored it: keys that came later missing, keys that went there."""
    content = copy.deepcopy(yaml.safe_load(text))
    for gone in (
        "encoder.use_bias", "encoder.stochastic_depth_mode", "encoder.att_context_size", "encoder.conv_context_size",
        "quantizer.freeze", "decoder.use_bias", "loss.mask_threshold", "preprocessor.pad_value", "preprocessor.n_fft",
    ):  # fmt: skip
        block, key = gone.split(".")
        del content[block][key]
    content["encoder"] |= {
        "reduction": None, "reduction_position": None, "reduction_factor": 1, "global_tokens": 0,
        "global_tokens_spacing": 1, "global_attn_separate": False, "sync_max_audio_length": True,
        "subsampling_conv_chunking_factor": 1, "something_of_long_ago": None,
    }  # fmt: skip
    content["preprocessor"] |= {"mel_norm": "slaney", "nb_max_freq": 4000, "stft_conv": False, "highfreq": None}
    content["decoder"]["init_mode"] = "xavier_uniform"
    content["masking"]["max_mask_ratio"] = 0.8
    content["train_ds"] |= {"perturb_speed": True, "defer_setup": True}
    content["validation_ds"] = None
    content["nemo_version"] = "2.0.0rc1"
    content["test_ds"] = None
    del content["spec_augment"], content["num_classes"]
    return content


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("target", ["EncDecMaskedTokenPredModel", "EncDecDenoiseMaskedTokenPredModel", None])
def test_archives_of_older_versions_are_read(
    wrapped: bool, target: str | None, model: tuple[DictConfig, State], parts: tuple[bytes, bytes], tmp_path: Path
) -> None:
    content = old_content(parts[0])
    content["target"] = f"nemo.collections.asr.models.ssl_models.{target}" if target else None
    text = yaml.safe_dump({"model": content, "trainer": {"devices": 8}} if wrapped else content).encode()
    state = {name: value for name, value in model[1].items() if name != BIAS}
    config, weights = read_nemo(packed(tmp_path / "old.nemo", (text, saved(state)), mode="w:gz"))
    assert config.model.encoder.use_bias is True
    assert config.model.decoder.use_bias is False
    assert list(config.model.encoder.att_context_size) == [-1, -1]
    assert config.model.preprocessor.n_fft == 512
    assert config.model.num_classes == 32
    assert config.model.masking.get("max_mask_ratio") is None
    assert config.model.train_ds.get("perturb_speed") is None
    assert config.trainer.devices == -1
    NestModel(NestConfig.from_config(config)).load_state_dict(weights, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__reduction": "pooling"}, "encoder.reduction: 'pooling' has no counterpart here"),
        ({"encoder__global_tokens": 2}, "encoder.global_tokens: '2' has no counterpart"),
        ({"preprocessor__mel_norm": None}, "preprocessor.mel_norm: 'None' has no counterpart"),
        ({"preprocessor__preemph": None}, "preprocessor.preemph: 'None' has no counterpart"),
        ({"preprocessor__preemph": 0.9}, "preprocessor.preemph: '0.9' has no counterpart"),
        ({"encoder__novelty": 3}, "encoder.novelty: '3' has no counterpart"),
        ({"novelty": {"a": 1}}, "novelty: "),
        ({"encoder__att_context_size": [[-1, -1], [70, 1]]}, "encoder.att_context_size has 2 sizes"),
        ({"encoder__subsampling": "striding"}, "model.encoder.subsampling: 'striding' is not supported"),
    ],
)
def test_settings_without_a_counterpart_are_named(
    changes: dict[str, Any], message: str, parts: tuple[bytes, bytes], tmp_path: Path
) -> None:
    assert message in refusal(packed(tmp_path / "a.nemo", (changed(**changes)(parts[0]), parts[1])))


def test_a_missing_size_is_named(parts: tuple[bytes, bytes], tmp_path: Path) -> None:
    content = yaml.safe_load(parts[0])
    del content["encoder"]["d_model"]
    text = yaml.safe_dump(content).encode()
    assert "encoder.d_model is missing" in refusal(packed(tmp_path / "a.nemo", (text, parts[1])))


def test_the_configuration_can_be_read_alone(parts: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = pack(tmp_path / "a.nemo", ("model_config.yaml", parts[0]))
    assert read_nemo_config(path, ["model.encoder.n_layers=3"]).model.encoder.n_layers == 3
    assert "holds no model_weights.ckpt" in refusal(path)
