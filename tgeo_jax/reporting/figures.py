"""The figures of a report, drawn from what runs leave in their folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tgeo_jax import comparison, metrics, writers
from tgeo_jax.reporting import roc, style
from tgeo_jax.workdir import Workdir

Records = list[dict[str, Any]]
_SITUATIONS = (
    ("right_large_edge", "teacher right, large ST edge", style.RIGHT, "-"),
    ("right_small_edge", "teacher right, small ST edge", style.RIGHT, "--"),
    ("wrong_large_edge", "teacher wrong, large ST edge", style.WRONG, "-"),
    ("wrong_small_edge", "teacher wrong, small ST edge", style.WRONG, "--"),
)
_PIXELS = 400  # columns of the picture of the ratio over epochs


class Drawn(NamedTuple):
    """A figure and what is said of it."""

    name: str  # of its file
    title: str
    caption: str
    figure: Figure


def of_all(
    runs: Mapping[str, Workdir], records: Mapping[str, Records], also: Sequence[str] = ()
) -> Iterator[Drawn]:
    """The figures that show all runs together: curves of accuracy and of what else is named."""
    bands = "Mean over seeds; bands are one standard deviation."
    yield Drawn(
        "accuracy",
        "Test accuracy",
        bands,
        curves(records, "test/accuracy", "test accuracy (%)", scale=100),
    )
    for figure in also:
        label = f"test {comparison.NAMES[figure]}"
        title = label[0].upper() + label[1:]
        yield Drawn(figure, title, bands, curves(records, f"test/{figure}", label))
    verified = {name: folder for name, folder in runs.items() if roc.has_pairs(folder)}
    if verified:
        yield Drawn(
            "roc",
            "Verification of people who were never trained on",
            "First seed at the end of training; the area under the curve is the mean over seeds.",
            roc.draw(verified),
        )


def of_ratio(slug: str, records: Records, arrays: Mapping[str, np.ndarray]) -> Iterator[Drawn]:
    """What became of the ratio of one run, and of each of its samples."""
    yield Drawn(
        f"situations_{slug}",
        "The ratio in four situations",
        "Mean weight of the teacher while training. Large and small: the edge between student and "
        "teacher above or below the batch's median. Where a situation has few samples in an epoch "
        "its line is jagged.",
        situations(records),
    )
    if any("train/ratio_q50" in record for record in records):
        shades = (
            "Of all samples as they were trained on, all seeds together: the stronger the shade, "
            "the more of them have that ratio. "
        )
        lines = "Lines: the median and the ends of the middle nine tenths, mean over seeds."
        has_shades = any("train/ratio_histogram" in record for record in records)
        caption = shades + lines if has_shades else lines
        yield Drawn(f"epochs_{slug}", "The ratio over epochs", caption, over_epochs(records))
    yield Drawn(
        f"histogram_{slug}",
        "The ratio of every training sample",
        "After training, on clean images, all seeds together.",
        histogram(arrays),
    )


def confusions(slug: str, result: Mapping[str, Any]) -> Iterator[Drawn]:
    """What is taken for what, of few classes, whose names and numbers fit."""
    for split, counts in result.get("confusion", {}).get("last", {}).items():
        total = np.sum(counts, axis=0)
        if len(total) <= metrics.MOST_RECALLS:
            yield Drawn(
                f"confusion_{split}_{slug}",
                f"What is taken for what, {split} split",
                "After the last epoch, all seeds together: share of each class's examples (row) "
                "by predicted class (column), in percent. The diagonal is the recall.",
                confusion(total),
            )


def curves(records: Mapping[str, Records], field: str, label: str, scale: float = 1) -> Figure:
    """A figure by epoch, of every run."""
    figure = Figure(figsize=style.SIZE)
    axes = figure.subplots()
    for index, (name, own) in enumerate(records.items()):
        colour, line = style.line(index)
        _band(axes, own, field, name, colour, line, scale)
    axes.set(xlabel="epoch", ylabel=label)
    if axes.lines:
        style.legend_below(axes)
    return figure


def situations(records: Records) -> Figure:
    """The mean ratio of teacher right or wrong, student near or far, by epoch."""
    figure = Figure(figsize=style.SIZE)
    axes = figure.subplots()
    for key, label, colour, line in _SITUATIONS:
        _band(axes, records, f"train/ratio_{key}", label, colour, line)
    axes.set(xlabel="epoch", ylabel="mean ratio", ylim=(0, 1))
    if axes.lines:
        style.legend_below(axes)
    return figure


def by_epoch(records: Records, field: str) -> tuple[np.ndarray, list[list[Any]]]:
    """The epochs at which a field was measured, and its values of the seeds that have it."""
    found: dict[float, list[Any]] = {}
    for record in records:
        if field in record:
            found.setdefault(record["epoch"], []).append(record[field])
    return np.array(list(found)), list(found.values())


def _band(
    axes: Any, records: Records, field: str, label: str, colour: str, line: str, scale: float = 1
) -> None:
    """Mean over seeds by epoch, with one standard deviation; over those seeds that measured it."""
    epochs, values = by_epoch(records, field)
    if not len(epochs):
        return
    mean = scale * np.array([np.mean(each) for each in values])
    std = scale * np.array([np.std(each, ddof=1) if len(each) > 1 else 0.0 for each in values])
    axes.plot(epochs, mean, line, color=colour, label=label)
    axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def over_epochs(records: Records) -> Figure:
    """Histogram of the ratio by epoch, as shades, under its quantiles.

    Runs of older versions kept the quantiles only: theirs have no shades.
    """
    figure = Figure(figsize=style.SIZE)
    axes = figure.subplots()
    shares, ends = histograms(records)
    if len(ends):
        middles = (np.arange(_PIXELS) + 0.5) * ends[-1] / _PIXELS
        columns = shares[np.searchsorted(ends, middles)]
        shades = np.ones((*columns.T.shape, 4))
        shades[..., :3] = to_rgb(style.COLOURS[0])
        # By the root, so that a few samples are seen beside many.
        shades[..., 3] = 0.9 * np.sqrt(columns.T / shares.max())
        axes.imshow(
            shades, extent=(0, ends[-1], 0, 1), origin="lower", aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
    for percent, label, line in ((95, "95 %", ":"), (50, "median", "-"), (5, "5 %", ":")):
        epochs, values = by_epoch(records, f"train/ratio_q{percent:02d}")
        means = [np.mean(each) for each in values]
        axes.plot(epochs, means, line, color="black", linewidth=1.2, label=label)
    axes.set(xlabel="epoch", ylabel="ratio", ylim=(0, 1), xlim=(0, None))
    axes.grid(visible=False)
    style.legend_below(axes, columns=3)
    return figure


def histograms(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the ratio's bins by epoch, all seeds together.

    Returns:
        shares_ExR, rows summing to 1, NaN-free; and the epochs they end at. Empty where none
        were kept. An epoch of an older version's first part counts into none.
    """
    epochs, values = by_epoch(records, "train/ratio_histogram")
    if not len(epochs):
        return np.zeros((0, metrics.RATIO_BINS)), epochs
    counts = np.array([np.sum(each, axis=0) for each in values], float)
    first = min(record["epoch"] for record in records)
    if epochs[0] > first:  # what came before the first kept one stays blank
        before = max(record["epoch"] for record in records if record["epoch"] < epochs[0])
        epochs = np.concatenate([[before], epochs])
        counts = np.concatenate([np.zeros((1, counts.shape[1])), counts])
    return counts / np.maximum(counts.sum(1, keepdims=True), 1), epochs


