"""The table of several methods, against SciPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from tgeo_jax import comparison
from tgeo_jax.outcome import mean_and_std


def result(aucs, accuracies=(0.9, 0.8, 0.85)) -> dict:
    best = {"mean": float(np.mean(accuracies)), "std": float(np.std(accuracies, ddof=1))}
    return {
        "test_accuracy": {"last": best, "best_by_validation": best},
        "figures": {"best_by_validation": {"test/auc": mean_and_std(aucs)}},
        "per_seed": [
            {"last": {"test/accuracy": accuracy}, "best_by_validation": {"test/auc": auc}}
            for accuracy, auc in zip(accuracies, aucs, strict=True)
        ],
        "seconds": 12.4,
    }


KD, NEW = [0.70, 0.72, 0.71], [0.71, 0.74, 0.72]
RESULTS = {"kd": result(KD), "new": result(NEW)}
AXES = {name: ("kl", name, "frozen") for name in RESULTS}


def test_a_figure_is_compared_seed_by_seed_at_the_chosen_epoch():
    lines = comparison.table(RESULTS, AXES, "kd", figures=("test/auc",)).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][-2:] == ["AUC, best by validation", "seconds"]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][-2] == "0.7100 ± 0.0100"
    p = scipy.stats.ttest_rel(NEW, KD).pvalue
    assert 0.01 < p < 0.1
    assert rows[3][-2] == f"0.7233 ± 0.0153 (+0.0133, p = {p:.2f})"


def test_without_further_figures_the_table_has_no_further_column():
    plain = comparison.table(RESULTS, AXES, "kd").splitlines()
    assert plain[0].count("|") == 9
    assert "AUC" not in plain[0]


def test_a_figure_that_was_not_measured_is_refused_by_name():
    with pytest.raises(ValueError, match=r"run 'kd' did not measure 'test/macro_f1'"):
        comparison.table(RESULTS, AXES, "kd", figures=("test/macro_f1",))
