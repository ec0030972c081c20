"""The report of finished runs: one self-contained HTML file, its figures also as PNG files."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tgeo_jax import comparison, metrics, outcome, roc_figure, storage, writers
from tgeo_jax.workdir import Workdir

NONE = "\N{EN DASH}"
# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SITUATIONS = (
    ("right_large_edge", "teacher right, large ST edge", _COLOURS[0], "-"),
    ("right_small_edge", "teacher right, small ST edge", _COLOURS[0], "--"),
    ("wrong_large_edge", "teacher wrong, large ST edge", _COLOURS[1], "-"),
    ("wrong_small_edge", "teacher wrong, small ST edge", _COLOURS[1], "--"),
)
_STYLE: Any = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def write(runs: Mapping[str, Workdir], directory: storage.Path, title: str = "") -> storage.Path:
    """Writes index.html and figures/*.png.

    Args:
        runs: finished runs by the name they are shown under.
        directory: made if missing.
        title: heading of the page; the runs' names if empty.

    Returns:
        The path of index.html.
    """
    figures_dir = directory / "figures"
    storage.make_folder(figures_dir)
    figures = []
    for name, heading, caption, figure in _figures(runs):
        png = io.BytesIO()
        figure.savefig(png, format="png", bbox_inches="tight")
        storage.write_atomically(figures_dir / f"{name}.png", png.getvalue())
        data = base64.b64encode(png.getvalue()).decode()
        figures.append({"name": name, "title": heading, "caption": caption, "data": data})
    results = {name: _result(folder) for name, folder in runs.items()}
    chosen = _choosing(results)
    template = jinja2.Template(
        (resources.files("tgeo_jax") / "templates" / "report.html").read_text(), autoescape=True
    )
    page = template.render(
        title=title or " · ".join(runs),
        headings=_headings(chosen),
        rows=[_row(name, result, chosen) for name, result in results.items()],
        measured=figures_table(results),
        figures=figures,
        runs=[
            {"name": name, "result": results[name], "config": folder.config()}
            for name, folder in runs.items()
        ],
    )
    index = directory / "index.html"
    storage.write_atomically(index, page)
    return index


def text_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Test accuracy in percent, mean ± standard deviation over seeds, and seconds, as plain text.

    Where another figure chose the epoch, that of the test split stands beside the accuracy.

    Examples:
        >>> accuracy = {"mean": 0.9, "std": 0.01}
        >>> result = {"seconds": 3.2, "per_seed": [0, 1],
        ...           "test_accuracy": {"last": accuracy, "best_by_validation": accuracy}}
        >>> print(text_table({"kd": result}))
        run  seeds  test accuracy, last  best by validation  seconds
        kd       2         90.00 ± 1.00        90.00 ± 1.00        3
    """
    chosen = _choosing(results)
    accuracies = ("test accuracy, last", "best by validation")
    rows = [_row(name, result, chosen) for name, result in results.items()]
    return _aligned([("run", "seeds", *accuracies, *_headings(chosen), "seconds"), *rows], 1)


def figures_table(results: Mapping[str, dict[str, Any]]) -> str:
    """What else was measured of the test splits: F1, AUC, log-loss, as plain text.

    Args:
        results: by name, as in result.json.

    Returns:
        Mean ± standard deviation over seeds, after the last epoch and at the one that validation
        chose; empty where older versions trained, which kept none of this.

    Examples:
        >>> auc = {"test/auc": {"mean": 0.91, "std": None}}
        >>> print(figures_table({"kd": {"figures": {"last": auc, "best_by_validation": auc}}}))
        run  figure    last  best by validation
        kd   AUC     0.9100              0.9100
    """
    rows: list[tuple[str, ...]] = [("run", "figure", "last", "best by validation")]
    for name, result in results.items():
        found = result.get("figures", {"last": {}})
        for figure in found["last"]:
            split, _, measured = figure.partition("/")
            is_new = measured != "accuracy" or split != "test"
            if split == "validation" or measured not in comparison.NAMES or not is_new:
                continue
            values = [comparison.decimal(found[w][figure]) for w in outcome.WHICH]
            rows.append((name, comparison.named(figure), *values))
    return _aligned(rows, 2) if len(rows) > 1 else ""


def _aligned(rows: Sequence[Sequence[str]], texts: int) -> str:
    """Columns of equal width, the first ones flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < texts else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _choosing(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """The figures besides accuracy that chose epochs."""
    names = (result.get("select_by", "accuracy") for result in results.values())
    return [name for name in dict.fromkeys(names) if name != "accuracy"]


def _headings(chosen: Sequence[str]) -> list[str]:
    return [f"test {comparison.NAMES[n]}, {which}" for n in chosen for which in ("last", "best")]


def _row(name: str, result: dict[str, Any], chosen: Sequence[str]) -> tuple[str, ...]:
    accuracy = result["test_accuracy"]
    figures = [
        result.get("figures", {}).get(which, {}).get(f"test/{figure}")
        for figure in chosen
        for which in outcome.WHICH
    ]
    return (
        name,
        str(len(result["per_seed"])),
        comparison.percent(accuracy["last"]),
        comparison.percent(accuracy["best_by_validation"]),
        *(NONE if found is None else comparison.decimal(found) for found in figures),
        f"{result['seconds']:.0f}",
    )


def _result(folder: Workdir) -> dict[str, Any]:
    result = folder.result()
    if result is None:
        raise ValueError(f"{folder.path}: not finished; a report is made of finished runs")
    return result


def _figures(runs: Mapping[str, Workdir]) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of everything there is to show."""
    with matplotlib.rc_context(_STYLE):
        yield (
            "accuracy",
            "Test accuracy",
            "Mean over seeds; bands are one standard deviation.",
            _accuracy(runs),
        )
        verified = {run: folder for run, folder in runs.items() if roc_figure.has_pairs(folder)}
        if verified:
            yield (
                "roc",
                "Verification of people who were never trained on",
                "First seed at the end of training; the area under the curve is the mean over "
                "seeds.",
                roc_figure.draw(verified, _COLOURS),
            )
        for run, folder in runs.items():
            slug = "".join(c if c.isalnum() else "_" for c in run.lower())
            for split, counts in _confusions(folder).items():
                yield (
                    f"confusion_{split}_{slug}",
                    f"{run}: what is taken for what, {split} split",
                    "After the last epoch, all seeds together: share of each class's examples "
                    "(row) by predicted class (column), in percent. The diagonal is the recall.",
                    _confusion(counts),
                )
            if not _learned_ratio(folder):
                continue
            yield (
                f"situations_{slug}",
                f"{run}: the ratio in four situations",
                "Mean weight of the teacher while training. Large and small: the edge between "
                "student and teacher above or below the batch's median. Where a situation has "
                "few samples in an epoch its line is jagged.",
                _situations(folder),
            )
            arrays = storage.read_arrays(folder.samples)
            yield (
                f"histogram_{slug}",
                f"{run}: the ratio of every training sample",
                "After training, on clean images, all seeds together.",
                _histogram(arrays),
            )
            if arrays["lowest_images"].ndim < 4:
                continue  # rows of a table are no pictures
            yield (
                f"samples_{slug}",
                f"{run}: where the teacher is trusted least and most",
                "First seed. Under each picture: the label, what the teacher says, and the ratio.",
                _extremes(arrays),
            )


def _confusions(folder: Workdir) -> dict[str, np.ndarray]:
    """Counts by test split, summed over seeds; of few classes, whose names and numbers fit."""
    counted = _result(folder).get("confusion", {}).get("last", {})
    found = {split: np.sum(counts, axis=0) for split, counts in counted.items()}
    return {k: total for k, total in found.items() if len(total) <= metrics.MOST_RECALLS}


def _learned_ratio(folder: Workdir) -> bool:
    """Whether the run had a ratio that differs between samples."""
    return (
        storage.exists(folder.samples)
        and np.ptp(storage.read_arrays(folder.samples)["ratio"]) > 1e-3
    )


def _accuracy(runs: Mapping[str, Workdir]) -> Figure:
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    for colour, (name, folder) in zip(_COLOURS * 9, runs.items(), strict=False):
        _band(axes, folder, "test/accuracy", name, colour, "-", percent=True)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    axes.legend()
    return figure


def _confusion(counts_KxK: np.ndarray) -> Figure:
    totals_Kx1 = counts_KxK.sum(axis=1, keepdims=True)
    shares_KxK = 100 * counts_KxK / np.maximum(totals_Kx1, 1)
    num_classes = len(counts_KxK)
    side = 2 + 0.42 * num_classes
    figure = Figure(figsize=(side, side))
    axes = figure.subplots()
    axes.imshow(shares_KxK, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares_KxK):
        if counts_KxK[row, column]:
            colour = "white" if share > 50 else "black"
            axes.text(
                column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8
            )
    axes.set(xlabel="predicted class", ylabel="class")
    axes.set(xticks=range(num_classes), yticks=range(num_classes))
    axes.grid(visible=False)
    return figure


def _situations(folder: Workdir) -> Figure:
    figure = Figure(figsize=(7, 3.8))
    axes = figure.subplots()
    for key, label, colour, line in _SITUATIONS:
        _band(axes, folder, f"train/ratio_{key}", label, colour, line)
    axes.set(xlabel="epoch", ylabel="mean ratio", ylim=(0, 1))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _band(
    axes: Any,
    folder: Workdir,
    field: str,
    label: str,
    colour: str,
    line: str,
    percent: bool = False,
) -> None:
    """Mean over seeds by epoch, with one standard deviation; over those seeds that measured it."""
    by_epoch: dict[float, list[float]] = {}
    for record in writers.read_records(folder.metrics):
        if field in record:
            by_epoch.setdefault(record["epoch"], []).append(record[field])
    if not by_epoch:
        return
    scale = 100 if percent else 1
    epochs = np.array(list(by_epoch))
    mean = scale * np.array([np.mean(values) for values in by_epoch.values()])
    std = scale * np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in by_epoch.values()])
    axes.plot(epochs, mean, line, color=colour, label=label)
    axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)


def _histogram(arrays: Any) -> Figure:
    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    right = np.broadcast_to(arrays["teacher_right"], arrays["ratio"].shape)
    axes.hist(
        [arrays["ratio"][right], arrays["ratio"][~right]],
        bins=np.linspace(0, 1, 41).tolist(),
        stacked=True,
        color=[_COLOURS[0], _COLOURS[1]],
        label=["teacher right", "teacher wrong"],
    )
    axes.set(xlabel="ratio (0: the label, 1: the teacher)", ylabel="samples x seeds", xlim=(0, 1))
    axes.legend()
    return figure


def _named(arrays: Any, index: int) -> tuple[str, str]:
    """The label of a sample and what the first teacher says, by name where names are known."""
    classes = arrays["label"][index], arrays["teacher_class"][0][index]
    names = arrays.get("class_names", ())
    label, said = (str(names[c] if len(names) else c).replace("_", " ") for c in classes)
    return label, said


def _extremes(arrays: Any) -> Figure:
    per_row = 8
    ends = (("lowest", "trusted least"), ("highest", "trusted most"))
    rows_of_end = -(-len(arrays["lowest"]) // per_row)
    figure = Figure(figsize=(7.6, 2.6 * rows_of_end + 0.6))
    halves: Any = figure.subfigures(2, 1, hspace=0.02)
    for half, (end, title) in zip(halves, ends, strict=True):
        half.suptitle(title, x=0.02, ha="left", weight="bold")
        half.subplots_adjust(left=0.02, right=0.98, wspace=0.15, hspace=0.5, top=0.78, bottom=0.02)
        grid = half.subplots(rows_of_end, per_row, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, index, image in zip(
            grid.flat, arrays[end], arrays[f"{end}_images"], strict=False
        ):
            axes.imshow(image.squeeze(), cmap="gray_r" if image.shape[-1] == 1 else None)
            label, said = _named(arrays, index)
            axes.set_title(
                f"{label}{', ' if len(label + said) < 8 else chr(10)}says {said}\n"
                f"{arrays['ratio'][0][index]:.2f}",
                fontsize=8,
                color=_COLOURS[0] if label == said else _COLOURS[1],
            )
    return figure