def histogram(arrays: Mapping[str, np.ndarray]) -> Figure:
    """The ratio of every sample after training, by whether the teacher is right."""
    figure = Figure(figsize=style.SIZE)
    axes = figure.subplots()
    right = np.broadcast_to(arrays["teacher_right"], arrays["ratio"].shape)
    axes.hist(
        [arrays["ratio"][right], arrays["ratio"][~right]],
        bins=np.linspace(0, 1, 41).tolist(),
        stacked=True,
        color=[style.RIGHT, style.WRONG],
        label=["teacher right", "teacher wrong"],
    )
    axes.set(xlabel="ratio (0: the label, 1: the teacher)", ylabel="samples x seeds", xlim=(0, 1))
    style.legend_below(axes)
    return figure


def confusion(counts_KxK: np.ndarray) -> Figure:
    """Shares of each row in percent, as numbers on shades."""
    totals_Kx1 = counts_KxK.sum(axis=1, keepdims=True)
    shares_KxK = 100 * counts_KxK / np.maximum(totals_Kx1, 1)
    num_classes = len(counts_KxK)
    side = 1.4 + 0.36 * num_classes
    figure = Figure(figsize=(side, side))
    axes = figure.subplots()
    shades = np.ones((num_classes, num_classes, 4))
    shades[..., :3] = to_rgb(style.COLOURS[0])
    shades[..., 3] = 0.7 * shares_KxK / 100  # light enough for the numbers in either mode
    axes.imshow(shades)
    for (row, column), share in np.ndenumerate(shares_KxK):
        if counts_KxK[row, column]:
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8)
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set(xticks=range(num_classes), yticks=range(num_classes))
    axes.grid(visible=False)
    return figure


def records_of(folder: Workdir) -> Records:
    """What the run logged."""
    return writers.read_records(folder.metrics)
