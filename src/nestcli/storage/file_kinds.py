"""Recognise a file by its first bytes, or else by its name, and say what to do with it: one table of kinds.

Each kind has a remedy for files given as audio and one for files given as a manifest. Only .gz is unpacked.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import stat
import zlib
from typing import NamedTuple

HEAD = 1 << 16  # bytes that are examined
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_MARK = b"\xef\xbb\xbf"
_ONE_LINE = "A manifest has one JSON object per line"
_TO_JSON = 'to_json("NEW.json", orient="records", lines=True)'
_PANDAS = f"{_ONE_LINE}; pandas writes that: {_TO_JSON}"


class Form(NamedTuple):
    """A kind of file in words, with the remedies if audio or a manifest was expected; empty for no advice.

    `FILE` in the remedies stands for the file. `holds_audio` marks files that may hold audio that nest does not read.
    """

    what: str
    audio: str = ""
    manifest: str = ""
    holds_audio: bool = False


def _packed(what: str, tool: str, tar: str) -> Form:
    return Form(
        what, f"Unpack it with `{tool}` (tars: `tar {tar}`), and give the result", f"Unpack it with {tool}", True
    )


def _archive(what: str) -> Form:
    return Form(
        what, "Unpack it, and give the folder that it unpacks to", "Unpack it and name the manifest in it", True
    )


def _same(what: str, remedy: str) -> Form:
    return Form(what, remedy, remedy)


_EXPORT = "Write its audio to files (FLAC or WAV), and give their folder or a manifest that names them"
_PATHS = f"{_EXPORT}. From a table of paths, pandas writes one: {_TO_JSON}"
_BELONGS = "Name the manifest that belongs to it"
_TEXTS = "It holds no audio; give the folder of the audio, or a manifest that names the files"
_TABLE = (
    f"Give the folder of the audio, or a manifest that names the files; pandas writes that: {_TO_JSON}, with columns "
    "called audio_filepath (or audio_file) and duration",
    f"{_PANDAS}, with columns called audio_filepath (or audio_file) and duration",
)
_KALDI = "`nest prepare-data` makes a manifest from a Kaldi folder with wav.scp"
_AGAIN = "Servers send one in place of a file that they cannot deliver. Download the manifest, or fetch the audio again"
_JQ = f"{_ONE_LINE}, without brackets and commas. Convert it: jq -c '.[]' FILE > NEW.json"
_FORMS = {
    "parquet": Form("a Parquet table", _PATHS, _PANDAS, True),
    "arrow": Form("an Arrow table, as written by Hugging Face datasets", _PATHS, _PANDAS, True),
    "tar": Form(
        "a tar archive",
        "Unpack it with `tar -xf`, and give the folder. `nest pretrain` reads NeMo's tars together with their manifest "
        "(is_tarred), and Lhotse's Shar (shar_path)",
        "Name its manifest here, and the tar as tarred_audio_filepaths",
        True,
    ),
    "zip": _archive("a zip archive"),
    "7z": _archive("a 7z archive"),
    "rar": _archive("a rar archive"),
    "gz": _packed("a gzip file", "gunzip", "-xzf")._replace(manifest="Name it NAME.gz, or unpack it with gunzip"),
    "bz2": _packed("a file compressed with bzip2", "bunzip2", "-xjf"),
    "xz": _packed("a file compressed with xz", "unxz", "-xJf"),
    "zst": _packed("a file compressed with zstd", "unzstd", "--zstd -xf"),
    "h5": Form("an HDF5 file", _EXPORT, _BELONGS, True),
    "npy": Form("a NumPy array", _EXPORT, _BELONGS, True),
    "sqlite": Form("an SQLite database", _EXPORT, _ONE_LINE),
    "pickle": Form("a pickle or a PyTorch file, which is never opened", _EXPORT, _BELONGS, True),
    "record": Form("a file of records (TFRecord, RecordIO, LMDB)", _EXPORT, _BELONGS, True),
    "ark": Form("a Kaldi archive", "Give the folder with its wav.scp; archives are not read", _KALDI, True),
    "excel": Form("an Excel table", *_TABLE),
    "pdf": Form("a PDF", _TEXTS, "Name the manifest"),
    "picture": Form("a picture", _TEXTS, "Name the manifest"),
    "audio": Form("audio", "", "`nest prepare-data FILE --out DIR` makes a manifest of it"),
    "zeros": _same("nothing but zero bytes", "It was not written or copied completely. Write or copy it again"),
    "lfs": _same("a Git LFS pointer in place of the file", "Fetch the file: git lfs pull"),
    "html": _same("an HTML page", _AGAIN),
    "xml": _same("XML", _AGAIN),
    "array": _same("a JSON array", _JQ),
    "lines": Form("JSON lines, as a manifest has", "Give it a name that ends with .jsonl"),
    "yaml": Form(
        "YAML",
        f"{_TEXTS}. A list of data sets is for `nest pretrain` (input_cfg)",
        f"{_ONE_LINE}; a list of data sets is given as model.train_ds.input_cfg",
    ),
    "scp": Form("a Kaldi list", "Give its data folder, or name the list wav.scp: KEY FILE in every line", _KALDI),
    "kaldi": Form("a table of a Kaldi folder", "Give its folder, which must hold wav.scp", _KALDI),
    "fairseq": Form(
        "a fairseq list: a folder, then FILE and its number of samples",
        "Give that folder, or the audio's",
        "`nest prepare-data FOLDER --out DIR` makes a manifest of that folder",
    ),
    "list": _same(
        "a list of paths",
        "Give their folder to `nest prepare-data`, or make a manifest of it: "
        """sed 's/.*/{"audio_filepath": "&"}/' FILE > NEW.jsonl""",
    ),
    "table": Form("a table, not audio", *_TABLE),
    "transcript": Form("a transcript or label file", _TEXTS),
    "text": Form("a text, not audio", _TEXTS),
}
_MAGIC = (
    (b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"7z\xbc\xaf", "7z"),
    (b"Rar!", "rar"), (b"\x1f\x8b", "gz"), (b"BZh", "bz2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zst"),
    (b"\x89HDF", "h5"), (b"\x93NUMPY", "npy"), (b"SQLite format 3", "sqlite"), (b"%PDF", "pdf"),
    (b"\xd0\xcf\x11\xe0", "excel"), (b"\x89PNG", "picture"), (b"\xff\xd8\xff", "picture"), (b"GIF8", "picture"),
    *((magic, "audio") for magic in (
        b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"ID3", b"FORM", b"caff", b".snd", b"Creative Voice File",
        b"NIST_1A", b"\x1aE\xdf\xa3", b"#!AMR", b"wvpk",
    )),
)  # fmt: skip
_BY_ENDING = {
    **{name: name for name in _FORMS}, **dict.fromkeys(("feather", "ipc"), "arrow"), "pq": "parquet",
    **dict.fromkeys(("webdataset", "wds"), "tar"), "tgz": "gz", **dict.fromkeys(("hdf5", "hdf", "he5"), "h5"),
    "npz": "npy", **dict.fromkeys(("pt", "pth", "pkl", "ckpt"), "pickle"),
    **dict.fromkeys(("tfrecord", "tfrecords", "rec", "lmdb", "mdb"), "record"), "db": "sqlite",
    **dict.fromkeys(("tsv", "csv"), "table"), **dict.fromkeys(("xlsx", "xls"), "excel"), "yml": "yaml", "htm": "html",
    **dict.fromkeys(("trn", "stm", "ctm", "rttm", "lab", "textgrid", "srt", "vtt", "uem", "phn", "wrd"), "transcript"),
}  # fmt: skip
_KALDI_TABLES = frozenset("segments utt2spk spk2utt text utt2dur reco2dur spk2gender utt2num_frames".split())  # noqa: SIM905
_MPEG = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xfd][^\xf0-\xff]")
_YAML = re.compile(r"(%YAML|---\s|- \S|[A-Za-z_][\w.-]*:(\s|$))")
_SEPARATORS = (("\t", "tabs (TSV)"), (",", "commas (CSV)"), (";", "semicolons (CSV)"), ("|", "vertical bars (CSV)"))


def no_manifest(path: str, head: bytes, *, packed: bool = False) -> str:
    """Describe a file with these first bytes, with a remedy; return "" for JSON lines and unknown files."""
    file, inside = (path.removesuffix(".gz"), "unpacked ") if packed else (path, "")
    form = _form_of(file, head)
    return "" if form is None or not form.manifest else f"{path} is {inside}{_words(form, form.manifest, file)}."


def foreign(path: str | os.PathLike[str], head: bytes | None = None) -> str:
    """Describe a file that is not audio, with a remedy; return "" for unknown files and files that may be audio.

    Without `head`, reads the first bytes itself; opens only regular files.
    """
    path = os.fspath(path)
    form = _form_of(path, _head(path) if head is None else head)
    return "" if form is None or not form.audio else f"this is {_words(form, form.audio, path)}"


def known_ending(name: str) -> str:
    """Describe audio files with this extension that nest does not read; return "" for other extensions."""
    form = _FORMS.get(_BY_ENDING.get(name.rpartition(".")[2].lower(), ""))
    return f"{form.what}. {form.audio}" if form is not None and form.holds_audio else ""


def has_json_lines(path: str | os.PathLike[str]) -> bool:
    """Return True if a regular file begins with a JSON object, like a manifest, whatever its name."""
    path = os.fspath(path)
    head = _head(path)
    if head.startswith(b"\x1f\x8b") and path.endswith(".gz"):
        try:
            with gzip.open(path, "rb") as file:
                head = file.read(HEAD)
        except (OSError, EOFError, zlib.error):
            return False
    return head.removeprefix(_MARK).lstrip()[:1] == b"{"


def is_audio_or_array(path: str | os.PathLike[str]) -> bool:
    """Return True if a file cannot be a manifest, whatever its name: it is audio, or one JSON array."""
    return _form_of(os.fspath(path), _head(os.fspath(path))) in (_FORMS["audio"], _FORMS["array"])


def _words(form: Form, remedy: str, file: str) -> str:
    return f"{form.what}. {remedy.replace('FILE', shlex.quote(file))}"


def _head(path: str) -> bytes:
    """Return the first bytes of a regular file; nothing for anything else, which is not opened."""
    try:
        is_file = stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if is_file else -1
    except (OSError, ValueError):
        return b""
    if descriptor < 0:
        return b""
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123  (not a path)
        try:
            return file.read(HEAD) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        except OSError:
            return b""


def _form_of(path: str, head: bytes) -> Form | None:
    if not head:
        return None
    name = os.path.basename(path).lower()  # noqa: PTH119
    by_name = _BY_ENDING.get(name.rpartition(".")[2] if "." in name else "", "")
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return _encoded("UTF-32", "utf-32")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _encoded("UTF-16", "utf-16")
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            inside = kind == "zip" and by_name in ("npy", "pickle", "excel")
            return _FORMS[by_name if inside else kind]
    if _MPEG.match(head):
        return _FORMS["audio"]
    if head[257:262] == b"ustar":
        return _FORMS["tar"]
    if head[:2] in (b"{\0", b"[\0"):
        return _encoded("UTF-16", "utf-16le")
    if head[:2] in (b"\0{", b"\0["):
        return _encoded("UTF-16", "utf-16be")
    text = head.removeprefix(_MARK).decode("utf-8", "replace")
    if "\0" in text or text.count("\ufffd") > len(text) // 10:
        if by_name and _FORMS[by_name].holds_audio:
            return _FORMS[by_name]
        return None if any(head) else _FORMS["zeros"]
    return _text_form(text.lstrip(), name, by_name)


def _encoded(name: str, code: str) -> Form:
    return _same(
        f"{name} text, as PowerShell writes it",
        f"A manifest is UTF-8. Convert it: iconv -f {code} -t utf-8 FILE > NEW.json, or in PowerShell Out-File "
        "-Encoding utf8",
    )


def _text_form(text: str, name: str, by_name: str) -> Form | None:
    lines = [line for line in text.splitlines()[:20] if line.strip()] or [""]
    first = lines[0].rstrip()
    if text.startswith("version https://git-lfs"):
        return _FORMS["lfs"]
    if text.startswith("<"):
        page = re.match(r"<(!doctype\s+html|html|head|body)", text, re.IGNORECASE)
        return _FORMS["html" if page else "xml"]
    if re.match(r"\[\s*([{\[\"\]]|$)", text):
        return _FORMS["array"]
    if text.startswith("{"):
        return _object_form(text, lines, first)
    if name in _KALDI_TABLES:
        return _FORMS["kaldi"]
    if by_name in ("scp", "transcript", "ark", "html"):
        return _FORMS[by_name]
    if len(lines) > 1 and "\t" not in first and all(re.search(r".\t\d+\s*$", line) for line in lines[1:]):
        return _FORMS["fairseq"]
    if by_name == "yaml" or _YAML.match(text):
        return _FORMS["yaml"]
    if _is_path(first):
        return _FORMS["list"]
    for separator, called in _SEPARATORS:
        if separator in first and len(lines) > 1 and separator in lines[1]:
            return _FORMS["table"]._replace(what=f"a table of values separated by {called}")
    return _FORMS["table" if by_name == "table" or "\t" in first else "text"]


def _is_path(line: str) -> bool:
    """Return True if a line is just a path: it has a short ending and no columns after it."""
    ending = os.path.splitext(line)[1][1:]  # noqa: PTH122
    return 1 <= len(ending) <= 5 and ending.isalnum() and not ending.isdigit() and "\t" not in line and "," not in line


def _object_form(text: str, lines: list[str], first: str) -> Form:
    """Return the form of a file that begins with a JSON object: JSON lines, or the fault that affects every line."""
    if "\r" in text and "\n" not in text and len(lines) > 1:
        return _same(
            "text with only carriage returns as line ends, as old Macs wrote it",
            "Convert it: tr '\\r' '\\n' < FILE > NEW.json",
        )
    if re.match(r"\{\s*'", text):
        return _same("a Python dict, not JSON", f"{_ONE_LINE}; json.dumps writes it")
    try:
        _, end = json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):
        if len(lines) > 1 and first.endswith(("{", ",", "[", ":")):
            return _same("JSON that spans several lines", f"{_ONE_LINE}. Convert it: jq -c . FILE > NEW.json")
        return _FORMS["lines"]
    rest = first[end:].strip()
    if rest == ",":
        remedy = "Convert it: sed 's/,[[:space:]]*$//' FILE > NEW.json"
        return _same("JSON with commas between its lines", f"{_ONE_LINE}, without commas. {remedy}")
    if rest.startswith("{"):
        return _same("JSON with several objects in one line", f"{_ONE_LINE}. Convert it: jq -c . FILE > NEW.json")
    return _FORMS["lines"]


def why_no_json(line: bytes, error: Exception) -> str:
    """Say what is wrong with a line that cannot be decoded as JSON, and what to do."""
    if line.startswith(b"{") and not line.endswith(b"\n"):
        return "the line is cut off: the file was not written to its end. Write it again"
    if b"}\r{" in line:
        return "several lines end with only a carriage return. Convert the file: tr '\\r' '\\n' < FILE > NEW.json"
    if isinstance(error, UnicodeDecodeError):
        byte = line[error.start : error.start + 1].hex()
        return (
            f"this is not JSON: the byte 0x{byte} at column {error.start + 1} is not UTF-8. "
            "Save the file as UTF-8; from Latin-1: iconv -f latin1 -t utf-8 FILE > NEW.json"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"this is not JSON ({error.msg} at column {error.colno}); a manifest has one {{...}} per line"
    return f"this is not JSON ({str(error)[:80]})"
