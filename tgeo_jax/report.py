"""The report of finished runs: one self-contained HTML file, its figures also as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tgeo_jax import comparison, outcome, storage
from tgeo_jax.reporting import page
from tgeo_jax.reporting.facts import NONE, also_chosen
from tgeo_jax.workdir import Workdir


def write(runs: Mapping[str, Workdir], directory: storage.Path, title: str = "") -> storage.Path:
    """Writes index.html, which needs nothing else, and its charts as figures/*.png.

    Args:
        runs: finished runs by the name they are shown under.
        directory: made if missing.
        title: heading of the page; the runs' names if empty.

    Returns:
        The path of index.html.

    Raises:
        ValueError: a run that has not finished.
        DataError: a damaged file.
    """
    results = {name: page.finished(folder) for name, folder in runs.items()}
    chosen = also_chosen(results)
    heads = ["run", "seeds", "test accuracy (%), last", "best by validation", *_headings(chosen)]
    rows = [list(_row(name, result, chosen)) for name, result in results.items()]
    table = page.Table([*heads, "seconds"], rows)
    further = [list(row) for row in _measured(results)]
    measured = page.Table(["run", "figure", "last", "best by validation"], further)
    return page.write(runs, results, table, measured, directory, title)


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
    chosen = also_chosen(results)
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
    rows = _measured(results)
    heads = ("run", "figure", "last", "best by validation")
    return _aligned([heads, *rows], 2) if rows else ""


def _measured(results: Mapping[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, result in results.items():
        found = result.get("figures", {"last": {}})
        for figure in found["last"]:
            split, _, measured = figure.partition("/")
            is_new = measured != "accuracy" or split != "test"
            if split == "validation" or measured not in comparison.NAMES or not is_new:
                continue
            values = [comparison.decimal(found[w][figure]) for w in outcome.WHICH]
            rows.append((name, comparison.named(figure), *values))
    return rows


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
