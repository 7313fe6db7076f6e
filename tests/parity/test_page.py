"""The page of a comparison: whole, self-contained, safe to open, and true to the report, failed or passed."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.image import imread

from nestcli.errors import NestError
from nestcli.parity.figures import (
    DIFFERENCE,
    FEATURES,
    MASK,
    NOT_FINITE,
    curve_in_words,
    draw_curve,
    pooled,
    scientific,
    shared_decades,
)
from nestcli.parity.page import share_of_tolerance, write_page
from nestcli.parity.report import SECTIONS, Check, KnownDifference, Report, Section
from nestcli.pictures import page_element, styled

VOID = {"meta", "br", "wbr"}
RANDOM = np.random.default_rng(0)


class Page(HTMLParser):
    """Content of a page, in which every element is closed in order."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.words.setdefault(tag, [])
        if tag not in VOID:
            self.open.append(tag)
            self.words[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words[tag][-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(*sections: Section, **changes: object) -> Report:
    values: dict[str, object] = {
        "config": "small",
        "nemo_version": "3.0.0",
        "live": False,
        "sections": list(sections),
        "known_differences": [],
        "notes": ["add --nemo for more"],
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def written(report: Report, folder: Path) -> tuple[str, Page]:
    path = folder / "page.html"
    write_page(report, path)
    document = path.read_text(encoding="utf-8")
    return document, Page(document)


def good(name: str = "value", difference: float = 3e-6) -> Check:
    return Check(name, True, 0.1234567, 0.1234597, difference, 1e-4)


def bad(where: str | None = "first at element [0, 2]: ours 1, NeMo's 2; 1 of 9 elements differ") -> Check:
    return Check("training: layers.3", False, 1.0, 2.0, 1.0, 1e-4, where)


def whole_report(n_layers: int = 16) -> Report:
    features = RANDOM.normal(size=(80, 224)).astype(np.float32)
    mask = RANDOM.random((3, 224)) < 0.3
    return report(
        Section("preprocessor", [good("features")], pictures={"ours": features, "NeMo": features + np.float32(1e-5)}),
        Section(
            "masking",
            [Check("masks", True, 12, 12, 0.0, 0.0, note="all of 20")],
            pictures={"ours, disjoint": mask, "NeMo, disjoint": mask.astype(np.uint8)},
        ),
        Section(
            "encoder",
            [good(f"evaluation: layers.{layer}") for layer in range(n_layers)],
            curves={"evaluation": [3e-6] * n_layers, "dropout": [0.0] * n_layers},
        ),
        known_differences=[
            KnownDifference("dither", "in place", "a copy", "model.preprocessor.nemo_exact=true", "moved 4e-5", True),
            KnownDifference("masks in validation", "drawn again", "the same", None),
        ],
    )


def images(document: str) -> list[npt.NDArray[np.uint8]]:
    """The pictures of a page as colours (rows, columns, 3), the upper row first."""
    found = re.findall(r"<image [^>]+>", document)
    return [decode(tag)[:: -1 if re.search(r"scale\(1 -1\)|matrix\(\S+ 0 0 -", tag) else 1] for tag in found]


def decode(tag: str) -> npt.NDArray[np.uint8]:
    """The PNG inside of an image's element, none of it transparent."""
    address = re.search(r'href="data:image/png;base64,([^"]+)"', tag)
    assert address
    drawn = (255 * imread(io.BytesIO(base64.b64decode(address[1])))).round().astype(np.uint8)
    assert (drawn[:, :, 3] == 255).all()
    return drawn[:, :, :3]


def colour(of: str | tuple[str, ...], place: int = 0) -> npt.NDArray[np.uint8]:
    """A colour of a scale, by its name or its list of colours."""
    scale = colormaps[of] if of in colormaps else ListedColormap([of] if isinstance(of, str) else list(of))
    return np.array(scale(place, bytes=True)[:3], np.uint8)


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layers", [1, 2, 16, 42])
def test_page_holds_verdict_sections_checks_and_differences(tmp_path: Path, n_layers: int) -> None:
    whole = whole_report(n_layers)
    _, page = written(whole, tmp_path)
    assert page.words["h1"] == ["The same as NeMo 3.0.0 in the sections compared"]  # nine sections were left out
    assert page.words["h3"] == ["preprocessor", "masking", "encoder"]
    rows = page.words["th"]
    for section in whole.sections:
        assert {"id": section.name} in page.of("div")
        for check in section.checks:
            assert check.name in rows
    for words in ("dither", "masks in validation"):
        assert words in rows
    text = page.words["main"][0]
    for words in ("small", "UTC", "nestcli", "torch", "add --nemo", "moved 4e-5", "not tried", "all of 20", "3.0e-06"):
        assert words in text
    assert "3.0 %" in text  # 3e-6 of 1e-4
    assert not any("open" in attributes for attributes in page.of("details"))


def test_page_of_all_sections_says_the_same_model(tmp_path: Path) -> None:
    _, page = written(report(*(Section(name, [good()]) for name in SECTIONS)), tmp_path)
    assert page.words["h1"] == ["The same model as NeMo 3.0.0"]
    assert page.words["p"][0] == "12 checks, no difference beyond its tolerance."


def test_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    document, page = written(whole_report(), tmp_path)
    assert {"script", "link", "img", "iframe"}.isdisjoint(tag for tag, _ in page.elements)
    for attributes in (attributes for _, attributes in page.elements):
        for name in ("href", "src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", re.sub(r"base64,[^\"]*", "", document))


def test_page_is_told_to_those_who_do_not_see_it(tmp_path: Path) -> None:
    _, page = written(whole_report(), tmp_path)
    assert all(attributes["aria-label"] and attributes["role"] == "img" for attributes in page.of("svg"))
    assert len(page.words["caption"]) == len(page.of("table")) == 5
    assert all(attributes["scope"] in ("col", "row") for attributes in page.of("th"))
    assert any("exactly 0 after all 16 layers" in str(attributes["aria-label"]) for attributes in page.of("svg"))
    anchors = {str(attributes["href"])[1:] for attributes in page.of("a")}
    assert anchors <= {str(attributes.get("id")) for _, attributes in page.elements}


def test_failed_report_names_the_first_divergence_and_opens_its_section(tmp_path: Path) -> None:
    encoder = Section("encoder", [good(), bad(), bad("the shapes differ")], curves={"training": [0.0, 1.0]})
    _, page = written(report(Section("masking", [good()]), encoder, Section("decoder", [good()])), tmp_path)
    assert page.words["h1"] == ["Differs from NeMo 3.0.0: first at encoder, “training: layers.3”, element [0, 2]"]
    assert page.words["p"][0].startswith("2 of 5 checks differ. “training: layers.3”: first at element [0, 2]: ours 1")
    assert ["open" in attributes for attributes in page.of("details")] == [False, True, False]
    assert page.words["summary"][1] == "encoder ✗ differs, 2 of 3 checks"
    assert [attributes.get("id") for attributes in page.of("span")].count("first") == 1
    assert "the shapes differ" in page.words["main"][0]


@pytest.mark.parametrize("where", [None, "", "TypeError: no"])
def test_failed_report_without_an_element(tmp_path: Path, where: str | None) -> None:
    check = Check("our side runs", False, None, None, None, None, where)
    _, page = written(report(Section("checkpoint", [check])), tmp_path)
    assert page.words["h1"] == ["Differs from NeMo 3.0.0: first at checkpoint, “our side runs”"]
    assert (where or "our side runs") in page.words["main"][0]


def test_difference_that_is_not_as_described_is_in_the_verdict(tmp_path: Path) -> None:
    differences = [KnownDifference("dither", "in place", "a copy", None, "nothing", False)]
    _, page = written(report(Section("masking", [good()]), known_differences=differences), tmp_path)
    assert page.words["h1"][0].endswith(", but a known difference is not as described: dither")
    assert "✗ not as described" in page.words["td"]
    assert page.of("header")[0]["class"] == "failed"


def test_empty_report_claims_nothing(tmp_path: Path) -> None:
    _, page = written(report(), tmp_path)
    assert page.words["h1"] == ["Nothing was compared with NeMo 3.0.0"]


def test_everything_from_the_report_is_escaped(tmp_path: Path) -> None:
    evil = '<script>alert("&\'")</script>'
    picture = np.zeros((3, 5))
    sections = [
        Section(evil, [Check(evil, False, evil, [evil] * 9, None, None, evil, evil)]),
        Section("encoder", [good()], curves={evil: [0.0, 1e-3]}),
        Section("preprocessor", [good()], pictures={f"ours, {evil}": picture, f"NeMo, {evil}": picture}),
    ]
    differences = [KnownDifference(evil, evil, evil, evil, evil, None)]
    document, page = written(
        report(*sections, config=evil, nemo_version=evil, notes=[evil], known_differences=differences), tmp_path
    )
    assert "<script" not in document
    assert not page.of("script")
    assert evil in page.words["h1"][0]
    assert page.words["main"][0].count(evil) > 15


def test_long_lists_are_shortened_to_where_they_part(tmp_path: Path) -> None:
    ours = [number / 7 for number in range(500)]
    nemo = [*ours[:300], 0.125, *ours[301:]]
    _, page = written(report(Section("masking", [Check("draws", False, ours, nemo, None, 0.0)])), tmp_path)
    cells = [cell for cell in page.words["td"] if "500 in all" in cell]
    assert cells == ["[… 42.85714, 43, 43.14286, …] 500 in all", "[… 0.1250000, 43, 43.14286, …] 500 in all"]


def test_note_of_many_checks_stands_once(tmp_path: Path) -> None:
    checks = [Check(f"key {number}", True, 1, 1, 0.0, 0.0, note="recorded") for number in range(5)]
    document, page = written(report(Section("config", checks)), tmp_path)
    assert document.count("recorded</small>") == 1
    assert page.words["sup"] == ["a"] * 6


def test_small_page_is_small(tmp_path: Path) -> None:
    long = RANDOM.normal(size=(80, 3000))
    section = Section("preprocessor", [good()], pictures={"ours": long, "NeMo": long + 1e-6})
    document, _ = written(report(section), tmp_path)
    assert len(document) < 350_000  # noise, which no compression helps


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_page_replaces_a_file_and_makes_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_page(report(Section("masking", [good()])), path)
    path.write_text("old")
    write_page(report(Section("masking", [good()]), config="odd \udce9 name"), path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("place", ["file/page.html", "folder"])
def test_page_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NestError, match=rf"{place} cannot be written: .+\. Name a file"):
        write_page(report(Section("masking", [good()])), tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FEATURES, DIFFERENCE])
def test_lightness_goes_one_way(name: str) -> None:
    lightness = np.array([colour(name, place) for place in range(256)]) @ [0.2126, 0.7152, 0.0722]
    steps = np.diff(lightness) * np.sign(lightness[-1] - lightness[0])
    assert steps.min() > -1.0  # colours are rounded to whole numbers
    assert steps.sum() > 80


def test_the_two_colours_of_a_mask_differ_in_lightness() -> None:
    assert abs((colour(MASK, 0).astype(float) - colour(MASK, 1)) @ [0.2126, 0.7152, 0.0722]) > 80


def test_values_find_their_colours(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.0, 1.0, 2.0, 2.0, np.nan, np.inf]])
    document, _ = written(report(Section("x", [good()], pictures={"ours": values, "NeMo": values})), tmp_path)
    scale = [colour(FEATURES, place) for place in (0, 0, 128, 255, 255)]
    np.testing.assert_array_equal(images(document)[0], [[*scale, colour(NOT_FINITE), colour(NOT_FINITE)]])
    flat = np.ones((1, 2))
    document, _ = written(report(Section("x", [good()], pictures={"ours": flat, "NeMo": flat})), tmp_path)
    np.testing.assert_array_equal(images(document)[0], [[colour(FEATURES, 0)] * 2])


