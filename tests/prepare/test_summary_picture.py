"""The picture of a preparation: its numbers, no words of others, and a preparation that does not depend on it."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile as sf

from nestcli.prepare.pipeline import PrepareOptions, prepare

BY_FOLDER = PrepareOptions(val_fraction=0.2, speaker_pattern=r"([^/]+)/[^/]+$")
OURS = (
    r"[\d.,\-\u2212 ]+", r"\d+\.\d\d hours of speech: \d+ utterances, \d+ speakers", "hours", "utterances",
    r"length of utterance, up to \(s\)", r"level, up to \(dBFS\)",
)  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for speaker in ("<b>$x$", "男"):
        for number in range(1, 6):
            path = tmp_path / "corpus" / speaker / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = np.random.default_rng(number + len(speaker)).normal(0, 10.0**-number, 16000 * number)
            sf.write(path, samples, 16_000)
    return tmp_path / "corpus"


def test_it_holds_numbers_and_words_of_ours_alone(corpus: Path, tmp_path: Path) -> None:
    summary = prepare([corpus], tmp_path / "out", BY_FOLDER)
    assert summary.speakers == 2
    text = (tmp_path / "out" / "summary.svg").read_text(encoding="utf-8")
    words = [element.text or "" for element in ElementTree.fromstring(text).iter() if element.tag.endswith("}text")]
    assert f"{summary.hours:.2f} hours of speech: 10 utterances, 2 speakers" in words
    assert [word for word in words if not any(re.fullmatch(pattern, word) for pattern in OURS)] == []
    assert text.count("fill: #2f6db5") == 10 + 25  # bars of half a second each, and of 3 dB
    prepare([corpus], tmp_path / "again", BY_FOLDER)
    assert (tmp_path / "again" / "summary.svg").read_text(encoding="utf-8") == text


def test_without_matplotlib_there_is_no_picture_and_all_else(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_it = prepare([corpus], tmp_path / "out", BY_FOLDER)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert prepare([corpus], tmp_path / "out", BY_FOLDER) == with_it
    assert made - {path.name for path in (tmp_path / "out").iterdir()} == {"summary.svg"}


def test_where_nothing_is_accepted_the_picture_of_before_goes(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "out", PrepareOptions())
    prepare([corpus], tmp_path / "out", PrepareOptions(min_duration=1000))
    assert not (tmp_path / "out" / "summary.svg").exists()
