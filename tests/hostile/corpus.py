"""Malicious and broken inputs, made on the spot: `python tests/hostile/corpus.py FOLDER` writes them all.

Inputs that would run code touch the file `CANARY` beside them. Inputs that would read outside their
folder name `SECRET`.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
import yaml

CANARY, SECRET = "canary", "secret.wav"


@dataclass(frozen=True)
class Case:
    """One hostile input: the words of the call (`{path}`, `{out}`, `{good}` are filled in), and the expected message.

    `rejects` is the reason in its rejection row if the call may continue without it; None means exit code 2.
    """

    name: str
    path: Path
    words: tuple[str, ...]
    rejects: str | None = None
    harmless: bool = False  # the call succeeds, and nothing else happens


class Runs:
    """Unpickling this runs a command."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def make(folder: Path) -> list[Case]:
    """Write every input below `folder`; the cases in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    tone(folder / SECRET, seed=99)
    tone(folder / "good" / "a.wav", seed=0)
    from hostile.bombs import bombs

    cases = [*checkpoints(folder), *configurations(folder), *manifests(folder), *audio(folder), *shards(folder)]
    cases += bombs(folder)
    assert len({case.name for case in cases}) == len(cases)
    return cases


def tone(path: Path, seconds: float = 1.5, seed: int = 0, rate: int = 16000, channels: int = 1, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels))
    sf.write(path, samples, rate, **how)
    return path


# ---- checkpoints -----------------------------------------------------------------------------------------------


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def tarred(*members: tuple[Any, ...], mode: str = "w", **options: Any) -> bytes:
    """A tar of (name, content[, type, link target])."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as tar:
        for name, content, *rest in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = rest[0] if rest else tarfile.REGTYPE
            info.linkname = rest[1] if len(rest) > 1 else ""
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def huge_member(name: str, size: int) -> bytes:
    """A header that claims `size` bytes, and none of them."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def safetensors(header: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def checkpoints(folder: Path) -> Iterator[Case]:
    canary = f"touch {folder / CANARY}"
    text, state = good_model()
    weights = saved(state)
    config = yaml.safe_load(text)
    bias = "decoder.decoder_layers.0.bias"

    def nemo(text: bytes = text, weights: bytes = weights, *more: tuple[Any, ...]) -> bytes:
        return tarred(("./model_config.yaml", text), ("./model_weights.ckpt", weights), *more)

    def config_with(**changes: Any) -> bytes:
        return nemo(yaml.safe_dump({**config, **changes}).encode())

    def weights_with(value: Any) -> bytes:
        return nemo(weights=saved({**state, bias: value}))

    def lightning(**changes: Any) -> bytes:
        return saved({"state_dict": state, "pytorch-lightning_version": "2.6.6", **changes})

    def zipped(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO(weights)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(name, content)
        return buffer.getvalue()

    entry = {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}
    files: dict[str, bytes] = {
        # pickles
        "nemo-pickle-system.nemo": weights_with(Runs(os.system, canary)),
        "nemo-pickle-eval.nemo": nemo(weights=saved(Runs(eval, f"__import__('os').system({canary!r})"))),
        "nemo-pickle-exec-legacy.nemo": nemo(
            weights=saved(Runs(exec, f"import os; os.system({canary!r})"), _use_new_zipfile_serialization=False)
        ),
        "nemo-plain-pickle.nemo": nemo(weights=pickle.dumps(Runs(os.system, canary))),
        "nemo-pickle-memory.nemo": weights_with(Runs(bytearray, 1 << 45)),
        "nemo-weights-expanded.nemo": weights_with(torch.zeros(1).expand(1 << 45)),
        "nemo-weights-code-entry.nemo": nemo(weights=zipped("archive/code/__torch__.py", b"import os")),
        "nemo-weights-climbing-entry.nemo": nemo(weights=zipped("../../evil", b"x")),
        "nemo-weights-nan.nemo": weights_with(torch.full_like(state[bias], torch.nan)),
        "ckpt-pickle-system.ckpt": lightning(hyper_parameters=Runs(os.system, canary)),
        "ckpt-pickle-getattr.ckpt": lightning(callbacks=Runs(getattr, Path, "unlink")),
        "ckpt-instantiator.ckpt": lightning(hyper_parameters={"_instantiator": "os.system", "cfg": config}),
        "ckpt-plain-pickle.ckpt": pickle.dumps(Runs(os.system, canary)),
        "ckpt-legacy.ckpt": saved({"state_dict": Runs(os.system, canary)}, _use_new_zipfile_serialization=False),
        "ckpt-half.ckpt": lightning()[: len(weights) // 2],
        "ckpt-zip-of-zeros.ckpt": b"PK\x03\x04" + bytes(1 << 20),
        # archives
        "nemo-climbing.nemo": nemo(text, weights, ("../../evil.txt", b"x")),
        "nemo-absolute.nemo": nemo(text, weights, (str(folder / CANARY), b"x")),
        "nemo-symlink.nemo": nemo(text, weights, ("l", b"", tarfile.SYMTYPE, "/etc")),
        "nemo-hardlink.nemo": nemo(text, weights, ("l", b"", tarfile.LNKTYPE, "/etc/passwd")),
        "nemo-device.nemo": nemo(text, weights, ("zero", b"", tarfile.CHRTYPE)),
        "nemo-fifo.nemo": nemo(text, weights, ("pipe", b"", tarfile.FIFOTYPE)),
        "nemo-duplicate.nemo": nemo(text, weights, ("model_config.yaml", text)),
        "nemo-renamed.nemo": tarred(("x" * 200, text), mode="w", format=tarfile.GNU_FORMAT),
        "nemo-sparse-giant.nemo": nemo(text, weights, ("s", b"", tarfile.GNUTYPE_SPARSE)),
        "nemo-claims-exabytes.nemo": huge_member("model_config.yaml", 1 << 60) + bytes(10240),
        "nemo-many-members.nemo": tarred(*((f"{number}", b"") for number in range(5000))),
        "nemo-gzip-bomb.nemo": gzip.compress(tarred(("model_weights.ckpt", bytes(100 << 20))), 9),
        "nemo-half.nemo": nemo()[:5000],
        "nemo-html.nemo": b"<html>404 not found</html>" * 50,
        "nemo-empty.nemo": b"",
        # the configuration inside
        "nemo-target.nemo": config_with(encoder={**config["encoder"], "_target_": "os.system"}),
        "nemo-target-disguised.nemo": config_with(test_ds={"x": [[{"_target_": "logging.os.system"}]]}),
        "nemo-target-partial.nemo": config_with(optim={"_partial_": True, "_target_": "builtins.eval"}),
        "nemo-class-path.nemo": config_with(trainer={"class_path": "os.system"}),
        "nemo-resolver.nemo": config_with(sample="${oc.env:HOME}"),
        "nemo-yaml-tag.nemo": nemo(text + f"\nx: !!python/object/apply:os.system ['{canary}']\n".encode()),
        "nemo-alias-bomb.nemo": nemo(text + b"\n" + alias_bomb()),
        "nemo-layers.nemo": config_with(encoder={**config["encoder"], "n_layers": 10**9}),
        "nemo-width.nemo": config_with(encoder={**config["encoder"], "d_model": 1 << 40}),
        "nemo-deep.nemo": nemo(text + b"\nx: " + b"[" * 5000 + b"]" * 5000),
        "nemo-million-keys.nemo": nemo(text + b"\n" + b"".join(b"k%d: 1\n" % number for number in range(100_000))),
        # safetensors
        "st-header-giant.safetensors": safetensors(b"{}", length=1 << 62),
        "st-overlap.safetensors": safetensors({"a": entry, "b": entry}, bytes(1 << 22)),
        "st-hole.safetensors": safetensors({"a": {**entry, "data_offsets": [8, 8 + (1 << 22)]}}, bytes(8 + (1 << 22))),
        "st-size-lie.safetensors": safetensors({"a": {**entry, "shape": [1 << 40]}}, bytes(1 << 22)),
        "st-config-target.safetensors": safetensors(
            {"__metadata__": {"nest_config": json.dumps({"model": {"encoder": {"_target_": "os.system"}}})}}
        ),
        "st-half.safetensors": safetensors({"a": entry}, bytes(100)),
    }
    for name, content in files.items():
        path = folder / "checkpoints" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        yield Case(name, path, ("export", "{path}", "--to", "safetensors", "--out", "{out}/made.safetensors"))


def good_model() -> tuple[bytes, dict[str, torch.Tensor]]:
    """The configuration as YAML, and the weights, that a tiny .nemo of ours holds."""
    from nestcli.checkpoint.nemo_config import to_nemo, yaml_of
    from nestcli.config import load_config
    from nestcli.model.config import NestConfig
    from nestcli.model.nest import NestModel

    words = ["d_model=16", "n_heads=2", "n_layers=1", "subsampling_conv_channels=8"]
    config = load_config("small", [*(f"model.encoder.{word}" for word in words), "model.num_classes=32"])
    return yaml_of(to_nemo(config)), NestModel(NestConfig.from_config(config)).state_dict()


def alias_bomb(levels: int = 24) -> bytes:
    names = [f"b{number}" for number in range(levels)]
    lines = [f"{names[0]}: &{names[0]} [x, x]"]
    lines += [f"{new}: &{new} [*{old}, *{old}]" for old, new in itertools.pairwise(names)]
    return "\n".join(lines).encode()


# ---- configurations --------------------------------------------------------------------------------------------


def configurations(folder: Path) -> Iterator[Case]:
    base = "base: small\n"
    pairs = (f"  k{number}: '${{exp_manager.k{number + 1}}}${{exp_manager.k{number + 1}}}'\n" for number in range(40))
    texts: dict[str, str | bytes] = {
        "target-system.yaml": base + "model:\n  encoder:\n    _target_: os.system\n",
        "target-eval.yaml": base + "model:\n  train_ds:\n    batch_augmentor:\n      _target_: builtins.eval\n",
        "target-elsewhere.yaml": base + "trainer:\n  _target_: subprocess.Popen\n  args: [touch, x]\n",
        "target-nested.yaml": base + "model:\n  optim:\n    sched:\n      _target_: os.system\n",
        "resolver-env.yaml": base + "name: ${oc.env:HOME}\n",
        "resolver-decode.yaml": base + "name: ${oc.decode:'[1,2]'}\n",
        "resolver-nested.yaml": base + "name: ${${name}}\n",
        "interpolation-circle.yaml": base + "name: ${exp_manager.name}\n",
        "interpolation-bomb.yaml": base + "exp_manager:\n" + "".join(pairs) + "  k40: x\n",
        "interpolation-bomb-known.yaml": f"{base}name: '{'${exp_manager.name}' * 200}'\nexp_manager:\n"
        f"  name: '{'${exp_manager.exp_dir}' * 200}'\n  exp_dir: '{'${exp_manager.wandb_logger_kwargs.name}' * 200}'\n",
        "yaml-tag.yaml": base + f"name: !!python/object/apply:os.system ['touch {folder / CANARY}']\n",
        "yaml-tag-new.yaml": base + "name: !!python/object/new:os.system [ls]\n",
        "yaml-alias-bomb.yaml": base.encode() + alias_bomb(),
        "yaml-recursion.yaml": base + "name: &a [*a]\n",
        "yaml-deep.yaml": base + "name: " + "[" * 20_000 + "]" * 20_000,
        "yaml-duplicate.yaml": base + "name: a\nname: b\n",
        "yaml-many-keys.yaml": base + "".join(f"k{number}: 1\n" for number in range(100_000)),
        "yaml-bytes.yaml": b"base: small\nname: \xff\xfe\x00",
        "yaml-nul.yaml": b"\x00" * 1000,
        "yaml-huge.yaml": b"# " + b"x" * (1 << 22),
        "yaml-list.yaml": "- 1\n- 2\n",
        "base-climbing.yaml": "base: ../../../etc/passwd\n",
    }
    for name, text in texts.items():
        path = folder / "configurations" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        yield Case(name, path, ("count-params", "{path}"))


# ---- manifests -------------------------------------------------------------------------------------------------


def manifests(folder: Path) -> Iterator[Case]:
    good = json.dumps({"audio_filepath": str(folder / "good" / "a.wav"), "duration": 1.5})
    cut = {"id": "x", "type": "MonoCut", "start": 0, "duration": 1.5, "channel": 0}

    def recording(kind: str, source: str) -> str:
        sources = [{"type": kind, "channels": [0], "source": source}]
        return json.dumps({**cut, "recording": {"id": "r", "sources": sources, "sampling_rate": 16000}})

    def line(**changes: Any) -> str:
        return json.dumps({"audio_filepath": str(folder / "good" / "a.wav"), "duration": 1.5, **changes})

    touch = f"touch {folder / CANARY}"
    texts: dict[str, str | bytes] = {
        "giant-number.json": '{"audio_filepath": "a.wav", "duration": 1' + "0" * 5000 + "}",
        "duplicate-key.json": '{"audio_filepath": "a.wav", "audio_filepath": "b.wav", "duration": 1.5}',
        "duplicate-key-escaped.json": '{"audio_filepath": "a.wav", "\\u0061udio_filepath": "b.wav", "duration": 1.5}',
        "half-a-line.json": good + "\n" + good[:-20],
        "not-utf8.json": good.encode() + b'\n{"audio_filepath": "\xff\xfe", "duration": 1.5}\n',
        "deep.json": '{"audio_filepath": ' + "[" * 200_000 + "]" * 200_000 + "}",
        "no-json.json": "<html>\n",
        "numbers.json": "1\n2\n",
        "empty.json": "",
        "long-line.json": b"GIANT",
        "gzip-bomb.json.gz": gzip.compress((good + "\n").encode() * 600_000, 9),
        "gzip-broken.json.gz": gzip.compress((good + "\n").encode() * 100)[:-30],
    }
    for name, text in texts.items():
        path = folder / "manifests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if text == b"GIANT":
            os.truncate(path, 1 << 30)  # zeros without a newline; takes no room on the disk
        yield Case(name, path, ("prepare-data", "{path}", "--out", "{out}", "--jobs", "1"))
    lines = {  # each costs itself, and the good line after it is kept
        "pipe.json": line(audio_filepath=f"pipe:{touch}"),
        "pipe-after.json": line(audio_filepath=f"{touch} |"),
        "pipe-before.json": line(audio_filepath=f"| {touch}"),
        "chained-address.json": line(audio_filepath="s3://bucket/x::file:///etc/passwd"),
        "password.json": line(audio_filepath="http://user:word@host/x.wav"),
        "nul.json": line(audio_filepath="a\0b.wav"),
        "list-of-files.json": line(audio_filepath=["a.wav", "b.wav"]),
        "nan.json": '{"audio_filepath": "a.wav", "duration": NaN}',
        "infinite.json": '{"audio_filepath": "a.wav", "duration": Infinity}',
        "1e308.json": '{"audio_filepath": "a.wav", "duration": 1e308}',
        "negative-duration.json": line(duration=-1.0),
        "negative-offset.json": line(offset=-5.0),
        "duration-text.json": line(duration="1.5"),
        "cut-command.jsonl.gz": recording("command", touch),
        "cut-memory.jsonl.gz": recording("memory", "UklGRg=="),
        "cut-memory-raw.jsonl": recording("memory_raw", pickle.dumps(Runs(os.system, touch)).hex()),
        "cut-pipe.jsonl": recording("file", f"{touch} |"),
        "cut-transform.jsonl": json.dumps({
            **cut, "recording": {"id": "r", "transforms": [{"name": "os.system", "kwargs": {}}],
                                 "sources": [{"type": "file", "channels": [0], "source": "a.wav"}]},
        }),
    }  # fmt: skip
    for name, text in lines.items():
        path, content = folder / "manifests" / name, f"{text}\n{good}\n".encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        yield Case(name, path, ("prepare-data", "{path}", "--out", "{out}", "--jobs", "1"), "unsupported_line")
    # files that exist but must not be read, and files outside of the jail
    rejected = {
        "device.json": ("/dev/zero", "not_a_file"),
        "proc.json": ("/proc/self/mem", "empty"),
        "folder.json": (str(folder), "not_a_file"),
        "passwd.json": ("/etc/passwd", "unreadable"),
        "file-address.json": ("file:///etc/passwd", "unreadable"),
    }
    for name, (named, reason) in rejected.items():
        path = folder / "manifests" / name
        path.write_text(line(audio_filepath=named) + "\n" + good + "\n")
        yield Case(name, path, ("prepare-data", "{path}", "--out", "{out}", "--jobs", "1"), reason)
    link = folder / "good" / "link.wav"
    if not link.is_symlink():
        link.symlink_to(folder / SECRET)
    for name, named in {
        "jail-absolute.json": str(folder / SECRET),
        "jail-address.json": f"file://{folder}/good/%2e%2e/{SECRET}",
        "jail-climbing.json": f"../good/../{SECRET}",
        "jail-link.json": str(link),
    }.items():
        path = folder / "manifests" / name
        path.write_text(line(audio_filepath=named) + "\n" + good + "\n")
        words = ("prepare-data", "{path}", "--out", "{out}", "--jobs", "1", "--jail", "{good}")
        yield Case(name, path, words, "outside_jail")


# ---- audio -----------------------------------------------------------------------------------------------------


def audio(folder: Path) -> Iterator[Case]:
    where = folder / "audio"
    whole = {ending: tone(where / f"whole.{ending}", seed=5).read_bytes() for ending in ("wav", "flac", "mp3", "ogg")}
    flac_giant = bytearray(whole["flac"])
    flac_giant[21] |= 0x0F  # 36 bits of samples
    flac_giant[22:26] = b"\xff\xff\xff\xff"
    wav_rate = {rate: bytearray(whole["wav"]) for rate in (1, 10_000_000, 2**31 - 1)}
    for rate, content in wav_rate.items():
        content[24:28] = rate.to_bytes(4, "little")
    wav_data = bytearray(whole["wav"])
    wav_data[40:44] = (1 << 30).to_bytes(4, "little")
    nan = where / "nan.wav"
    sf.write(nan, np.full(24000, np.nan, np.float32), 16000, subtype="FLOAT")
    files: dict[str, tuple[bytes, str]] = {
        "empty.wav": (b"", "empty"),
        "header-only.wav": (whole["wav"][:44], "truncated"),
        "half.wav": (whole["wav"][: len(whole["wav"]) // 2], "truncated"),
        "half.flac": (whole["flac"][: len(whole["flac"]) // 2], "truncated"),
        "half.mp3": (whole["mp3"][: len(whole["mp3"]) // 2], "truncated"),
        "half.ogg": (whole["ogg"][: len(whole["ogg"]) // 2], "truncated"),
        "ten-bytes.wav": (whole["wav"][:10], "unreadable"),
        "ten-bytes.ogg": (whole["ogg"][:10], "unreadable"),
        "claims-2-to-the-36.flac": (bytes(flac_giant), "truncated"),
        "claims-a-gigabyte.wav": (bytes(wav_data), "truncated"),
        "1-hz.wav": (bytes(wav_rate[1]), "bad_rate"),
        "10-mhz.wav": (bytes(wav_rate[10_000_000]), "bad_rate"),
        "2-to-the-31-hz.wav": (bytes(wav_rate[2**31 - 1]), "bad_rate"),
        "64-channels.wav": (tone(where / "c.wav", 0.2, channels=64).read_bytes(), "too_many_channels"),
        "not-finite.wav": (nan.read_bytes(), "not_finite"),
        "silence.wav": (silence(where / "s.wav"), "silent"),
        "html.wav": (b"<!DOCTYPE html><html><body>403</body></html>" * 20, "unreadable"),
        "pickle.wav": (pickle.dumps(Runs(os.system, f"touch {folder / CANARY}")), "unreadable"),
        "playlist.wav": (b"[playlist]\nFile1=/etc/passwd\n", "unreadable"),
        "elf.wav": (Path(sys.executable).resolve().read_bytes()[:100_000], "unreadable"),
        "-rf $(touch x);.wav": (b"RIFFxxxxWAVE" + bytes(1000), "unreadable"),
        "damaged-middle.flac": (whole["flac"][:8000] + bytes(8000) + whole["flac"][16000:], "unreadable"),
    }
    for name, (content, reason) in files.items():
        path = where / Path(name).stem.replace("$", "") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        yield Case(name, path, ("prepare-data", "{path}", "{good}/a.wav", "--out", "{out}", "--jobs", "1"), reason)


def silence(path: Path) -> bytes:
    sf.write(path, np.zeros(24000), 16000)
    return path.read_bytes()


# ---- shards ----------------------------------------------------------------------------------------------------


def shards(folder: Path) -> Iterator[Case]:
    wav = tone(folder / "good" / "b.wav", seed=7).read_bytes()
    where = folder / "shards"
    where.mkdir(exist_ok=True)
    manifest = where / "manifest.json"
    manifest.write_text(json.dumps({"audio_filepath": "b.wav", "duration": 1.5, "shard_id": 0}) + "\n")
    pickled = pickle.dumps(Runs(os.system, f"touch {folder / CANARY}"))
    tars: dict[str, bytes] = {
        "pickles.tar": tarred(("b.pkl", pickled), ("b.pyd", pickled), ("b.pt", saved(Runs(os.system, "true")))),
        "pickle-as-wav.tar": tarred(("b.wav", pickled)),
        "climbing.tar": tarred(("../../b.wav", wav), ("/etc/b.wav", wav)),
        "symlink.tar": tarred(("b.wav", b"", tarfile.SYMTYPE, str(folder / SECRET))),
        "device.tar": tarred(("b.wav", b"", tarfile.CHRTYPE)),
        "sparse.tar": tarred(("b.wav", b"", tarfile.GNUTYPE_SPARSE)),
        "exabytes.tar": huge_member("b.wav", 1 << 60) + bytes(1024),
        "compressed.tar": gzip.compress(tarred(("b.wav", wav))),
        "bomb.tar": gzip.compress(bytes(50 << 20)),
        "half.tar": tarred(("b.wav", wav))[:5000],
        "html.tar": b"<html>" * 500,
        "empty.tar": b"",
    }
    for name, content in tars.items():
        path = where / name.removesuffix(".tar") / "audio_0.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        block = "model.train_ds"
        words = (f"{block}.manifest_filepath={manifest}", f"{block}.is_tarred=true", "model.optim.sched.warmup_steps=2",
                 f"{block}.tarred_audio_filepaths={{path}}", f"{block}.noise_manifest=null", f"{block}.num_workers=0",
                 "model.validation_ds.manifest_filepath=null", f"{block}.batch_size=1", "trainer.accelerator=cpu",
                 "exp_manager.exp_dir={out}", "model.encoder.d_model=16", "model.encoder.n_layers=1")  # fmt: skip
        # names in a shard are names: nothing is written under them
        yield Case(f"shard-{name}", path, ("pretrain", "demo", *words, "--dry-run"), harmless=name == "climbing.tar")


if __name__ == "__main__":
    for each in make(Path(sys.argv[1]).absolute()):
        print(each.path, *each.words, sep="\t")
