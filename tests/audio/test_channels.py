"""The checked channel is the one that is used, wherever it is named."""

import gzip
import json

import numpy as np
import pytest
import soundfile as sf

from nestcli.augment.noisy_copy import CopyOptions
from nestcli.augment.run import AugmentOptions, augment
from nestcli.config import load_config
from nestcli.data.corpus import read_corpus
from nestcli.data.dataset import NoisySpeech
from nestcli.data.manifest_scan import read_manifests
from nestcli.data.mixing import AugmentationConfig
from nestcli.data.tarred import read_shar, read_tarred
from nestcli.data.utterance_audio import read_audio
from nestcli.errors import ConfigError, DataError
from nestcli.prepare.pipeline import PrepareOptions, prepare

RATE = 16000


def noise(seed, count=RATE):
    return np.round(0.1 * np.random.default_rng(seed).standard_normal(count) * 32768) / 32768


LEFT, RIGHT = noise(1), noise(2)


@pytest.fixture
def call(tmp_path):
    sf.write(tmp_path / "call.wav", np.stack([LEFT, RIGHT], 1), RATE)
    return tmp_path / "call.wav"


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options(**others):
    return PrepareOptions(val_fraction=0, jobs=1, **others)


def cut(call, channel, **changes):
    source = {"type": "file", "channels": [0, 1], "source": str(call)}
    recording = {"id": "call", "sources": [source], "sampling_rate": RATE, "num_samples": RATE, "duration": 1.0}
    made = {"id": f"call-{channel}", "start": 0, "duration": 1.0, "channel": channel, "type": "MonoCut"}
    return {**made, "supervisions": [], "recording": recording, **changes}


def heard(manifest, line):
    return read_audio(read_manifests(str(manifest)).entry(line), sample_rate=RATE)


def test_a_chosen_channel_is_judged_not_the_average(tmp_path):
    (tmp_path / "in").mkdir()
    sf.write(tmp_path / "in" / "dead_right.wav", np.stack([LEFT, 0 * LEFT], 1), RATE)
    sf.write(tmp_path / "in" / "inverted.wav", np.stack([RIGHT, -RIGHT], 1), RATE)
    sf.write(tmp_path / "in" / "nan_left.wav", np.stack([LEFT * np.nan, noise(3)], 1), RATE, subtype="FLOAT")
    sf.write(tmp_path / "in" / "loud_left.wav", np.stack([np.sign(LEFT), noise(4)], 1), RATE)
    reasons = {}
    for channel in (0, 1, None):  # in one folder: what was found of one channel is not taken for another's
        prepare([tmp_path / "in"], tmp_path / "out", options(channel=channel))
        reasons[channel] = {
            r["audio_filepath"].rpartition("/")[2]: r["reason"] for r in rows(tmp_path / "out" / "rejected.jsonl")
        }
    assert reasons[0] == {"loud_left.wav": "clipped", "nan_left.wav": "not_finite"}
    assert reasons[1] == {"dead_right.wav": "silent"}
    assert reasons[None]["inverted.wav"] == "silent"


def test_the_chosen_channel_stands_in_the_manifest_until_there_is_only_one(tmp_path, call):
    prepare([call], tmp_path / "out", options(channel=1, shards=1))
    row = rows(tmp_path / "out" / "train_manifest.json")[0]
    assert row == {"audio_filepath": str(call), "duration": 1.0, "channel_selector": 1}
    assert np.array_equal(heard(tmp_path / "out" / "train_manifest.json", 0), RIGHT.astype(np.float32))
    shards = tmp_path / "out" / "train_shards"
    packed = read_tarred(str(shards / "tarred_audio_manifest.json"), str(shards / "audio_0.tar"))
    assert np.array_equal(read_audio(packed.entry(0), sample_rate=RATE), RIGHT.astype(np.float32))
    assert packed.entry(0).channel is None
    prepare([call], tmp_path / "files", options(channel=1, convert=True))
    row = rows(tmp_path / "files" / "train_manifest.json")[0]
    assert "channel_selector" not in row
    assert np.array_equal(heard(tmp_path / "files" / "train_manifest.json", 0), RIGHT.astype(np.float32))


