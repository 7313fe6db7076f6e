"""What a file is that was given as a manifest and is none: told by its first bytes, with the way to a manifest."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import suppress
from pathlib import Path

from nestcli.errors import DataError

HEAD = 1 << 16  # bytes that are looked at
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_MARK = b"\xef\xbb\xbf"
_ONE_LINE = "A manifest has one JSON object a line"
_PANDAS = f"""{_ONE_LINE}; pandas writes that: to_json("NEW.json", orient="records", lines=True)"""

_BINARY = (
    (b"PK\x03\x04", "a zip file, or an Excel table. Unpack it and name the manifest in it"),
    (b"PAR1", f"a Parquet table. {_PANDAS}"),
    (b"ARROW1", f"an Arrow table. {_PANDAS}"),
    (b"\xd0\xcf\x11\xe0", f"an old Excel table. {_PANDAS}"),
    (b"\x1f\x8b", "a gzip file. Name it NAME.gz, or unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "a file packed by zstd. Unpack it with unzstd"),
    (b"BZh", "a file packed by bzip2. Unpack it with bunzip2"),
    (b"\xfd7zXZ", "a file packed by xz. Unpack it with unxz"),
    (b"7z\xbc\xaf", "a file packed by 7-Zip. Unpack it"),
    (b"\x89HDF", "an HDF5 file. Name the manifest that belongs to it"),
    (b"SQLite format 3", f"a database of SQLite. {_ONE_LINE}"),
    (b"\x93NUMPY", "an array of NumPy. Name the manifest that belongs to it"),
    (b"%PDF", "a PDF. Name the manifest"),
    (b"\x89PNG", "a picture. Name the manifest"),
    (b"\xff\xd8\xff", "a picture. Name the manifest"),
)
_AUDIO = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"NIST_1A", b"\x1aE\xdf\xa3", b"#!AMR")
_MPEG = re.compile(rb"\xff[\xe2-\xe7\xf2-\xf7\xfa-\xfd][^\xf0-\xff]")
_LFS = b"version https://git-lfs"
_YAML = re.compile(r"(%YAML|---\s|- \S|[A-Za-z_][\w.-]*:(\s|$))")
_SOUND_NAME = re.compile(r"\.(wav|flac|mp3|ogg|opus|sph|m4a|aac|aiff?|wma|amr)$", re.IGNORECASE)


def no_manifest(path: str, head: bytes, *, packed: bool = False) -> str:
    """A message that says what a file with these first bytes is, and the remedy; empty for JSON lines and others."""
    what = _form_of(head)
    file, inside = (path.removesuffix(".gz"), "unpacked ") if packed else (path, "")
    return f"{path} is {inside}{what.replace('FILE', shlex.quote(file))}." if what else ""


def _form_of(head: bytes) -> str:
    if not head.strip():
        return ""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return _encoded("UTF-32", "utf-32")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _encoded("UTF-16", "utf-16")
    if not any(head):
        return "nothing but zero bytes: it was not written or copied to its end. Write or copy it again"
    if head[:2] in (b"{\0", b"[\0"):
        return _encoded("UTF-16", "utf-16le")
    if head[:2] in (b"\0{", b"\0["):
        return _encoded("UTF-16", "utf-16be")
    for magic, what in _BINARY:
        if head.startswith(magic):
            return what
    if _is_audio(head):
        return "audio. `nest prepare-data FILE --out DIR` makes a manifest of it"
    if head[257:262] == b"ustar":
        return "a tar. Name its manifest here, and the tar as tarred_audio_filepaths"
    return _text_form(head.removeprefix(_MARK).decode("utf-8", "replace").lstrip())


def _is_audio(head: bytes) -> bool:
    return head.startswith(_AUDIO) or _MPEG.match(head) is not None


def _encoded(name: str, code: str) -> str:
    return (
        f"{name} text, as PowerShell writes it; a manifest is UTF-8. "
        f"Convert it: iconv -f {code} -t utf-8 FILE > NEW.json, or in PowerShell Out-File -Encoding utf8"
    )


def _text_form(text: str) -> str:
    if "\0" in text or text.count("\ufffd") > len(text) // 10:
        return ""
    lines = text.splitlines() or [""]
    first = lines[0].rstrip()
    if text.startswith(_LFS.decode()):
        return "a pointer of Git LFS in place of the file. Fetch the file: git lfs pull"
    if text.startswith("<"):
        page = "an HTML page" if re.match(r"<(!doctype\s+html|html|head|body)", text, re.IGNORECASE) else "XML"
        return f"{page}; servers send one in place of a file that cannot be had. Download the manifest again"
    if re.match(r"\[\s*([{\[\"\]]|$)", text):
        return f"a JSON array. {_ONE_LINE}, without brackets and commas. Convert it: jq -c '.[]' FILE > NEW.json"
    if text.startswith("{"):
        return _object_form(text, lines, first)
    if _YAML.match(text):
        return f"YAML. {_ONE_LINE}; a list of data sets is given as model.train_ds.input_cfg"
    if _SOUND_NAME.search(first) and "\t" not in first and "," not in first:
        return (
            "a list of files. `nest prepare-data` makes a manifest of folders and files of audio, and of a folder of "
            "Kaldi with wav.scp"
        )
    for separator, name in (
        ("\t", "tabs (TSV)"),
        (",", "commas (CSV)"),
        (";", "semicolons (CSV)"),
        ("|", "bars (CSV)"),
    ):
        if separator in first and len(lines) > 1 and separator in lines[1]:
            return (
                f"a table of values between {name}. {_PANDAS}, with columns called audio_filepath (or audio_file) and "
                "duration"
            )
    return ""


def _object_form(text: str, lines: list[str], first: str) -> str:
    """What is wrong with the whole of a file that begins with an object."""
    if "\r" in text and "\n" not in text and len(lines) > 1:
        return (
            "text with carriage returns alone as ends of lines, as old Macs wrote it. "
            "Convert it: tr '\\r' '\\n' < FILE > NEW.json"
        )
    if re.match(r"\{\s*'", text):
        return f"Python's way to write a dict, not JSON. {_ONE_LINE}; json.dumps writes it"
    try:
        _, end = json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):
        if len(lines) > 1 and first.endswith(("{", ",", "[", ":")):
            return f"JSON that goes over several lines. {_ONE_LINE}. Convert it: jq -c . FILE > NEW.json"
        return ""
    rest = first[end:].strip()
    if rest == ",":
        remedy = "Convert it: sed 's/,[[:space:]]*$//' FILE > NEW.json"
        return f"JSON with commas between its lines. {_ONE_LINE}, without commas. {remedy}"
    if rest.startswith("{"):
        return f"JSON with several objects in one line. {_ONE_LINE}. Convert it: jq -c . FILE > NEW.json"
    return ""


def is_manifest(path: Path) -> bool:
    """Whether a file that a person names is a manifest: by its name, or because it begins with an object of JSON.

    Raises DataError for what was surely meant to be one: a table, a list, YAML, another encoding.
    """
    if path.name.lower().endswith(SUFFIXES):
        return True
    head = b""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(HEAD)
    if (what := no_manifest(str(path), head)) and not _is_audio(head):
        raise DataError(what)
    return not what and head.removeprefix(_MARK).lstrip().startswith(b"{")


def why_no_json(line: bytes, error: Exception) -> str:
    """What is wrong with one line that cannot be decoded as JSON, and the remedy."""
    if line.startswith(b"{") and not line.endswith(b"\n"):
        return "the line is cut off: the file was not written to its end. Write it again"
    if b"}\r{" in line:
        return "several lines end with a carriage return alone. Convert the file: tr '\\r' '\\n' < FILE > NEW.json"
    if isinstance(error, UnicodeDecodeError):
        byte = line[error.start : error.start + 1].hex()
        return (
            f"this is not JSON: the byte 0x{byte} at column {error.start + 1} is not UTF-8. "
            "Save the file as UTF-8; of Latin-1: iconv -f latin1 -t utf-8 FILE > NEW.json"
        )
    if isinstance(error, json.JSONDecodeError):
        return f"this is not JSON ({error.msg} at column {error.colno}); a manifest has one {{...}} a line"
    return f"this is not JSON ({str(error)[:80]})"
