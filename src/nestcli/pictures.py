"""Style, figures and file output for all pictures, which matplotlib draws.

Matplotlib is slow to import, so only functions import it. They use its object-oriented interface: each picture is a
`Figure` of its own, and `savefig` chooses the backend by the kind of file. Our settings apply inside `styled` and are
undone after it.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nestcli.errors import MissingDependencyError, NestError
from nestcli.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

INK, GREY, PALE = "#22262b", "#8a9099", "#e3e6ea"
BLUE, ORANGE, GREEN, RED = "#2f6db5", "#d9702b", "#3a8f6b", "#b3261e"  # colour-blind readers can distinguish them
DOTS_PER_INCH = 144
_SHOWN = 12  # maximum number of letters that a message lists
_PAGE_COLOURS = {INK: "--ink", GREY: "--grey", PALE: "--faint", BLUE: "--line", RED: "--bad"}  # of parity/page.css
_UNSIGNED: dict[str, dict[str, Any]] = {  # without dates and versions, so that the same numbers give the same file
    "png": {"Software": None},
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
}
_STYLE = {
    "figure.constrained_layout.use": True, "figure.titlesize": 12, "figure.titleweight": "bold",
    "font.sans-serif": ["DejaVu Sans"], "text.color": INK,
    "axes.facecolor": "none", "axes.edgecolor": GREY, "axes.spines.top": False, "axes.spines.right": False,
    "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlelocation": "left", "axes.titlesize": 10,
    "axes.prop_cycle": f"cycler('color', {[BLUE, ORANGE, GREEN]})",
    "axes.grid.axis": "y", "grid.color": PALE, "axes.axisbelow": True,
    "xtick.color": GREY, "xtick.labelcolor": INK, "xtick.labelsize": 9,
    "ytick.color": GREY, "ytick.labelcolor": INK, "ytick.labelsize": 9,
    "lines.markersize": 4, "legend.fontsize": 9, "legend.facecolor": "white", "legend.edgecolor": "none",
    "svg.fonttype": "none", "svg.hashsalt": "nest",
}  # fmt: skip


@contextmanager
def styled() -> Iterator[None]:
    """Set matplotlib's defaults and our style while a picture is drawn; a context manager and a decorator.

    A matplotlibrc file is ignored: it may be a stranger's file in the current folder, and it can start LaTeX.
    Raises MissingDependencyError if matplotlib cannot be imported.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        message = f"Pictures need matplotlib ({error}). Install it again: pip install --force-reinstall matplotlib"
        raise MissingDependencyError(message) from error
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE}
    del settings["backend"]  # setting it would change the backend of the whole process
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure with a title; the size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def words(text: str, longest: int = 60) -> str:
    """Return untrusted text that is safe in a picture: shortened, and not read as a matplotlib formula."""
    plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:longest])
    return plain.replace("$", r"\$") + ("…" if len(text) > longest else "")


def colour_bar(figure: Figure, image: ScalarMappable, beside: Any, label: str = "", **options: Any) -> Colorbar:
    """Draw a thin colour bar for an image, without a frame."""
    bar = figure.colorbar(image, ax=beside, label=label, **{"shrink": 0.5, "aspect": 30, "pad": 0.01, **options})
    bar.outline.set_visible(False)
    return bar


def save(
    figure: Figure,
    path: Path,
    *,
    dpi: float = DOTS_PER_INCH,
    colours: int = 0,
    error: type[NestError] = NestError,
    remedy: str = "",
) -> str:
    """Write a figure atomically, in the format that the file's extension names.

    With `colours`, a PNG is reduced to that number of colours, which makes it a third as large. Returns the sentence of
    `render` with the file's name in front; raises `error` as `atomic_file` does.
    """
    drawn = io.BytesIO()
    note = render(figure, drawn, path.suffix[1:] or "png", dpi)
    if colours:
        from PIL import Image  # a dependency of matplotlib

        image = Image.open(drawn).convert("RGB").quantize(colours, Image.Quantize.MAXCOVERAGE)
        drawn = io.BytesIO()
        image.save(drawn, format="PNG", optimize=True)
    with atomic_file(path, error, remedy) as file:
        file.write(drawn.getvalue())
    return note and f"{path}: {note}"


def page_element(figure: Figure, description: str) -> str:
    """Return a figure as an SVG element of an HTML page, whose style sheet sets the colours of lines and text.

    `description` is for readers who cannot see the figure. Text in the figure is plain, without links or names.
    """
    drawn = io.BytesIO()
    figure.set_facecolor("none")
    render(figure, drawn, "svg", 72)
    width, height = 72 * figure.get_size_inches()
    text = drawn.getvalue().decode()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index('<g id="figure_1"') :]).replace("base64,\n", "base64,")
    for colour, name in _PAGE_COLOURS.items():
        text = text.replace(colour, f"var({name})")
    return f'<svg role="img" aria-label="{escape(description)}" viewBox="0 0 {width:g} {height:g}">{text}'


def render(figure: Figure, file: IO[bytes], kind: str, dpi: float) -> str:
    """Draw a figure into an open file; other fonts of this machine supply letters that the default font lacks.

    Returns a sentence about letters that no font has, or an empty string.
    """
    missing = _find_fonts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ")  # matplotlib repeats it each time it measures a letter
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # a text is longer than the picture
        figure.savefig(file, format=kind, dpi=dpi, metadata=_UNSIGNED.get(kind))
    if not missing:
        return ""
    shown, more = "".join(missing[:_SHOWN]), f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"no font on this machine has {shown}{more}; the picture has boxes in their place. Install one, for example "
        "the package fonts-noto-cjk for Chinese, Japanese and Korean."
    )


def _find_fonts(figure: Figure) -> list[str]:
    """Give each text of a figure the fonts that it needs; return the letters that no font has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font
    from matplotlib.text import Text

    ticks = [label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()]
    texts = [text for text in (*figure.findobj(Text), *ticks) if not text.get_text().isascii()]
    if not texts:
        return []
    default = FT2Font(font_manager.findfont(font_manager.FontProperties()))
    letters = sorted({letter for text in texts for letter in text.get_text() if not letter.isspace()})
    missing = [letter for letter in letters if not default.get_char_index(ord(letter))]
    families: list[str] = []
    for entry in sorted(font_manager.fontManager.ttflist, key=_usefulness):
        if not missing:
            break
        if entry.style != "normal" or entry.name in families or entry.name.startswith("Last Resort"):
            continue  # matplotlib's last fallback font draws a box for every letter
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # the file was removed, or is a bitmap font, which cannot be drawn
            continue
        if font.scalable and (found := {letter for letter in missing if font.get_char_index(ord(letter))}):
            families.append(entry.name)
            missing = [letter for letter in missing if letter not in found]
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    return missing


def _usefulness(entry: FontEntry) -> tuple[bool, bool, str]:
    return ("Sans" not in entry.name, str(entry.weight) not in ("400", "normal", "regular"), entry.name)
