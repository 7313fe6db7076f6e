"""What all pictures share: colours, an empty figure, a tidy frame, a PNG.

Matplotlib is optional and slow to import, so only the functions name it, and only its object-oriented side: a
`Figure` that nobody else holds, drawn by the Agg backend that `savefig` chooses for a PNG.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nestcli.errors import MissingDependencyError
from nestcli.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontEntry

INK, GREY, PALE = "#22262b", "#8a9099", "#e3e6ea"
BLUE, ORANGE = "#2f6db5", "#d9702b"  # told apart by colour-blind readers too
DOTS_PER_INCH = 144
_SHOWN = 12  # letters that a message names


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches. Raises MissingDependencyError without matplotlib."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f'Pictures need matplotlib ({error}). Install it: pip install "nestcli[demo]"'
        raise MissingDependencyError(message) from error
    mpl.rcParams["text.usetex"] = False  # which a matplotlibrc in the current folder may say; it would start LaTeX
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def words(text: str, longest: int = 60) -> str:
    """Somebody else's words as they may stand in a picture: no formula of matplotlib's, of a bounded length."""
    plain = "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:longest])
    return plain.replace("$", r"\$") + ("…" if len(text) > longest else "")


def save(figure: Figure, path: Path) -> str:
    """Write a figure as PNG, whole or not at all. Returns what `render` does, with the file's name."""
    with atomic_file(path) as file:
        note = render(figure, file, "png", DOTS_PER_INCH)
    return note and f"{path}: {note}"


def render(figure: Figure, file: IO[bytes], kind: str, dpi: float) -> str:
    """Draw a figure into an open file, with fonts of this machine for letters that the default font lacks.

    Returns a sentence about letters that no font has, or nothing.
    """
    missing = _find_fonts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ")  # one line for each letter and each time that it is measured
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # the words are longer than the picture
        figure.savefig(file, format=kind, dpi=dpi)
    if not missing:
        return ""
    shown, more = "".join(missing[:_SHOWN]), f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"no font on this machine has {shown}{more}; the picture has boxes in their place. Install one, for example "
        "the package fonts-noto-cjk for Chinese, Japanese and Korean."
    )


def _find_fonts(figure: Figure) -> list[str]:
    """Give each text of a figure the fonts that it needs; the letters that no font has."""
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
            continue  # the last one has a box for every letter
        try:
            font = FT2Font(entry.fname)
        except (OSError, RuntimeError):  # it is gone, or a font of pictures, which cannot be drawn
            continue
        if font.scalable and (found := {letter for letter in missing if font.get_char_index(ord(letter))}):
            families.append(entry.name)
            missing = [letter for letter in missing if letter not in found]
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    return missing


def _usefulness(entry: FontEntry) -> tuple[bool, bool, str]:
    return ("Sans" not in entry.name, str(entry.weight) not in ("400", "normal", "regular"), entry.name)


def tidy(axes: Axes) -> None:
    """Axes without a box around them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
