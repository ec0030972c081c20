"""The triangle of student, teacher and truth, drawn to scale.

Any three points lie in a plane, so the triangle S-T-G of a sample is drawn as it is in the space of
probabilities, whatever the number of classes. S-M-G, with the teacher's mean prediction M for the
class, is another plane: it is folded down along their common edge SG, so that all five edges that
the fusion network may see have their true lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from tgeo_jax.reporting import style

UNIT = 130  # pixels of a length of 1; the longest edge is sqrt 2
_PAD = 26
_COLOURS = dict(zip("STGM", style.COLOURS, strict=False))
_NAMES = {"S": "student", "T": "teacher", "G": "label", "M": "teacher's mean for the class"}


def points(lengths: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Where the corners lie: G at the origin, S to its right, T above, M below the line GS.

    `x_T = (|GS|^2 + |TG|^2 - |TS|^2) / (2 |GS|)`, `y_T^2 = |TG|^2 - x_T^2`; M likewise.

    Args:
        lengths: of the edges GS, TS, TG and, if M is known, MS and MG.

    Returns:
        (x, y) by corner, in the unit of the lengths. The angle at G is never obtuse: all
        probabilities lie on one side of a corner of their simplex.

    Examples:
        >>> points({"GS": 0.3, "TG": 0.4, "TS": 0.5})["T"]
        (0.0, 0.4)
    """
    base = lengths["GS"]

    def across(from_g: float, from_s: float) -> tuple[float, float]:
        if base < 1e-6:  # S lies on G: any direction will do
            return 0.0, from_g
        x = (base**2 + from_g**2 - from_s**2) / (2 * base)
        x = min(max(x, -from_g), from_g)
        return x, math.sqrt(from_g**2 - x**2)

    found = {"G": (0.0, 0.0), "S": (base, 0.0), "T": across(lengths["TG"], lengths["TS"])}
    if not math.isnan(lengths.get("MG", math.nan)):
        x, y = across(lengths["MG"], lengths["MS"])
        found["M"] = (x, -y)
    return found


def svg(lengths: Mapping[str, float], described: str) -> str:
    """The drawing, `UNIT` pixels for a length of 1, with a bar of 0.5 to compare with.

    Args:
        lengths: as of `points`.
        described: for those who do not see it.
    """
    corners = {name: (UNIT * x, -UNIT * y) for name, (x, y) in points(lengths).items()}
    left, width = -2 * _PAD, UNIT * math.sqrt(2) + 5 * _PAD
    top = min(y for _, y in corners.values()) - _PAD
    bottom = max(y for _, y in corners.values()) + _PAD + 22
    lines = [_line(corners, pair, "") for pair in ("GS", "TS", "TG")]
    outline = " ".join(f"{x:.2f},{y:.2f}" for x, y in (corners[c] for c in "STG"))
    lines.insert(0, f'<polygon points="{outline}" fill="currentColor" fill-opacity="0.08"/>')
    if "M" in corners:
        lines += [_line(corners, pair, ' stroke-dasharray="4 3"') for pair in ("MS", "MG")]
    return (
        f'<svg role="img" aria-label="{escape(described)}" width="{width:.0f}" '
        f'height="{bottom - top:.0f}" viewBox="{left:.2f} {top:.2f} {width:.2f} '
        f'{bottom - top:.2f}">{"".join(lines)}'
        f"{''.join(_corner(name, *corners[name]) for name in corners)}"
        f"{_bar(left + _PAD / 2, bottom - 8)}</svg>"
    )


def _line(corners: Mapping[str, tuple[float, float]], pair: str, dashes: str) -> str:
    (x1, y1), (x2, y2) = (corners[name] for name in pair)
    return (
        f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" stroke="currentColor" '
        f'stroke-width="1.5"{dashes}/>'
    )


def _corner(name: str, x: float, y: float) -> str:
    """A dot and its letter, each letter on another side: dots may lie on each other."""
    dx, dy, anchor = {
        "G": (-9, 5, "end"), "S": (9, 5, "start"), "T": (0, -9, "middle"), "M": (0, 19, "middle"),
    }[name]  # fmt: skip
    return (
        f'<circle data-corner="{name}" cx="{x:.2f}" cy="{y:.2f}" r="5" fill="{_COLOURS[name]}">'
        f"<title>{name}: {_NAMES[name]}</title></circle>"
        f'<text x="{x + dx:.2f}" y="{y + dy:.2f}" text-anchor="{anchor}" font-size="15" '
        f'font-weight="600">{name}</text>'
    )


def _bar(x: float, y: float) -> str:
    return (
        f'<path d="M{x:.2f} {y - 4:.2f}v4h{UNIT / 2:.2f}v-4" fill="none" stroke="currentColor"/>'
        f'<text x="{x + UNIT / 2 + 6:.2f}" y="{y + 2:.2f}" font-size="12">0.5</text>'
    )