def test_pooling_keeps_the_largest_difference() -> None:
    values = np.zeros((2, 1801))
    values[1, 900] = 5.0
    values[0, 1800] = 7.0
    assert pooled(values, largest=True).shape == (2, 451)
    assert pooled(values, largest=True).max(1).tolist() == [7.0, 5.0]
    assert pooled(values).max() == 7.0  # the last column is repeated to fill its group
    assert pooled(values[:, :600]).shape == (2, 600)


def test_features_stand_with_the_lowest_bin_at_the_bottom(tmp_path: Path) -> None:
    features = np.repeat(np.arange(80.0)[:, None], 20, 1)
    section = Section("preprocessor", [good()], pictures={"ours": features, "NeMo": features})
    document, page = written(report(section), tmp_path)
    drawn = images(document)
    assert len(drawn) == 4  # two sides, and the scale of each; the difference is told in words
    np.testing.assert_array_equal(drawn[0][-1], np.broadcast_to(colour(FEATURES, 0), (20, 3)))
    np.testing.assert_array_equal(drawn[0][0], np.broadcast_to(colour(FEATURES, 255), (20, 3)))
    labels = [str(attributes["aria-label"]) for attributes in page.of("svg")]
    assert labels[-1] == "identical, all 1,600 values are equal"


def test_difference_shows_where_and_how_much(tmp_path: Path) -> None:
    ours = RANDOM.normal(size=(80, 50))
    nemo = ours.copy()
    nemo[10, 30] += 2e-3
    nemo[11, 40] = np.nan
    section = Section("preprocessor", [bad()], pictures={"ours": ours, "NeMo": nemo})
    document, page = written(report(section), tmp_path)
    drawn = images(document)[4]
    np.testing.assert_array_equal(drawn[79 - 10, 30], colour(DIFFERENCE, 255))
    np.testing.assert_array_equal(drawn[79 - 11, 40], colour(NOT_FINITE))
    assert (drawn == colour(DIFFERENCE, 0)).all(2).sum() == drawn.shape[0] * drawn.shape[1] - 2
    captions = page.words["figcaption"]
    assert captions == ["ours", "NeMo not finite: 1 of 4,000", "difference 2 of 4,000 values differ"]
    assert "2.0e-03" in page.words["text"][-1]


