"""Every command names the kind of a file that is not a manifest."""

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import write_noise_wav
from nestcli.augment.noisy_copy import CopyOptions
from nestcli.augment.run import AugmentOptions, augment
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.mixing import AugmentationConfig
from nestcli.errors import DataError
from nestcli.evaluation.inputs import read_inputs
from nestcli.prepare.inputs import collect

ROWS = [{"audio_filepath": f"/{number}.wav", "duration": 1.5} for number in range(3)]
LINES = [json.dumps(row) for row in ROWS]
TEXT = "\n".join(LINES) + "\n"


def zipped() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("m.json", TEXT)
    return memory.getvalue()


FORMS = {
    "array": (json.dumps(ROWS).encode(), r"a JSON array.*jq -c '\.\[\]' \S+m\.json > NEW\.json"),
    "array of lines": (("[\n" + ",\n".join(LINES) + "\n]\n").encode(), "a JSON array"),
    "array after blanks": (b"\xef\xbb\xbf\r\n\n [" + json.dumps(ROWS).encode()[1:], "a JSON array"),
    "array of names": (json.dumps(["/a.wav"]).encode(), "a JSON array"),
    "indented": (json.dumps(ROWS[0], indent=2).encode(), r"JSON that spans several lines.*jq -c \. "),
    "object of objects": (json.dumps({"a": ROWS}, indent=2).encode(), "JSON that spans several lines"),
    "commas": (",\n".join(LINES).encode(), "JSON with commas between its lines"),
    "one line": (" ".join(LINES).encode(), "JSON with several objects in one line"),
    "dicts": ("\n".join(map(repr, ROWS)).encode(), "a Python dict"),
    "carriage returns": (TEXT.replace("\n", "\r").encode(), "text with only carriage returns.*tr '.r' '.n' <"),
    "utf-16": (TEXT.encode("utf-16"), "UTF-16 text.*iconv -f utf-16 -t utf-8"),
    "utf-16 without mark": (TEXT.encode("utf-16-le"), "UTF-16 text.*iconv -f utf-16le"),
    "utf-16 of others": (TEXT.encode("utf-16-be"), "UTF-16 text.*iconv -f utf-16be"),
    "utf-32": (TEXT.encode("utf-32"), "UTF-32 text.*iconv -f utf-32"),
    "yaml": (b"- audio_filepath: /a.wav\n  duration: 1.5\n", "YAML.*input_cfg"),
    "yaml of keys": (b"audio_filepath: /a.wav\nduration: 1.5\n", "YAML"),
    "csv": (b"audio_filepath,duration\n/a.wav,1.5\n", "a table of values separated by commas.*pandas"),
    "csv with a mark": (
        b"\xef\xbb\xbfaudio_filepath;duration\r\n/a.wav;1,5\r\n",
        "a table of values separated by semicolons",
    ),
    "tsv": (b"path\tsentence\n/a.wav\tword\n", "a table of values separated by tabs"),
    "list": (b"/a/b.wav\n/a/c.wav\n", "a list of paths.*nest prepare-data"),
    "html": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page.*Download"),
    "xml": (b'<?xml version="1.0"?><Error/>', "XML.*Download"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a Git LFS pointer.*git lfs pull",
    ),
    "parquet": (b"PAR1" + bytes(100) + b"PAR1", "a Parquet table.*to_json"),
    "zip": (zipped(), "a zip archive"),
    "gzip": (gzip.compress(TEXT.encode()), r"a gzip file.*gunzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "a file compressed with zstd"),
    "zeros": (bytes(5000), "nothing but zero bytes"),
    "tar": (b"audio.json".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), "a tar.*tarred_audio_filepaths"),
}
MIXING = AugmentationConfig(
    prob=1.0, noise_ratio=0.5, min_r_speech=-5.0, max_r_speech=5.0, min_r_noise=-5.0, max_r_noise=20.0,
    min_mix_rate=0.3, max_mix_rate=0.9,
)  # fmt: skip
OPTIONS = AugmentOptions(CopyOptions(MIXING))
form = pytest.mark.parametrize(("content", "said"), FORMS.values(), ids=FORMS.keys())


