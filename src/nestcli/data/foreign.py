"""Inputs that are neither audio nor a manifest: what they are, and what to give instead. None of them is unpacked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_HEAD = 1 << 16  # bytes that are looked at
_MAGIC = (
    (b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!", "rar"), (b"\x1f\x8b", "gz"), (b"BZh", "bz2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zst"),
    (b"\x89HDF\r\n\x1a\n", "h5"), (b"\x93NUMPY", "npy"), (b"SQLite format 3\0", "sqlite"), (b"%PDF", "pdf"),
)  # fmt: skip
_ARCHIVE = "unpack it, and give the folder that it unpacks to"
_EXPORT = "write its audio to files (FLAC or WAV), and give their folder or a manifest that names them"
_TEXTS = "it holds no audio; give the folder of the audio, or a manifest that names the files"
_ABOUT = {
    "parquet": ("a Parquet table", _EXPORT),
    "arrow": ("an Arrow table, as Hugging Face's datasets write it", _EXPORT),
    "tar": (
        "a tar archive",
        "unpack it with `tar -xf`, and give the folder. `nest pretrain` reads tars of NeMo beside their manifest "
        "(is_tarred), and Lhotse's Shar (shar_path)",
    ),
    "zip": ("a zip archive", _ARCHIVE),
    "7z": ("a 7z archive", _ARCHIVE),
    "rar": ("a rar archive", _ARCHIVE),
    "gz": ("a gzip-compressed file", "unpack it with `gunzip` (.tar.gz: `tar -xzf`), and give what comes out"),
    "bz2": ("a bzip2-compressed file", "unpack it with `bunzip2` (.tar.bz2: `tar -xjf`), and give what comes out"),
    "xz": ("an xz-compressed file", "unpack it with `unxz` (.tar.xz: `tar -xJf`), and give what comes out"),
    "zst": ("a zstd-compressed file", "unpack it with `unzstd`, and give what comes out"),
    "h5": ("an HDF5 file", _EXPORT),
    "npy": ("an array of NumPy", _EXPORT),
    "sqlite": ("a database of SQLite", _EXPORT),
    "pickle": ("a pickle or a file of PyTorch, which is never opened", _EXPORT),
    "record": ("a file of records (TFRecord, RecordIO, LMDB)", _EXPORT),
    "ark": ("an archive of Kaldi", "give the folder that has its wav.scp; archives and features are not read"),
    "pdf": ("a PDF", _TEXTS),
    "scp": ("a list of Kaldi", "give its data folder, or name the list wav.scp: KEY FILE in every line"),
    "kaldi": ("a table of a Kaldi folder", "give its folder, which must hold wav.scp"),
    "fairseq": ("a list of fairseq: a folder, then FILE and its number of samples", "give that folder, or the audio's"),
    "table": (
        "a table, not audio",
        'give the folder of the audio, or a manifest: JSON lines that name the files, {"audio_filepath": ...}',
    ),
    "list": (
        "a list of paths",
        "give their folder, or make a manifest of it: "
        """sed 's/.*/{"audio_filepath": "&"}/' LIST > LIST.jsonl""",
    ),
    "array": ("one JSON array, and a manifest has an object a line", "write it so: `jq -c '.[]' FILE > FILE.jsonl`"),
    "yaml": ("a YAML file", _TEXTS),
    "html": ("a page of HTML, perhaps an error of a download", "fetch the audio again"),
    "transcript": ("a transcript or label file", _TEXTS),
    "text": ("a text, not audio", _TEXTS),
}  # fmt: skip
_BY_ENDING = {
    **dict.fromkeys(("feather", "ipc"), "arrow"), "pq": "parquet",
    **dict.fromkeys(("webdataset", "wds"), "tar"), "tgz": "gz", **dict.fromkeys(("hdf5", "hdf", "he5"), "h5"),
    "npz": "npy", **dict.fromkeys(("pt", "pth", "pkl", "pickle", "ckpt"), "pickle"),
    **dict.fromkeys(("tfrecord", "tfrecords", "rec", "lmdb", "mdb"), "record"), "db": "sqlite",
    **dict.fromkeys(("tsv", "csv", "xlsx", "xls"), "table"), "yml": "yaml", "htm": "html",
    **dict.fromkeys(("trn", "stm", "ctm", "rttm", "lab", "textgrid", "srt", "vtt", "uem", "phn", "wrd"), "transcript"),
}  # fmt: skip
_KALDI_TABLES = frozenset("segments utt2spk spk2utt text utt2dur reco2dur spk2gender utt2num_frames".split())  # noqa: SIM905
_HOLD_AUDIO = frozenset("parquet arrow tar zip 7z rar gz bz2 xz zst h5 npy pickle record ark".split())  # noqa: SIM905
_TAR_MAGIC = slice(257, 262)


def foreign(path: str | os.PathLike[str]) -> str:
    """What a file is that is neither audio nor a manifest, and what to do; empty for what may be audio.

    Only regular files are opened, and only their first bytes are read.
    """
    kind = _kind(os.fspath(path))
    if not kind:
        return ""
    what, remedy = _ABOUT[kind]
    return f"this is {what}; {remedy}"


def known_ending(name: str) -> str:
    """What files of this ending are that hold audio but are not read, in words; empty for others."""
    ending = name.rpartition(".")[2].lower()
    kind = _BY_ENDING.get(ending, ending)
    return "{}; {}".format(*_ABOUT[kind]) if kind in _HOLD_AUDIO else ""


def has_json_lines(path: str | os.PathLike[str]) -> bool:
    """Whether the first thing in a regular file is a JSON object, as in a manifest, whatever the file is called."""
    return _head(os.fspath(path)).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def is_json_array(path: str | os.PathLike[str]) -> bool:
    return _head(os.fspath(path)).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _head(path: str) -> bytes:
    """The first bytes of a regular file; none of anything else, which is not opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if _is_file(path) else -1
    except (OSError, ValueError):
        return b""
    if descriptor < 0:
        return b""
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123  (not a path)
        try:
            return file.read(_HEAD) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        except OSError:
            return b""


