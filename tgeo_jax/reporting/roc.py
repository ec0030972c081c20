"""The figure of face verification in a report: ROC curves of students and teachers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tgeo_jax import storage, verification
from tgeo_jax.reporting import style
from tgeo_jax.workdir import Workdir

_LINES = {"student": "-", "teacher": "--"}


def has_pairs(folder: Workdir) -> bool:
    """Whether a finished run has verified pairs.

    Examples:
        >>> import pathlib
        >>> has_pairs(Workdir(pathlib.Path("/nowhere")))
        False
    """
    return storage.exists(folder.verification)


def draw(runs: Mapping[str, Workdir]) -> Figure:
    """True over false accept rate, the latter on a logarithmic axis down to one pair.

    Args:
        runs: finished runs by the name they are shown under; all of them have pairs.

    Returns:
        The figure; of several seeds or networks the first is drawn, and the mean area named.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Workdir(pathlib.Path(folder))
        ...     same, similarity = np.array([True, True, False]), np.array([[0.9, 0.2, 0.5]])
        ...     storage.write_arrays(run.verification, {"same": same, "student": similarity})
        ...     figure = draw({"tgeo": run})
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'tgeo, student: area 0.5000'
    """
    figure = Figure(figsize=style.SIZE)
    axes: Any = figure.subplots()
    smallest = 1.0
    for index, (name, folder) in enumerate(runs.items()):
        stored = storage.read_arrays(folder.verification)
        same = stored["same"]
        smallest = min(smallest, 1 / (~same).sum())
        for role, line in _LINES.items():
            if role not in stored:
                continue
            curves = [verification.roc(one, same) for one in stored[role]]
            area = np.mean([curve.area for curve in curves])
            axes.step(
                np.maximum(curves[0].far, smallest / 2),
                curves[0].tar,
                line,
                where="post",
                color=style.COLOURS[index % len(style.COLOURS)],
                label=f"{name}, {role}: area {area:.4f}",
            )
    axes.set(
        xscale="log", xlim=(smallest / 2, 1), ylim=(0, 1.01),
        xlabel="false accept rate", ylabel="true accept rate",
    )  # fmt: skip
    style.legend_below(axes, columns=1)
    return figure