@form
def test_a_form_is_named_with_its_remedy(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_manifests(str(path))
    assert re.search(rf"m\.json is {said}", str(error.value)), error.value
    assert len(str(error.value).replace(str(tmp_path), "")) < 330


@form
def test_a_form_is_named_within_a_gz(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.json.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=rf"m\.json\.gz is unpacked {said}"):
        read_manifests(str(path))


def commands(path: Path, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Return the functions with which the commands open manifests; pretrain and bench use `read_manifests` itself."""
    (tmp_path / "good.json").write_text(TEXT)
    good, out = str(tmp_path / "good.json"), tmp_path / "out"
    return {
        "prepare-data": lambda: collect([path], out),
        "extract and probe": lambda: read_inputs(path, out),
        "augment": lambda: augment(str(path), None, out, OPTIONS),
        "augment's noise": lambda: augment(good, str(path), out, OPTIONS),
    }


@pytest.mark.parametrize("name", ["m.json", "m.csv", "manifest"])
@pytest.mark.parametrize("kind", ["array", "utf-16", "carriage returns", "csv", "yaml", "parquet", "gzip", "html"])
def test_every_command_names_it(tmp_path: Path, name: str, kind: str) -> None:
    content, said = FORMS[kind]
    path = tmp_path / name
    path.write_bytes(content)
    for command, opened in commands(path, tmp_path).items():
        with pytest.raises(DataError) as error:
            opened()
        assert re.search(said.replace(r"m\.json", re.escape(name)), str(error.value)), (command, error.value)
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("name", ["m.txt", "m.manifest", "manifest"])
def test_a_manifest_may_have_any_name(tmp_path: Path, name: str) -> None:
    write_noise_wav(tmp_path / "a.wav", 1.5, 0)
    path = tmp_path / name
    path.write_text('{"audio_file": "a.wav"}\n')
    assert read_inputs(path, tmp_path / "out").manifest.durations.tolist() == [1.5]
    (item,) = collect([path], tmp_path / "out").items
    assert item.path == str(tmp_path / "a.wav")


def test_a_gz_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.json.gz"
    for content, said in (
        (TEXT.encode(), "is not a gzip file.*Rename it"),
        (json.dumps(ROWS).encode(), "is a JSON array"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_manifests(str(path))


def test_audio_in_place_of_a_manifest_is_named(tmp_path: Path) -> None:
    write_noise_wav(tmp_path / "a.wav", 1.5, 0)
    with pytest.raises(DataError, match=r"a\.wav is audio\. `nest prepare-data .*a\.wav --out DIR`"):
        read_manifests(str(tmp_path / "a.wav"))
    (item,) = collect([(tmp_path / "a.wav").rename(tmp_path / "a.speech")], tmp_path / "out").items
    assert item.path == str(tmp_path / "a.speech")


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for content, said in ((b"", "has no lines: it is empty"), (b"\n \n", "has no lines.")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_manifests(str(path))


def test_a_bad_line_further_on_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for bad, said in (
        (b"- a: b", "line 2: this is not JSON"),
        (LINES[0].encode() + b"\r" + LINES[1].encode(), "line 2: several lines end with only a carriage return.*tr "),
        (
            b'{"audio_filepath": "/caf\xe9.wav", "duration": 1}',
            "line 2: .*byte 0xe9 at column 25 is not UTF-8.*iconv -f latin1",
        ),
    ):
        path.write_bytes(LINES[0].encode() + b"\n" + bad + b"\n")
        with pytest.raises(DataError, match=said):
            read_manifests(str(path))


def test_the_paths_other_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    rows = [
        {"audio_file": "/a.wav", "duration": 1, "speaker": "s"},
        {"audio_filename": "/b.wav", "duration": 2, "offset": 0.5},
        {"audio_filename": "/c.wav", "audio_file": "c", "duration": 3},
        {"audio_filepath": "/d.wav", "audio_file": "d", "duration": 4},
        {"audio_filepath": "/e.wav", "audio_filename": "/e.wav", "duration": 5.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for packed in (False, True):
        if packed:
            path = tmp_path / "m.json.gz"
            path.write_bytes(gzip.compress((tmp_path / "m.json").read_bytes()))
        manifest = read_manifests(str(path))
        assert [manifest.entry(line).audio_filepath for line in range(5)] == [f"/{name}.wav" for name in "abcde"]
        assert manifest.durations.tolist() == [1, 2, 3, 4, 5]
        assert (manifest.entry(0).speaker, manifest.entry(1).offset) == ("s", 0.5)
        assert manifest.row(0) == {"audio_filepath": "/a.wav", "duration": 1, "speaker": "s"}


@pytest.mark.parametrize("duration", [1, 1.0])
def test_two_names_for_different_files_are_refused(tmp_path: Path, duration: float) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"audio_filepath": "/a.wav", "audio_filename": "/b.wav", "duration": duration}))
    with pytest.raises(DataError, match='line 1: "audio_filepath" and "audio_filename" name different files'):
        read_manifests(str(path))
