"""What all pictures share: colours, an empty figure, a tidy frame, a PNG.

Matplotlib is optional and slow to import, so only the functions name it, and only its object-oriented side: a
`Figure` that nobody else holds, drawn by the Agg backend that `savefig` chooses for a PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nestcli.errors import MissingDependencyError
from nestcli.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#22262b", "#8a9099", "#e3e6ea"
BLUE, ORANGE = "#2f6db5", "#d9702b"  # told apart by colour-blind readers too
DOTS_PER_INCH = 144


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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)


def tidy(axes: Axes) -> None:
    """Axes without a box around them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