def _is_file(path: str) -> bool:
    return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116


def _kind(path: str) -> str:
    head = _head(path)
    if not head:
        return ""
    name = os.path.basename(path).lower()  # noqa: PTH119
    ending = name.rpartition(".")[2] if "." in name else ""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            inner = _BY_ENDING.get(ending, ending)
            return inner if kind == "zip" and inner in ("npy", "pickle", "table") else kind
    if head[_TAR_MAGIC] == b"ustar":
        return "tar"
    if (text := _text(head)) is None:
        by_ending = _BY_ENDING.get(ending, ending)
        return by_ending if by_ending in _HOLD_AUDIO else ""
    if name in _KALDI_TABLES:
        return "kaldi"
    return _kind_of_text(text, _BY_ENDING.get(ending, ending))


def _text(head: bytes) -> str | None:
    """The bytes as text, if that is what they are."""
    if b"\0" in head:
        return None
    try:
        return head[: -4 if len(head) == _HEAD else None].decode("utf-8", "strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None


def _kind_of_text(text: str, ending: str) -> str:
    start = text.lstrip("\ufeff \t\r\n")
    if start.startswith("["):
        return "array"
    if start[:200].lower().startswith(("<!doctype html", "<html")):
        return "html"
    if ending in ("scp", "yaml", "transcript", "html", "ark"):
        return ending
    lines = [line.strip() for line in start.splitlines()[:20] if line.strip()]
    if len(lines) > 1 and "\t" not in lines[0] and all(_is_fairseq(line) for line in lines[1:]):
        return "fairseq"
    if lines and _is_path(lines[0]):
        return "list"
    return "table" if ending == "table" or any("\t" in line for line in lines[:1]) else "text"


def _is_fairseq(line: str) -> bool:
    path, tab, count = line.rpartition("\t")
    return bool(path and tab) and count.isdigit()


def _is_path(line: str) -> bool:
    """Whether a line is a path alone: one with a short ending, and no columns after it."""
    ending = Path(line).suffix
    return (
        1 < len(ending) <= 6
        and ending[1:].isalnum()
        and not ending[1:].isdigit()
        and "\t" not in line
        and "," not in line
    )
