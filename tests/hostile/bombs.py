"""More of the corpus: inputs that are small on disk but would use up time or memory, or wait for ever."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch

from hostile.corpus import Case, good_model, saved, tarred, tone

GIB = 1 << 30


def bombs(folder: Path) -> list[Case]:
    where = folder / "bombs"
    where.mkdir(exist_ok=True)
    made = (checkpoints, configurations, data_sets, manifests, audio)
    return [case for make in made for case in make(where, folder / "good" / "a.wav")]


def export_of(path: Path) -> Case:
    return Case(path.name, path, ("export", "{path}", "--to", "safetensors", "--out", "{out}/made.safetensors"))


def holes(path: Path, size: int, head: bytes = b"") -> Path:
    """Write a sparse file of `size` bytes; only its head takes disk space."""
    path.write_bytes(head)
    os.truncate(path, size)
    return path


def fifo(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


# ---- checkpoints -----------------------------------------------------------------------------------------------


def doubling_key(levels: int = 60) -> bytes:
    """Return the pickle of a dict whose key is a tuple of twice a tuple of twice ...: hashing takes 2**levels steps."""
    twice = b"".join(b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) for level in range(levels))
    return b"\x80\x02}(K\x01K\x01\x86q\x00" + twice + b"K\x01u."


def doubling_list(levels: int = 60) -> list[Any]:
    """Return a value that would print 2**levels items; its pickle has a few hundred bytes."""
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def with_table(table: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return PyTorch's zip with its pickle replaced."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(1 << 18)}))) as source,
        zipfile.ZipFile(made, "w") as target,
    ):
        for entry in source.infolist():
            is_table = entry.filename.endswith("data.pkl")
            target.writestr(entry.filename, table if is_table else source.read(entry), compression)
    return made.getvalue()


def checkpoints(where: Path, _: Path) -> Iterator[Case]:
    text, state = good_model()
    deflated = with_table(doubling_key(1), zipfile.ZIP_DEFLATED)
    files: dict[str, bytes] = {
        "key-hash.ckpt": with_table(doubling_key()),
        "key-hash.nemo": tarred(("./model_config.yaml", text), ("./model_weights.ckpt", with_table(doubling_key()))),
        "million-lists.ckpt": with_table(b"\x80\x02(" + b"]" * 5_000_000 + b"l."),
        "target-doubled.ckpt": saved({"state_dict": state, "nest_config": {"_target_": doubling_list()}}),
        "value-doubled.ckpt": saved({"state_dict": state, "nest_config": {"model": doubling_list()}}),
        "hyper-doubled.ckpt": saved({"state_dict": state, "hyper_parameters": {"cfg": {"encoder": doubling_list()}}}),
        "record-deflated.ckpt": deflated,
        "record-deflated.nemo": tarred(("./model_config.yaml", text), ("./model_weights.ckpt", deflated)),
    }
    for name, content in files.items():
        path = where / name
        path.write_bytes(content)
        yield export_of(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [10 * GIB], "data_offsets": [0, 40 * GIB]}}).encode()
    yield export_of(
        holes(where / "holes.safetensors", 8 + len(header) + 40 * GIB, struct.pack("<Q", len(header)) + header)
    )
    yield export_of(holes(where / "holes.ckpt", 1 << 42, b"PK\x03\x04"))
    yield export_of(holes(where / "holes.nemo", 1 << 42, tarred(("./model_config.yaml", text))[:1024]))
    for name in ("pipe.ckpt", "pipe.nemo", "pipe.safetensors"):
        yield export_of(fifo(where / name))
    yield from transformers_folders(where)


def transformers_folders(where: Path) -> Iterator[Case]:
    """Return folders that name code to run, files elsewhere, or more numbers than a configuration has."""
    config: dict[str, Any] = {
        "model_type": "parakeet_encoder",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    remote = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
    contents: dict[str, dict[str, Any]] = {
        "tf-code": {**config, **remote},
        "tf-layers": {**config, "num_hidden_layers": 10**9},
        "tf-many": {**config, "x": [{}] * 400_000},
    }
    for name, content in contents.items():
        folder = where / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(content))
        (folder / "evil.py").write_text(f"open({str(where.parent / 'canary')!r}, 'w')")
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
        yield Case(name, folder, ("export", "{path}", "--to", "onnx", "--out", "{out}/made.onnx"))
    index = where / "tf-index"
    index.mkdir(exist_ok=True)
    (index / "config.json").write_text(json.dumps(config))
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../holes.safetensors"}}))
    yield Case("tf-index", index, ("export", "{path}", "--to", "onnx", "--out", "{out}/made.onnx"))


# ---- configurations --------------------------------------------------------------------------------------------


def configurations(where: Path, _: Path) -> Iterator[Case]:
    sizes = {
        "layers": "encoder: {n_layers: 1000000000}",
        "width": "encoder: {d_model: 1000000000}",
        "window": "preprocessor: {n_fft: 1099511627776}",
        "features": "preprocessor: {features: 1000000000}",
        "block": "masking: {block_size: 100000000000}",
        "codes": "quantizer: {num_classes: 1000000000000}",
        "digits": f"encoder: {{n_layers: {'9' * 4000}}}",
    }
    for name, block in sizes.items():
        path = where / f"size-{name}.yaml"
        path.write_text(f"base: small\nmodel:\n  {block}\n")
        yield Case(path.name, path, ("count-params", "{path}"))
    fifo(where / "pipe.yaml")
    for path in (where / "pipe.yaml", holes(where / "holes.yaml", 1 << 42, b"a: 1\n")):
        yield Case(path.name, path, ("count-params", "{path}"))


# ---- what a configuration names --------------------------------------------------------------------------------


def training(path: Path, *words: str) -> Case:
    """Return a dry run with words such as `input_cfg={path}` for model.train_ds, and `trainer.devices=...`."""
    own = [word if word.startswith(("trainer", "exp_manager", "model")) else f"model.train_ds.{word}" for word in words]
    rest = ("noise_manifest=null", "num_workers=0", "batch_size=1")
    common = ("model.validation_ds.manifest_filepath=null", "trainer.accelerator=cpu", "exp_manager.exp_dir={out}",
              "model.encoder.d_model=16", "model.encoder.n_layers=1", "model.optim.sched.warmup_steps=2")  # fmt: skip
    return Case(
        path.name, path, ("pretrain", "demo", *common, *(f"model.train_ds.{word}" for word in rest), *own, "--dry-run")
    )


def data_sets(where: Path, good: Path) -> Iterator[Case]:
    lhotse = ("use_lhotse=true", "input_cfg={path}")
    inputs: dict[str, str] = {
        "input-itself.yaml": "- {type: group, input_cfg: PATH}\n- {type: group, input_cfg: PATH}\n",
        "input-aliases.yaml": "- &a {type: nemo, manifest_filepath: x.json}\n- *a\n",
        "input-resolver.yaml": "- {type: nemo, manifest_filepath: '${oc.env:HOME}'}\n",
        "input-tag.yaml": "- !!python/object/apply:os.system ['true']\n",
        "input-target.yaml": "- {type: nemo, _target_: os.system, manifest_filepath: x.json}\n",
    }
    for name, text in inputs.items():
        path = where / name
        path.write_text(text.replace("PATH", str(path)))
        yield training(path, *lhotse)
    yield training(fifo(where / "input-pipe.yaml"), *lhotse)
    yield training(holes(where / "input-holes.yaml", 1 << 42, b"- {}\n"), *lhotse)
    manifest = where / "good.json"
    manifest.write_text(json.dumps({"audio_filepath": str(good), "duration": 1.5}) + "\n")
    tarred_words = (f"manifest_filepath={manifest}", "is_tarred=true", "tarred_audio_filepaths={path}")
    yield training(fifo(where / "pipe.tar"), *tarred_words)
    pax = where / "digits.tar"
    size = b"6015 size=" + b"9" * 6004 + b"\n"
    pax.write_bytes(tarred(("x", size, b"x"), ("good.wav", b"RIFF")))
    yield training(pax, *tarred_words)
    ranges = where / "ranges"
    for name, tail in (("ranges", "_OP_0..999999_CL__OP_0..999999_CL_"), ("range-digits", f"_OP_0..{'9' * 5000}_CL_")):
        yield Case(name, ranges, training(ranges, f"manifest_filepath={{path}}{tail}.json").words)


# ---- manifests -------------------------------------------------------------------------------------------------


def manifests(where: Path, good: Path) -> Iterator[Case]:
    prepare = ("prepare-data", "{path}", "--out", "{out}", "--jobs", "1")
    path = holes(where / "terabytes.json", 1 << 42)
    yield Case(path.name, path, prepare)
    for name, segments in (
        ("kaldi-infinite", "s u 0 inf"),
        ("kaldi-far", "s u 1e308 1.1e308"),
        ("kaldi-nan", "s u nan 1"),
    ):
        folder = kaldi(where / name, good)
        (folder / "segments").write_text(f"{segments}\n")
        yield Case(name, folder, prepare)
    for name in ("text", "utt2spk", "segments"):
        folder = kaldi(where / f"kaldi-holes-{name}", good)
        holes(folder / name, 1 << 40)
        yield Case(folder.name, folder, prepare)
    pipe = where / "fifo.json"
    yield Case(pipe.name, fifo(pipe), prepare)
    secret = where / "text-filepath.json"
    row = {"audio_filepath": str(good), "duration": 1.5, "text_filepath": str(where / "fifo.json")}
    secret.write_text(json.dumps(row) + "\n")
    yield Case(secret.name, secret, prepare, harmless=True)


def kaldi(folder: Path, good: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "wav.scp").write_text(f"u {good}\n")
    return folder


# ---- audio -----------------------------------------------------------------------------------------------------


def audio(where: Path, good: Path) -> Iterator[Case]:
    prepare = ("prepare-data", "{path}", "{good}/a.wav", "--out", "{out}", "--jobs", "1")
    silent = where / "hours.flac"  # 3 hours, 600 kB
    with sf.SoundFile(silent, "w", 16000, 1, "PCM_16", format="FLAC") as sound:
        sound.write(np.frombuffer(b"\1\0", np.int16))
        for _ in range(3):
            sound.write(np.zeros(16000 * 3600, np.int16))
    yield Case(silent.name, silent, prepare, "too_long")
    frames = bytearray(tone(where / "w64" / "frames.w64", seed=8, format="W64", subtype="PCM_16").read_bytes())
    place = frames.index(b"data") + 16
    frames[place : place + 8] = struct.pack("<q", (1 << 63) - 1)
    lying = where / "frames.w64"
    lying.write_bytes(bytes(frames))
    yield Case(lying.name, lying, prepare, harmless=True)  # libsndfile counts what is there
    yield Case("pipe.wav", fifo(where / "pipe.wav"), prepare, "not_a_file")


def packed_silence(path: Path, minutes: int) -> Path:
    """WavPack of silence, which SoX reads."""
    words = ["sox", "-D", "-n", "-r", "48000", "-b", "16", str(path), "trim", "0", str(60 * minutes)]
    subprocess.run(words, check=True, capture_output=True)
    return path
