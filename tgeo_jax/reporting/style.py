"""How figures look, and how they become SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", "-.", ":")
RIGHT, WRONG = COLOURS[:2]
SIZE = (5.4, 3.3)  # inches; larger ones have too small letters on a phone
RC: Any = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def line(index: int) -> tuple[str, str]:
    """Colour and dashes of a run: 24 that differ, and neighbours differ in both.

    Where two curves lie on each other, dashes show both.

    Examples:
        >>> line(0), line(12)
        (('#0072B2', '-'), ('#0072B2', '--'))
    """
    return COLOURS[index % len(COLOURS)], _LINES[(index + index // 12) % len(_LINES)]


def legend_below(axes: Any, columns: int = 2) -> None:
    """The legend under the figure, where it takes no width away."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=columns, columnspacing=1.5)


def png(figure: Figure) -> bytes:
    """The figure as a file of its own."""
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight")
    return content.getvalue()


def svg(figure: Figure, name: str, described: str) -> str:
    """The figure as an element of a page: transparent, black replaced by the text's colour.

    Args:
        figure: to draw.
        name: different for every figure of a page: what it refers to inside is named after it.
        described: for those who do not see it.
    """
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", bbox_inches="tight", transparent=True)
    text = content.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # the same in every figure, used by none
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = text.replace("#000000", "currentColor").replace(" xlink:href", " href")
    text = text.replace(COLOURS[0].lower(), "var(--blue)")  # too dark for a dark page
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(described)}"', 1)
