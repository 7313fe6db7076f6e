"""Every picture: the same file from the same numbers, only our style, and unchanged matplotlib settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from nestcli.errors import DataError, MissingDependencyError
from nestcli.pictures import BLUE, colour_bar, new_figure, page_element, save, styled, words


def drawn(title: str = "a title") -> Figure:
    figure = new_figure(4, 3, title)
    axes = figure.subplots()
    axes.plot([0, 1, 2], [2.0, 1.0, 4.0], label="a curve")
    colour_bar(figure, axes.imshow(np.arange(12.0).reshape(3, 4)), axes, "a unit")
    axes.legend()
    return figure


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_numbers_make_the_same_file(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, epoch in (("a", "1"), ("b", "1000000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        with styled():
            assert save(drawn(), tmp_path / f"{name}.{ending}") == ""
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert content == (tmp_path / f"b.{ending}").read_bytes()
    assert b"matplotlib v" not in content.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{ending}", f"b.{ending}"]


def test_settings_are_as_before_even_after_a_failure() -> None:
    before = dict(dict.items(mpl.rcParams))
    with pytest.raises(ValueError, match="none"), styled():
        raise ValueError(mpl.rcParams["svg.fonttype"])
    assert dict(dict.items(mpl.rcParams)) == before


def test_no_pyplot_and_no_backend_is_chosen_and_no_matplotlibrc_is_followed(tmp_path: Path) -> None:
    """A matplotlibrc in the current folder may be somebody else's."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsvg.image_inline: False\naxes.facecolor: red\n")
    code = (
        "import sys\nfrom pathlib import Path\nimport matplotlib\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_drawing as here\nassert matplotlib.rcParams['text.usetex']\n"
        "with here.styled():\n    here.save(here.drawn(), Path('x.svg'))\n    here.save(here.drawn(), Path('x.png'))\n"
        "assert matplotlib.rcParams['text.usetex'] and matplotlib.rcParams['axes.facecolor'] == 'red'\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert not isinstance(dict.__getitem__(matplotlib.rcParams, 'backend'), str)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matplotlibrc", "x.png", "x.svg"]
    assert "#ff0000" not in (tmp_path / "x.svg").read_text()


def test_an_element_of_a_page_has_its_colours_and_no_names() -> None:
    with styled():
        element = page_element(drawn(), 'what "it" shows')
    assert element.startswith('<svg role="img" aria-label="what &quot;it&quot; shows" viewBox="0 0 288 216">')
    assert element.endswith("</svg>\n")
    assert "var(--line)" in element
    assert BLUE not in element
    assert "<g id=" not in element
    assert "http" not in element
    assert "a curve" in element


def test_somebody_elses_words_are_text_in_an_svg(tmp_path: Path) -> None:
    with styled():
        save(drawn(words(r"<script> $\frac{$ & ]]>")), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert r"&lt;script&gt; $\frac{$ &amp; ]]&gt;" in text


def test_a_png_of_few_colours_is_smaller(tmp_path: Path) -> None:
    with styled():
        save(drawn(), tmp_path / "all.png")
        save(drawn(), tmp_path / "few.png", colours=16)
    assert 100 < (tmp_path / "few.png").stat().st_size < 0.7 * (tmp_path / "all.png").stat().st_size


def test_a_picture_that_cannot_be_written_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with styled(), pytest.raises(DataError, match=r"cannot be written: .+ Do this\."):
        save(drawn(), tmp_path / "file" / "x.png", error=DataError, remedy="Do this.")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_matplotlib_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="Pictures need matplotlib"), styled():
        pass
