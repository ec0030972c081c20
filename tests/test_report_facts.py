"""What a report says in words and tables."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from tests import finished_runs
from tgeo_jax.reporting import facts, figures


def _result(*accuracies: float, seeds=None, **others) -> dict:
    seeds = range(len(accuracies)) if seeds is None else seeds
    mean = {"mean": float(np.mean(accuracies)), "std": 0.01 if len(accuracies) > 1 else None}
    return {
        "per_seed": [
            {"seed": seed, "last": {"test/accuracy": value}}
            for seed, value in zip(seeds, accuracies, strict=True)
        ],
        "test_accuracy": {"last": mean, "best_by_validation": mean},
        **others,
    }


A, B, C = (0.90, 0.91, 0.95), (0.88, 0.90, 0.91), (0.5, 0.6, 0.7)


def test_the_best_is_named_with_its_lead_and_the_paired_test():
    told = facts.summary({"b": _result(*B), "c": _result(*C), "a": _result(*A)})
    p = scipy.stats.ttest_rel(A, B).pvalue  # 0.118
    assert told == [
        "Best accuracy after the last epoch: a, 92.00 ± 1.00 %, over 3 seeds.",
        "Next: b, 89.67 ± 1.00 %. The difference over 3 seeds that both have is 2.33 points "
        f"(paired t-test: p = {p:.3f}): it may be chance, at the 5 % level.",
        "Last of 3: c, 60.00 ± 1.00 %.",
    ]


def test_a_difference_that_is_more_than_chance_is_called_so():
    far = (0.80, 0.81, 0.855)
    assert scipy.stats.ttest_rel(A, far).pvalue < 0.05
    told = facts.summary({"a": _result(*A), "far": _result(*far)})
    assert "it is more than chance, at the 5 % level" in told[1]


def test_only_seeds_that_both_have_are_paired():
    others = _result(0.1, *B[1:], seeds=(7, 1, 2))
    by = facts.ranked({"a": _result(*A), "b": others})
    difference, p, seeds = facts.against(_result(*A), others, by)
    assert seeds == 2
    assert difference == pytest.approx(0.025)
    assert p == pytest.approx(scipy.stats.ttest_rel(A[1:], B[1:]).pvalue)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (_result(*B, seeds=(5, 6, 7)), "no seed in common"),
        (_result(0.89), "1 seed that both have is 1.00 points; one seed says nothing of chance"),
        (_result(0.88, 0.89, 0.93), "is 2.00 points, the same for each: no t-test can judge that"),
    ],
)
def test_what_cannot_be_tested_is_said(other, said):
    assert said in facts.summary({"a": _result(*A), "b": other})[1]


def test_one_run_has_nothing_to_be_compared_with():
    told = facts.summary({"a": _result(0.9, stopped_early=True, epochs=7)})
    assert told == [
        "Test accuracy after the last epoch: a, 90.00 %, over 1 seed.",
        "a stopped early, after 7 epochs.",
    ]


def test_runs_on_other_data_are_named():
    results = {name: _result(*A, dataset={"digest": "1"}) for name in ("a", "b")}
    assert not any("other data" in told for told in facts.summary(results))
    results["noisy"] = _result(*C, dataset={"digest": "2"})
    assert facts.summary(results)[-1] == "Trained on other data than a: noisy."


def _ranked_by_loss(loss: float) -> dict:
    figures_ = {"test/cross_entropy": {"mean": loss, "std": None}}
    return {
        **_result(1 - loss),
        "select_by": "cross_entropy",
        "figures": {"best_by_validation": figures_},
    }


def test_where_another_figure_chose_the_epoch_it_ranks_the_runs_and_less_loss_is_better():
    results = {"much": _ranked_by_loss(0.5), "little": _ranked_by_loss(0.25)}
    assert facts.ranked(results) == ("cross_entropy", "best_by_validation", ["little", "much"])
    told = facts.summary(results)
    assert told[0].startswith("Best log-loss at the epoch that validation chose: little, 0.2500,")


def test_a_run_that_diverged_is_last():
    results = {"nan": _result(float("nan")), "a": _result(0.1)}
    assert facts.ranked(results).names == ["a", "nan"]


def test_the_column_of_differences_is_against_the_best():
    column = facts.differences({"b": _result(*B), "a": _result(*A), "one": _result(0.5)})
    p = scipy.stats.ttest_rel(B, A).pvalue
    assert column == [f"-2.33 (p = {p:.3f})", "best", "-40.00"]


def test_costs_are_medians(tmp_path):
    folder = finished_runs.write(tmp_path / "run")
    table = facts.costs({"a": folder.result()}, {"a": figures.records_of(folder)})
    row = dict(zip(table.heads, table.rows[0], strict=True))
    assert row["median epoch seconds"] == "0.5"  # of 3.0, 0.5, 0.25
    assert row["samples per second"] == "200"  # of 100, 200, 300
    assert (row["seconds"], row["epochs"], row["device"]) == ("2", "3", "1 x cpu")


def test_the_environment_names_commit_and_data(tmp_path):
    folder = finished_runs.write(tmp_path / "run")
    table = facts.environment({"a": folder.result()})
    row = dict(zip(table.heads, table.rows[0], strict=True))
    assert row["commit"] == "0123456789ab-dirty"
    assert (row["dataset"], row["its digest"]) == ("digits", "f" * 12)


def test_configurations_differ_where_they_differ():
    shared = {"data": {"name": "digits"}, "seed": 0}
    one, two = shared | {"ratio": {"name": "tgeo"}}, shared | {"ratio": {"name": "ada"}, "new": 1}
    table = facts.config_differences({"one": one, "two": two})
    assert table.heads == ["field", "one", "two"]
    assert table.rows == [["new", facts.NONE, "1"], ["ratio.name", '"tgeo"', '"ada"']]


def test_trust_is_the_mean_ratio_of_each_seed_by_whether_its_teacher_is_right():
    arrays = {
        "ratio": np.array([[0.8, 0.2, 0.1, 0.5], [0.6, 0.4, 0.3, 0.7]]),
        "teacher_right": np.array([[True, False, False, True]]),
    }
    # Right: (.8 + .5 + .6 + .7) / 4; wrong: (.2 + .1 + .4 + .3) / 4.
    assert "0.650 where it is right (50 %), 0.250 where it is wrong (50 %)" in facts.trust(arrays)