@pytest.mark.parametrize("how", [{}, {"convert": True}, {"segment": 0.6}, {"shards": 1, "shard_format": "shar"}])
def test_both_sides_of_a_call_are_read_from_cuts(tmp_path, call, how):
    cuts = lines(tmp_path / "cuts.jsonl", cut(call, 0), cut(call, 1))
    summary = prepare([cuts], tmp_path / "out", options(channel=0, **how))  # a cut's own channel comes first
    assert summary.rejected == 0
    manifest = tmp_path / "out" / "train_manifest.json"
    sides = {row["id"]: line for line, row in enumerate(rows(manifest))} if "id" in rows(manifest)[0] else {}
    pieces = len(rows(manifest)) // 2
    for place, side in enumerate((LEFT, RIGHT)):
        found = np.concatenate([heard(manifest, place * pieces + piece) for piece in range(pieces)])
        assert np.abs(found - side[: len(found)]).max() == 0
    assert not sides or len(sides) == 2
    if "shards" in how:
        shar = read_shar(str(tmp_path / "out" / "train_shards"))
        ours = {np.abs(read_audio(shar.entry(line), sample_rate=RATE)).sum() for line in range(2)}
        assert ours == {np.abs(side.astype(np.float32)).sum() for side in (LEFT, RIGHT)}


def test_cuts_of_one_file_a_channel(tmp_path, call):
    sf.write(tmp_path / "l.wav", LEFT, RATE)
    sf.write(tmp_path / "r.wav", RIGHT, RATE)
    sources = [
        {"type": "file", "channels": [n], "source": str(tmp_path / f"{side}.wav")} for n, side in enumerate("lr")
    ]
    manifest = lines(tmp_path / "cuts.jsonl", cut(call, 1, recording={"id": "x", "sources": sources}))
    assert np.array_equal(heard(manifest, 0), RIGHT.astype(np.float32))
    assert read_manifests(str(manifest)).entry(0).channel is None


def test_lines_that_cannot_be_used_are_rejected_and_others_kept(tmp_path, call):
    source = {"type": "command", "channels": [0], "source": "touch x"}
    path = lines(
        tmp_path / "cuts.jsonl",
        cut(call, [0, 1], type="MultiCut"),
        cut(call, 1),
        cut(call, 7),
        cut(call, None),
        {"audio_filepath": str(call), "channel_selector": [0, 1]},
        {"audio_filepath": str(call), "channel_selector": 0},
        cut(call, 0, recording={"id": "r", "sources": [source]}),
        {"audio_filepath": str(call), "channel_selector": 2},
    )
    for content in (path, tmp_path / "packed.jsonl.gz"):
        if content != path:
            content.write_bytes(gzip.compress(path.read_bytes()))
        summary = prepare([content], tmp_path / content.stem, options())
        assert (summary.accepted, summary.rejections) == (2, {"no_such_channel": 1, "unsupported_line": 5})
        assert [row.get("channel_selector") for row in rows(tmp_path / content.stem / "train_manifest.json")] == [1, 0]
        found = rows(tmp_path / content.stem / "rejected.jsonl")
        assert found[0]["audio_filepath"].startswith(f"{content}, line 1: ")
        for row, said in zip(
            found, ["MultiCut", "none of the recording", "names none", "[0, 1]", "command", ""], strict=True
        ):
            assert said in row["detail"]


@pytest.mark.parametrize("channel", [-1, 1.0, True, "left", [0, 1], [], {"a": 1}, 1 << 40])
def test_a_channel_that_is_none_is_named_with_its_line(tmp_path, call, channel):
    path = lines(tmp_path / "m.json", {"audio_filepath": str(call), "duration": 1.0, "channel_selector": channel})
    with pytest.raises(DataError, match=r'm\.json, line 1: "channel_selector" is '):
        read_manifests(str(path))


