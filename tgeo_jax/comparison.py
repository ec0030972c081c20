"""Methods side by side over the same seeds, as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

NAMES = {  # of what else is measured of a test split
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "auc": "AUC",
    "cross_entropy": "log-loss",
    "ece": "calibration error",
    **{f"tar_at_far_{rate}": f"TAR at FAR {rate}" for rate in ("0.1", "0.01", "0.001")},
}


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean difference of paired values, and how surprising it is.

    The p-value is that of the two-sided paired t-test of a mean difference of 0; NaN for fewer than
    two pairs, 1 where all pairs are equal.

    Args:
        a: one value for each seed.
        b: of the same seeds.

    Returns:
        (mean of a - b, p).

    Raises:
        ValueError: not as many values.

    References:
        The test that TGeo-KD (arXiv 2312.15112) reports at the 5 % level.

    Examples:
        >>> print("%.3f %.4f" % paired([0.9, 0.8, 0.7], [0.8, 0.6, 0.4]))
        0.200 0.0742
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: pairs need as many of both")
    difference = np.subtract(a, b)
    if len(a) < 2:
        return float(difference.mean()), float("nan")
    if not np.ptp(difference):
        return float(difference.mean()), 1.0 if difference[0] == 0 else 0.0
    return float(difference.mean()), float(scipy.stats.ttest_rel(a, b).pvalue)


def table(
    results: Mapping[str, dict[str, Any]],
    axes: Mapping[str, tuple[str, ...]],
    baseline: str,
    figures: Sequence[str] = (),
) -> str:
    """The Markdown table of several methods' results.

    Args:
        results: by name, as in result.json.
        axes: by name, what each chose: loss, ratio, role.
        baseline: name of the method that the others are compared with, seed by seed.
        figures: what to show besides, such as `test/auc` or `test_hard/macro_f1`.

    Returns:
        A table: test accuracy in percent, mean ± sample standard deviation over the seeds, after
        the last epoch and at the best validation accuracy; and the difference from the baseline
        after the last epoch, with the p-value of the paired t-test. Then each of the figures, at
        the epoch that validation chose, also against the baseline.

    Raises:
        ValueError: a figure that a run did not measure.

    Examples:
        >>> def result(*values):
        ...     last = {"mean": sum(values) / 2, "std": 0.01}
        ...     seeds = [{"last": {"test/accuracy": value}} for value in values]
        ...     return {"test_accuracy": {"last": last, "best_by_validation": last},
        ...             "per_seed": seeds, "seconds": 9.6}
        >>> both = {"kd": result(.9, .8), "new": result(.95, .83)}
        >>> print(table(both, {name: ("kl", "x", "frozen") for name in both}, "kd").splitlines()[3])
        | new | kl | x | frozen | 89.00 ± 1.00 | 89.00 ± 1.00 | +4.00 (p = 0.16) | 10 |
    """
    header: tuple[str, ...] = (
        "method",
        "loss",
        "ratio",
        "role",
        "last epoch",
        "best by validation",
    )
    shown = tuple(f"{named(figure)}, best by validation" for figure in figures)
    header = (*header, f"last, against {baseline}", *shown, "seconds")
    rows: list[tuple[str, ...]] = [header, ("---",) * len(header)]
    reference = _last(results[baseline])
    for name, result in results.items():
        against = "" if name == baseline else difference(paired(_last(result), reference))
        accuracy = result["test_accuracy"]
        rows.append(
            (
                name,
                *axes[name],
                percent(accuracy["last"]),
                percent(accuracy["best_by_validation"]),
                against,
                *(_beside(name, results, baseline, figure) for figure in figures),
                f"{result['seconds']:.0f}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def named(figure: str) -> str:
    """What a figure of a split is called in tables.

    Examples:
        >>> named("test/auc"), named("test_hard/macro_f1"), named("test/top5_accuracy")
        ('AUC', 'test_hard macro F1', 'top5_accuracy')
    """
    split, _, name = figure.partition("/")
    return ("" if split == "test" else f"{split} ") + NAMES.get(name, name)


def decimal(figure: dict[str, float | None]) -> str:
    """A figure with its deviation where there is one.

    Examples:
        >>> decimal({"mean": 0.71239, "std": None}), decimal({"mean": 0.5, "std": 0.01})
        ('0.7124', '0.5000 ± 0.0100')
    """
    mean, std = figure["mean"], figure["std"]
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def percent(accuracy: dict[str, float | None]) -> str:
    """A share as percent, with its deviation where there is one.

    Examples:
        >>> percent({"mean": 0.5, "std": None}), percent({"mean": 0.5, "std": 0.01})
        ('50.00', '50.00 ± 1.00')
    """
    mean, std = accuracy["mean"], accuracy["std"]
    assert mean is not None
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _last(result: dict[str, Any]) -> list[float]:
    return [seed["last"]["test/accuracy"] for seed in result["per_seed"]]


def _beside(name: str, results: Mapping[str, dict[str, Any]], baseline: str, figure: str) -> str:
    which = "best_by_validation"
    for each, result in results.items():
        if figure not in result["figures"][which]:
            raise ValueError(f"figures: run {each!r} did not measure {figure!r}")
    shown = decimal(results[name]["figures"][which][figure])
    if name == baseline:
        return shown
    own, reference = (
        [seed[which][figure] for seed in results[each]["per_seed"]] for each in (name, baseline)
    )
    difference, p = paired(own, reference)
    return f"{shown} ({difference:+.4f}{_surprise(p, ', ')})"


def difference(found: tuple[float, float]) -> str:
    """What `paired` found of two accuracies, in percent.

    Args:
        found: (mean difference, p).

    Examples:
        >>> difference((0.0123, 0.04)), difference((-0.00001, float("nan")))
        ('+1.23 (p = 0.04)', '+0.00')
    """
    mean, p = found
    surprise = _surprise(p)
    return f"{round(100 * mean, 2) + 0.0:+.2f}" + (f" ({surprise})" if surprise else "")


def _surprise(p: float, before: str = "") -> str:
    if np.isnan(p):
        return ""
    return before + ("p < 0.01" if p < 0.01 else f"p = {p:.2f}")