def test_infinity_on_both_sides_is_no_difference(tmp_path: Path) -> None:
    values = np.full((2, 9), np.inf)
    values[0, 0] = np.nan
    _, page = written(report(Section("x", [good()], pictures={"ours": values, "NeMo": values.copy()})), tmp_path)
    assert "identical" in page.words["main"][0]


def test_pictures_of_other_shapes_or_none(tmp_path: Path) -> None:
    sides = {"ours": np.zeros((80, 9)), "NeMo": np.zeros((80, 8)), "ours, alone": np.zeros((2, 2))}
    empty = {"ours": np.zeros((80, 0)), "NeMo": np.zeros((80, 0))}
    _, page = written(report(Section("a", [good()], pictures=sides), Section("b", [good()], pictures=empty)), tmp_path)
    assert "ours (80, 9), NeMo's (80, 8)" in page.words["main"][0]
    assert len(page.of("svg")) == 3


def test_masks_differ_by_frames(tmp_path: Path) -> None:
    ours = RANDOM.random((2, 40)) < 0.4
    nemo = ours.astype(np.uint8)
    nemo[1, 7] ^= 1
    section = Section("masking", [bad()], pictures={"ours, a": ours, "NeMo, a": nemo})
    document, page = written(report(section), tmp_path)
    drawn = images(document)
    np.testing.assert_array_equal((drawn[0] == colour(MASK, 1)).all(2), ours)
    np.testing.assert_array_equal((drawn[1] == colour(MASK, 1)).all(2), nemo)
    assert (drawn[2] == colour(DIFFERENCE, 255)).all(2).nonzero()[1].tolist() == [7]
    assert page.words["figcaption"][2] == "difference, a 1 of 80 values differ"


