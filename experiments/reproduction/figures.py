"""A table as pictures: accuracies by row and column, and the ratio of outliers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.reproduction import outcomes
from experiments.reproduction.output import Finished
from experiments.reproduction.runs import DONE, Cell, Run
from tgeo_jax import storage
from tgeo_jax.reporting import style

_MARKERS = "osD^vPX"  # told apart without colours


def drawn(
    finished: Finished, cells: Sequence[Cell], runs: Mapping[str, Run]
) -> Iterator[tuple[str, bytes]]:
    """(what it shows, PNG) of each picture.

    Args:
        finished: the table.
        cells: its cells.
        runs: their runs.
    """
    with matplotlib.rc_context(style.RC):
        if any(found.seeds for found in finished.found.values()):
            draw = _by_column if len(finished.table.columns) > 2 else _by_row
            yield "accuracy", style.png(draw(finished))
        if "samples/outlier_ratio" in finished.table.figures:
            for cell in cells:
                if (figure := _outliers(cell, runs)) is not None:
                    yield f"outliers-{cell.column.name}-{cell.row.name}", style.png(figure)


def _by_column(finished: Finished) -> Figure:
    """A line for each row, over the columns in their order."""
    table = finished.table
    figure = Figure(figsize=(1.5 + 1.1 * len(table.columns), 4))
    axes = figure.subplots()
    places = np.arange(len(table.columns))
    for index, row in enumerate(table.rows):
        found = [finished.found[row.name, column.name] for column in table.columns]
        means, stds = _accuracies(found)
        axes.errorbar(
            places + 0.04 * (index - len(table.rows) / 2), means, stds, capsize=2, label=row.label,
            color=style.COLOURS[index % len(style.COLOURS)], linewidth=1,
            marker=_MARKERS[index % len(_MARKERS)], markersize=4,
        )  # fmt: skip
    labels = [column.label for column in table.columns]
    axes.set_xticks(places, labels, rotation=20, ha="right")
    axes.set(ylabel="test accuracy, last epoch (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _by_row(finished: Finished) -> Figure:
    """A panel for each column with a point for each row; ours stand out."""
    table = finished.table
    figure = Figure(figsize=(1.5 + 4 * len(table.columns), 1 + 0.32 * len(table.rows)))
    grid = figure.subplots(1, len(table.columns), squeeze=False, sharey=True)
    for axes, column in zip(grid[0], table.columns, strict=True):
        found = [finished.found[row.name, column.name] for row in table.rows]
        means, stds = _accuracies(found)
        for place, row in enumerate(table.rows):
            colour = style.COLOURS[1] if row.name in table.ours else style.COLOURS[0]
            axes.errorbar(means[place], place, xerr=stds[place], fmt="o", color=colour, capsize=2)
        axes.set_yticks(range(len(table.rows)), [row.label for row in table.rows])
        axes.set(xlabel="test accuracy, last epoch (%)", title=column.label)
    grid[0][0].invert_yaxis()
    return figure


def _accuracies(found: Sequence[outcomes.Found]) -> tuple[np.ndarray, np.ndarray]:
    """Means and deviations in percent; NaN, and no bar, where there are none."""
    means = [each.mean(outcomes.ACCURACY, outcomes.LAST) for each in found]
    stds = [each.std(outcomes.ACCURACY, outcomes.LAST) for each in found]
    return (
        100 * np.array([np.nan if mean is None else mean for mean in means]),
        100 * np.array([0.0 if std is None else std for std in stds]),
    )


def _outliers(cell: Cell, runs: Mapping[str, Run]) -> Figure | None:
    """How many outliers and others have which ratio, all seeds together; None of a constant one."""
    ratios: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for name in cell.runs:
        folder = runs[name].folder
        if runs[name].status()[0] != DONE or not storage.exists(folder.samples):
            return None
        ratio_SxN = storage.read_arrays(folder.samples)["ratio"]
        is_outlier_N = outcomes.outliers(folder, ratio_SxN.shape[1])
        for kind in ratios:
            ratios[kind].append(ratio_SxN[:, is_outlier_N == kind].ravel())
    outlying, other = (np.concatenate(ratios[kind]) for kind in (True, False))
    if not len(outlying) or np.ptp(other) < 1e-3:
        return None
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    for values, label, colour in (
        (other, f"images (mean {other.mean():.2f})", style.COLOURS[0]),
        (outlying, f"outliers (mean {outlying.mean():.2f})", style.COLOURS[1]),
    ):
        weights = np.full(len(values), 100 / len(values))
        axes.hist(
            values, bins=np.linspace(0, 1, 41).tolist(), weights=weights, alpha=0.65,
            color=colour, label=label,
        )  # fmt: skip
    axes.set(xlabel="ratio (0: the label, 1: the teacher)", ylabel="share (%)", xlim=(0, 1))
    axes.set(title=f"{cell.row.label}, {cell.column.label}")
    axes.legend()
    return figure
