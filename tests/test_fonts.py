"""Foreign names in pictures: letters that the default font lacks, with and without a font that has them."""

import io
import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

font_manager = pytest.importorskip("matplotlib.font_manager")

from nestcli.augment.preview import draw_previews  # noqa: E402
from nestcli.evaluation.probes.pictures import draw_confusion  # noqa: E402
from nestcli.evaluation.probes.results import LOG_MEL, PRETRAINED, UNTRAINED, Outcome, ProbeResult  # noqa: E402
from nestcli.pictures import new_figure, render, save, words  # noqa: E402
from nestcli.training.curves import main as curves  # noqa: E402

CHINESE, ARABIC, EMOJI, LINEAR_B = "男女", "رجل", "😀", "𐀀"


@pytest.fixture
def only_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose only fonts are those that matplotlib brings along."""
    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)


@pytest.fixture
def chinese_font(tmp_path: Path, only_default: None) -> Iterator[str]:
    """A font with two letters, both of them filled squares."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square, names = pen.glyph(), [".notdef", "man", "woman"]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(CHINESE, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Nest Test Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    entry = font_manager.ttfFontProperty(font_manager.get_font(str(tmp_path / "squares.ttf")))
    font_manager.fontManager.ttflist.append(entry)
    font_manager._findfont_cache.clear() if hasattr(font_manager, "_findfont_cache") else None
    yield entry.name
    font_manager.fontManager.ttflist.remove(entry)


def labelled(*names: str) -> tuple[str, np.ndarray]:
    """Return the notes on a picture with these names along its axes, and the picture."""
    import matplotlib.image

    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.set_xticks(range(len(names)), [words(name) for name in names])
    axes.set_ylabel(words(names[0]))
    figure.suptitle(words(names[-1]))
    memory = io.BytesIO()
    note = render(figure, memory, "png", 72)
    memory.seek(0)
    return note, matplotlib.image.imread(memory)


def test_warnings_are_errors_here() -> None:
    """Without this, the tests below would not see what a user sees."""
    with pytest.raises(UserWarning):
        warnings.warn("as matplotlib warns of a letter", UserWarning, stacklevel=1)


@pytest.mark.parametrize("names", list(itertools.permutations(["s1", CHINESE, EMOJI], 2)))
@pytest.mark.usefixtures("only_default")
def test_letters_that_no_font_has_are_told_once(names: tuple[str, str]) -> None:
    note, _ = labelled(*names)
    missing = "".join(sorted({letter for name in names for letter in name if not letter.isascii()} - {EMOJI}))
    assert note.startswith("no font on this machine has ") or set(names) == {"s1", EMOJI}
    assert missing in note
    assert note.count("fonts-noto-cjk") <= 1


@pytest.mark.usefixtures("only_default")
def test_many_letters_make_no_long_message() -> None:
    note, _ = labelled("".join(map(chr, range(0x4E00, 0x4E00 + 50))))
    assert "and 38 more" in note
    assert len(note) < 250


@pytest.mark.usefixtures("only_default")
def test_letters_that_the_default_font_has_need_nothing() -> None:
    assert labelled("Zürich", ARABIC, "Ω", "привет")[0] == ""
    assert labelled("s1")[0] == ""


def test_a_font_of_the_machine_is_used(chinese_font: str) -> None:
    note, drawn = labelled("s1", CHINESE)
    assert note == ""
    _, other = labelled("s1", CHINESE[0])
    assert not np.array_equal(drawn, other)
    note, _ = labelled("s1", CHINESE + LINEAR_B)
    assert f"no font on this machine has {LINEAR_B};" in note


def result(*classes: str) -> ProbeResult:
    outcomes = tuple(Outcome(name, "mean", (1.0,), ("input",), ((1.0,),)) for name in (PRETRAINED, UNTRAINED, LOG_MEL))
    confusion = tuple(tuple(int(a == b) for a in classes) for b in classes)
    return ProbeResult("性别", "utterances", classes, 2, 0, 0.5, outcomes, confusion)


@pytest.mark.usefixtures("only_default")
def test_the_probes_picture(tmp_path: Path) -> None:
    note = draw_confusion(tmp_path / "confusion.png", result("男", "女"))
    assert note.startswith(f"{tmp_path}/confusion.png: no font on this machine has 别女性男;")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert draw_confusion(tmp_path / "confusion.png", result("$x$", "女" * 1_000)).count("别女性") == 1


@pytest.mark.usefixtures("only_default")
def test_the_preview_of_an_augmentation(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000)
    for name in ("干净.wav", "noisy.wav"):
        sf.write(tmp_path / name, samples, 16_000)
    segments = [
        {"start": start, "duration": 0.4, "source": "/噪声.wav", "speaker": speaker, "source_offset": 0.0}
        for start, speaker in ((0.1, "说话人"), (0.5, r"$\no{$ formula" + 200 * "x"))
    ]
    row = {
        "audio_filepath": str(tmp_path / "noisy.wav"), "clean_filepath": str(tmp_path / "干净.wav"),
        "clean_offset": 0.0, "clean_duration": 1.0,
        "augmentation": {
            "mode": "speech", "scale": 1.0, "ratio_db": 0.0, "span_ratio_db": None, "segments": segments
        },
    }  # fmt: skip
    (tmp_path / "m.json").write_text(2 * (json.dumps(row) + "\n"), encoding="utf-8")
    told: list[str] = []
    assert len(draw_previews(tmp_path / "m.json", tmp_path / "preview", 2, 16_000, told.append)) == 2
    assert len(told) == 1
    assert "no font on this machine has 人净干话说;" in told[0]


@pytest.mark.usefixtures("only_default")
def test_the_curves_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "第一$次"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.0}\n{"step": 2, "train_loss": 1.0}\n')
    assert curves([str(run)]) == 0
    said = capsys.readouterr()
    assert said.err.count("no font on this machine has 一次第;") == 1
    assert said.out == f"{run}/curves.png\n"


def test_a_picture_of_plain_words_looks_for_no_fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(font_manager.fontManager, "ttflist", None)
    figure = new_figure(2, 2)
    figure.subplots()
    assert save(figure, tmp_path / "x.png") == ""