@pytest.mark.parametrize(
    ("channel", "wanted"), [(0, LEFT), ([1], RIGHT), ("average", (LEFT + RIGHT) / 2), (None, (LEFT + RIGHT) / 2)]
)
def test_the_line_s_channel_is_read(tmp_path, call, channel, wanted):
    path = lines(tmp_path / "m.json", {"audio_filepath": str(call), "duration": 1.0, "channel_selector": channel})
    assert np.array_equal(heard(path, 0), wanted.astype(np.float32))


def speech_of(path, **keys):
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
    words = [f"model.train_ds.{key}={value}" for key, value in values.items()]
    config = load_config(
        "small", [f"model.train_ds.manifest_filepath={path}", "model.train_ds.noise_manifest=null", *words]
    )
    corpus = read_corpus(config, "model.train_ds")
    data = NoisySpeech(corpus.speech, None, 0, config, "model.train_ds")
    return [data._speech(line) for line in range(len(corpus.speech))]


def test_training_reads_the_channel_of_the_line_and_that_of_the_data_set(tmp_path, call):
    plain = {"audio_filepath": str(call), "duration": 1.0}
    path = lines(tmp_path / "m.json", plain, {**plain, "channel_selector": 0, "side": 1})
    assert [
        np.array_equal(s, w.astype(np.float32))
        for s, w in zip(speech_of(path, channel_selector=1), (RIGHT, LEFT), strict=True)
    ] == [True, True]
    assert np.array_equal(speech_of(path, channel_selector="average")[0], ((LEFT + RIGHT) / 2).astype(np.float32))
    cuts = lines(tmp_path / "c.jsonl", cut(call, 1))
    assert np.array_equal(speech_of(cuts)[0], RIGHT.astype(np.float32))
    with pytest.raises(DataError, match="channel 2 does not exist: the file has 2"):
        speech_of(path, channel_selector=2)
    with pytest.raises(ConfigError, match=r"model\.train_ds\.channel_selector: -1; it must be"):
        speech_of(path, channel_selector=-1)
    with pytest.raises(ConfigError, match="'left'"):
        speech_of(path, channel_selector="left")


def test_with_lhotse_a_word_names_the_field_of_the_line(tmp_path, call):
    plain = {"audio_filepath": str(call), "duration": 1.0}
    path = lines(tmp_path / "m.json", {**plain, "side": 1}, {**plain, "side": 0})
    left_and_right = speech_of(path, channel_selector="side", use_lhotse=True)
    assert np.array_equal(left_and_right[0], RIGHT.astype(np.float32))
    assert np.array_equal(left_and_right[1], LEFT.astype(np.float32))
    with pytest.raises(DataError, match="line 1: there is no 'other', which channel_selector names"):
        speech_of(path, channel_selector="other", use_lhotse=True)


def test_noisy_copies_are_of_the_channel(tmp_path, call):
    path = lines(tmp_path / "m.json", {"audio_filepath": str(call), "duration": 1.0, "channel_selector": 1})
    nothing = CopyOptions(AugmentationConfig(0.0, 0.5, -5, 5, -5, 5, 0.5, 0.5))
    summary = augment(str(path), None, tmp_path / "out", AugmentOptions(nothing, jobs=1))
    row = rows(tmp_path / "out" / "manifest.json")[0]
    assert summary.written == 1
    assert (row["clean_channel"], "channel_selector" in row) == (1, False)
    assert np.array_equal(heard(tmp_path / "out" / "manifest.json", 0), RIGHT.astype(np.float32))


def test_a_shar_that_lhotse_wrote_of_both_sides(tmp_path, call):
    from lhotse import CutSet, MonoCut, Recording

    recording = Recording.from_file(call)
    cuts = [MonoCut(f"c{side}", 0.25, 0.5, side, recording=recording) for side in (0, 1)]
    (tmp_path / "shar").mkdir()
    CutSet.from_cuts(cuts).to_shar(tmp_path / "shar", fields={"recording": "flac"})
    ours = read_shar(str(tmp_path / "shar"))
    for line, side in enumerate((LEFT, RIGHT)):  # Lhotse 1.33's from_shar loads the same
        assert np.array_equal(read_audio(ours.entry(line), sample_rate=RATE), side[4000:12000].astype(np.float32))