# ---- curves and numbers ----------------------------------------------------------------------------------------------


def drawn_curve(values: list[float], tolerance: float | None) -> tuple[Axes, dict[str, list[float]], list[str]]:
    """Its axes, the heights of its dots ("o") and crosses ("x"), and its words."""
    with styled():
        figure = draw_curve(values, tolerance, shared_decades([values], [tolerance]))
        page = Page(page_element(figure, "a curve"))
    (axes,) = figure.axes
    heights = {str(line.get_marker()): list(map(float, line.get_ydata())) for line in axes.lines}  # type: ignore[arg-type]
    return axes, heights, page.words["text"]


@pytest.mark.parametrize("n_layers", [1, 2, 42])
def test_curve_of_zeros_stands_on_its_line(n_layers: int) -> None:
    axes, heights, words = drawn_curve([0.0] * n_layers, 1e-4)
    assert (heights["o"], heights["x"]) == ([0.0] * n_layers, [])
    assert axes.get_ylim()[0] == 0.0
    assert "exactly 0" in words
    assert "tolerance 1.0e-04" in words
    assert {"0"} <= {word for word in words if word.isdigit()} <= set(map(str, range(n_layers)))


def test_curve_marks_what_is_beyond_the_tolerance(tmp_path: Path) -> None:
    values = [0.0, 1e-6, 2e-3, float("inf"), float("nan")]
    assert shared_decades([values], [1e-4]) == (-8, -2)
    axes, heights, _ = drawn_curve(values, 1e-4)
    assert (heights["o"], heights["x"]) == ([0.0, 1e-6], [2e-3, 1e-2, 1e-2])
    at = axes.transData.transform([(0, height) for height in (0.0, 1e-6, 1e-2)])[:, 1]
    assert at[0] < at[1] < at[2]
    words = "at most 2.0e-03, after layer 2; first beyond the tolerance after layer 2; not finite from layer 3 on"
    checks = [good("evaluation: layers.0")]
    _, page = written(report(Section("encoder", checks, curves={"evaluation": values})), tmp_path)
    assert page.of("svg")[0]["aria-label"] == f"evaluation: {words}"
    assert curve_in_words([float("nan")], None) == "not finite at layer 0"


def test_curve_without_a_tolerance() -> None:
    _, heights, words = drawn_curve([1e-12, 5.0], None)
    assert (heights["o"], heights["x"]) == ([1e-12, 5.0], [])
    assert not any("tolerance" in word for word in words)


def test_numbers_have_two_digits() -> None:
    numbers = (None, 0.0, 3.0, 1.19e-7, 0.25, float("inf"), float("nan"), 1e9)
    assert [scientific(number) for number in numbers] == ["–", "0", "3", "1.2e-07", "2.5e-01", "∞", "∞", "1.0e+09"]


def test_share_of_tolerance() -> None:
    assert share_of_tolerance(good(difference=5e-5)) == pytest.approx(0.5)
    assert share_of_tolerance(Check("a", True, 1, 1, 0.0, 0.0)) == 0.0
    assert share_of_tolerance(Check("a", False, 1, 2, 1.0, 0.0)) == float("inf")
    assert share_of_tolerance(Check("a", False, 1, 2)) == float("inf")
    assert share_of_tolerance(Check("a", True, 1, 1)) == 0.0
