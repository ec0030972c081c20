import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    log_loss,
    recall_score,
    top_k_accuracy_score,
)

from tgeo_jax import fusion, metrics


def test_means_add_up_over_uneven_batches():
    batches = [jnp.float32([1, 2, 3, 4]), jnp.float32([10]), jnp.float32([0, 2])]
    total = metrics.mean(batches[0])
    for batch in batches[1:]:
        total = jax.tree.map(operator.add, total, metrics.mean(batch))
    # (1 + 2 + 3 + 4 + 10 + 0 + 2) / 7, not the mean of the three means.
    assert metrics.summarise({"loss": total}) == {"loss": pytest.approx(22 / 7)}


def test_a_masked_sample_may_hold_nan_or_infinity():
    values = jnp.float32([1, np.nan, 3, np.inf])
    found = metrics.mean(values, jnp.array([True, False, True, False]))
    assert (float(found.total), float(found.count)) == (4.0, 2.0)


def test_an_unmasked_nan_is_not_hidden():
    assert np.isnan(metrics.mean(jnp.float32([1, np.nan]), jnp.array([True, True])).total)


def test_booleans_count_as_zeros_and_ones():
    found = metrics.mean(jnp.array([True, False, True, True]))
    assert (float(found.total), float(found.count)) == (3.0, 4.0)


def test_bfloat16_values_are_summed_in_float32():
    # In bfloat16 the sum of ones stays at 256.
    found = metrics.mean(jnp.ones(1000, jnp.bfloat16))
    assert (float(found.total), float(found.count)) == (1000.0, 1000.0)


@pytest.fixture(scope="module")
def four_samples():
    # Median of the edges is .5, so samples 1 and 3 have the large ones.
    return metrics.ratio_metrics(
        jnp.float32([0.11, 0.21, 0.41, 0.81]),
        jnp.array([True, True, False, False]),
        jnp.float32([0.1, 0.9, 0.2, 0.8]),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ratio", 0.385),  # 1.54 / 4
        ("ratio_teacher_right", 0.16),
        ("ratio_teacher_wrong", 0.61),
        ("ratio_right_large_edge", 0.21),
        ("ratio_right_small_edge", 0.11),
        ("ratio_wrong_large_edge", 0.81),
        ("ratio_wrong_small_edge", 0.41),
        # Deviations -.275, -.175, .025, .425: squares sum to .2875.
        ("ratio_std", (0.2875 / 4) ** 0.5),
    ],
)
def test_ratio_means_of_four_samples_by_hand(four_samples, name, expected):
    assert metrics.summarise(four_samples)[name] == pytest.approx(expected, rel=1e-5)


def test_ratio_histogram_counts_every_sample_in_its_bin(four_samples):
    counts = four_samples["ratio_histogram"].total
    # Bins are .02 wide: .11 is in [.10, .12), bin 5, and so on.
    assert np.flatnonzero(counts).tolist() == [5, 10, 20, 40]
    assert counts[jnp.array([5, 10, 20, 40])].tolist() == [1, 1, 1, 1]


def test_a_ratio_of_one_falls_into_the_last_bin():
    found = metrics.ratio_metrics(jnp.ones(3), jnp.array([True] * 3), jnp.arange(3.0))
    assert np.flatnonzero(found["ratio_histogram"].total).tolist() == [49]


def test_a_situation_without_samples_is_not_reported():
    found = metrics.ratio_metrics(
        jnp.float32([0.2, 0.8]), jnp.array([True, True]), jnp.float32([0.1, 0.9])
    )
    names = metrics.summarise(found)
    assert "ratio_right_large_edge" in names
    assert "ratio_teacher_wrong" not in names
    assert "ratio_wrong_large_edge" not in names


LOGITS = np.log(np.float32([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]))
LABELS = jnp.array([0, 0])
OUTER = metrics.Mean(jnp.float32(0), jnp.float32(0))


def seen(teacher_logits, soft, anchor=None):
    situation = fusion.Situation(
        LOGITS, teacher_logits, LABELS, -LOGITS[:, 0], jnp.float32(soft), None, 1, 9
    )
    weights = jnp.float32([0.25, 1]), jnp.float32([0.75, 0])
    return metrics.Seen(LOGITS, LABELS, -LOGITS[:, 0], situation, weights, anchor)


def test_of_several_teachers_the_mean_prediction_is_reported():
    # Each is wrong on the first sample by itself; their mean, (.45, .275, .275), is right.
    each = np.float32(
        [[[0.45, 0.55, 1e-9], [0.2, 0.3, 0.5]], [[0.45, 1e-9, 0.55], [0.4, 0.5, 0.1]]]
    )
    found = metrics.summarise(metrics.of_step(seen(np.log(each), [[1, 2], [5, 10]]), OUTER))
    assert found["teacher_loss"] == pytest.approx(-(np.log(0.45) + np.log(0.3)) / 2, rel=1e-5)
    assert found["ratio_teacher_right"] == pytest.approx(0.75)
    assert found["ratio_teacher_wrong"] == 0
    assert found["soft_loss"] == pytest.approx((3 + 6) / 2)
    assert found["hard_loss"] == pytest.approx(-(np.log(0.7) + np.log(0.1)) / 2, rel=1e-5)
    assert found["accuracy"] == 0.5


def test_an_anchors_loss_is_reported_where_there_is_one():
    with_anchor = metrics.of_step(seen(LOGITS, [1, 2], anchor=jnp.float32([3, 5])), OUTER)
    assert metrics.summarise(with_anchor)["anchor_student_loss"] == 4
    without = metrics.of_step(seen(LOGITS, [1, 2]), OUTER)
    assert "anchor_student_loss" not in without
    assert set(with_anchor) - set(without) == {"anchor_student_loss"}


def test_summarise_reports_the_quantiles_of_the_histogram():
    counts = np.zeros(50)
    counts[[0, 49]] = 10  # half of the values below .02, half above .98
    found = metrics.summarise({"ratio_histogram": metrics.Mean(counts, np.float32(20))})
    # A twentieth of all is a tenth of the first bin: .1 * .02; likewise from above.
    assert found == {
        "ratio_histogram": [10, *[0] * 48, 10],
        "ratio_q05": pytest.approx(0.002),
        "ratio_q50": pytest.approx(0.02),
        "ratio_q95": pytest.approx(0.998),
    }


def test_histograms_add_up_over_batches():
    random = np.random.RandomState(0)
    values = random.beta(2, 3, size=4000).astype(np.float32)
    histogram = jax.jit(lambda x: metrics.ratio_metrics(x, x > 0.5, x)["ratio_histogram"])
    total = jax.tree.map(operator.add, *map(histogram, np.split(values, 2)))
    found = metrics.summarise({"ratio_histogram": total})
    for name, share in (("ratio_q05", 0.05), ("ratio_q50", 0.5), ("ratio_q95", 0.95)):
        assert found[name] == pytest.approx(np.quantile(values, share), abs=1 / 50)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.25, 0.4, 0.5, 0.73, 0.95, 0.999])
def test_histogram_quantile_equals_that_of_values_spread_evenly_in_their_bins(share):
    counts = np.array([1000, 3000, 500, 0, 4000, 1500])
    width = 1 / len(counts)
    values = [(i + (np.arange(n) + 0.5) / n) * width for i, n in enumerate(counts)]
    expected = np.quantile(np.concatenate(values), share)
    assert metrics.histogram_quantile(counts, share) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.25), (1.0, 0.75)])
def test_extreme_quantiles_are_the_ends_of_the_filled_bins(share, expected):
    assert metrics.histogram_quantile(np.array([0, 2, 2, 0]), share) == expected


def test_the_last_quantile_of_uneven_float32_counts_is_the_upper_end():
    # Summed in float32, these shares end below 1.
    assert metrics.histogram_quantile(np.full(50, 0.1, np.float32), 1.0) == pytest.approx(1.0)


# Of predictions in evaluation: 300 samples of 10 classes, some of them easy.

RANDOM = np.random.RandomState(0)
TRUE = RANDOM.randint(0, 10, 300)
STUDENT, TEACHER = (
    (4 * RANDOM.rand() * np.eye(10)[TRUE] + 2 * RANDOM.randn(300, 10)).astype(np.float32)
    for _ in range(2)
)
STUDENT_PROBS, TEACHER_PROBS = (
    scipy.special.softmax(logits.astype(np.float64), axis=1) for logits in (STUDENT, TEACHER)
)
of_logits = jax.jit(metrics.of_logits)


def evaluated(logits, labels, is_real=None, teacher=None) -> dict[str, float]:
    is_real = np.ones(len(labels), bool) if is_real is None else np.asarray(is_real)
    sums = of_logits(np.float32(logits), np.int32(labels), is_real, teacher)
    return metrics.summarise(jax.device_get(sums))


def calibration_error(probs, labels) -> float:
    """Sum over bins of |accuracy - mean confidence|, weighted by the bin's share of samples."""
    error = 0.0
    for m in range(15):
        own = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probs, labels, strict=True)
            if m / 15 < row.max() <= (m + 1) / 15
        ]
        if own:
            confidence, right = np.mean(own, axis=0)
            error += len(own) / len(labels) * abs(right - confidence)
    return error


def test_accuracies_and_likelihood_are_those_of_scikit_learn():
    found = evaluated(STUDENT, TRUE)
    assert found["accuracy"] == pytest.approx(accuracy_score(TRUE, STUDENT.argmax(1)))
    assert found["top5_accuracy"] == pytest.approx(top_k_accuracy_score(TRUE, STUDENT, k=5))
    assert found["cross_entropy"] == pytest.approx(log_loss(TRUE, STUDENT_PROBS), rel=1e-5)
    assert found["accuracy"] < found["top5_accuracy"] < 1


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_the_calibration_error_is_that_of_its_definition(sharpness):
    probs = scipy.special.softmax(sharpness * STUDENT.astype(np.float64), axis=1)
    expected = calibration_error(probs, TRUE)
    assert expected > 0.01
    assert evaluated(sharpness * STUDENT, TRUE)["ece"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("confidences", "right", "expected"),
    [
        # .9 twice is right once, .6 twice is right twice: (2 |.5 - .9| + 2 |1 - .6|) / 4.
        ([0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1], 0.4),
        # In one bin, [.6, .667), errors of opposite sign cancel: |1 + 0 - .61 - .65| / 2.
        ([0.61, 0.65], [1, 0], 0.13),
        # In two bins they do not: (|1 - .6| + |0 - .9|) / 2.
        ([0.6, 0.9], [1, 0], 0.65),
    ],
)
def test_calibration_by_hand(confidences, right, expected):
    found = evaluated(np.log([[p, 1 - p] for p in confidences]), 1 - np.array(right))
    assert found["ece"] == pytest.approx(expected, abs=1e-5)


def test_who_is_certain_is_in_the_last_bin():
    sums = of_logits(np.float32([[200, 0]] * 3), np.int32([0, 0, 1]), np.ones(3, bool))
    np.testing.assert_allclose(sums["calibration"].total, [0] * 14 + [1])  # 3 - 2
    assert metrics.summarise(jax.device_get(sums))["ece"] == pytest.approx(1 / 3)


def test_agreement_with_the_teacher_by_hand():
    student = [[2, 1, 0], [0, 3, 1], [0, 1, 5], [1, 0, 0]]
    teacher = np.float32([[9, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]])
    # Top classes 0, 1, 2, 0 and 0, 0, 2, 2, whoever is right.
    assert evaluated(student, [1, 1, 1, 1], teacher=teacher)["teacher_agreement"] == 0.5


def test_divergence_from_the_teacher_is_that_of_scipy():
    expected = scipy.stats.entropy(TEACHER_PROBS, STUDENT_PROBS, axis=1).mean()
    found = evaluated(STUDENT, TRUE, teacher=TEACHER)
    assert found["teacher_kl"] == pytest.approx(expected, rel=1e-4)


def test_a_student_like_its_teacher_agrees_and_does_not_diverge():
    found = evaluated(STUDENT, TRUE, teacher=STUDENT + 3)
    assert found["teacher_agreement"] == 1
    assert found["teacher_kl"] == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_nothing_is_said_of_one():
    names = set(evaluated(STUDENT, TRUE))
    recalls = {f"recall_{label}" for label in range(10)}
    assert names == {"accuracy", "top5_accuracy", "cross_entropy", "ece", "macro_f1"} | recalls
    assert set(evaluated(STUDENT, TRUE, teacher=TEACHER)) - names == {
        "teacher_agreement",
        "teacher_kl",
    }


@pytest.mark.parametrize("padding", [0.0, 1e30, np.nan, np.inf])
def test_padding_never_counts(padding):
    is_real = RANDOM.rand(300) < 0.7
    logits, teacher = (np.where(is_real[:, None], x, padding) for x in (STUDENT, TEACHER))
    found = evaluated(logits, TRUE, is_real, np.float32(teacher))
    assert found == pytest.approx(
        evaluated(STUDENT[is_real], TRUE[is_real], teacher=TEACHER[is_real]), rel=1e-5
    )


def test_a_batch_of_padding_alone_measures_nothing():
    assert evaluated(STUDENT[:3], TRUE[:3], [False] * 3, TEACHER[:3]) == {}


def test_sums_over_uneven_batches_are_those_of_the_whole():
    real = np.ones(300, bool)
    parts = [
        of_logits(STUDENT[part], TRUE[part], real[part], TEACHER[part])
        for part in (slice(0, 1), slice(1, 100), slice(100, 300))
    ]
    total = jax.tree.map(lambda *values: sum(values), *parts)
    assert metrics.summarise(jax.device_get(total)) == pytest.approx(
        evaluated(STUDENT, TRUE, teacher=TEACHER), rel=1e-5
    )


@pytest.mark.parametrize(
    ("classes", "names"), [(2, {"auc"}), (3, set()), (5, set()), (6, {"top5_accuracy"})]
)
def test_top_five_needs_more_than_five_classes_and_auc_has_two(classes, names):
    found = evaluated(STUDENT[:, :classes], TRUE % classes)
    recalls = {f"recall_{label}" for label in range(classes)}
    assert set(found) == {"accuracy", "cross_entropy", "ece", "macro_f1"} | recalls | names


@pytest.mark.parametrize(
    ("classes", "figures", "recalls"), [(20, 1, 20), (21, 1, 0), (100, 1, 0), (101, 0, 0)]
)
def test_many_classes_have_no_confusion_matrix_and_fewer_no_recalls(classes, figures, recalls):
    found = evaluated(RANDOM.randn(50, classes), RANDOM.randint(0, classes, 50))
    assert ("macro_f1" in found) == figures
    assert sum(name.startswith("recall_") for name in found) == recalls


@pytest.mark.parametrize("present", [[0, 1, 2, 3], [1, 3], [2]])
def test_figures_of_absent_classes_are_those_of_scikit_learn(present):
    """Of five classes some have no example, and class 4 is never predicted either."""
    labels, logits = RANDOM.choice(present, 60), RANDOM.randn(60, 5)
    logits[:, 4] = -9
    found, said = evaluated(logits, labels), logits.argmax(1)
    common = {"labels": range(5), "zero_division": 0}
    assert found["macro_f1"] == pytest.approx(f1_score(labels, said, average="macro", **common))
    expected = recall_score(labels, said, average=None, **common)
    assert [found[f"recall_{label}"] for label in range(5)] == pytest.approx(expected)


def test_figures_of_six_examples_by_hand():
    # Labels 0 0 0 1 1 2, said 0 0 1 1 1 1: of class 1 two are right, two are wrong.
    found = evaluated(np.eye(3)[[0, 0, 1, 1, 1, 1]], [0, 0, 0, 1, 1, 2])
    assert [found[f"recall_{label}"] for label in range(3)] == pytest.approx([2 / 3, 1, 0])
    # F1: 2*2/(3+2), 2*2/(2+4), 0.
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_counts_beyond_float32_stay_exact():
    one = metrics.Mean(np.int32([[2**24, 0], [0, 0]]), np.int32(2**24))
    more = metrics.Mean(np.int32([[1, 0], [0, 2]]), np.int32(3))
    total = metrics.add_up([{"confusion": one}, {"confusion": more}])["confusion"].total
    assert total.tolist() == [[2**24 + 1, 0], [0, 2]]


def test_auc_does_not_tie_what_probabilities_round_to_one():
    """Sigmoids of 20 and 30 are the same float32; their odds are not."""
    found = evaluated([[0, 20], [0, 30], [5, 0]], [0, 1, 0])
    assert found["auc"] == 1


def test_a_nan_score_is_not_ranked():
    assert np.isnan(evaluated([[0, 1], [np.nan, 0], [1, 0]], [1, 1, 0])["auc"])


@pytest.mark.parametrize("label", [0, 1])
def test_without_both_classes_there_is_no_auc(label):
    assert "auc" not in evaluated(STUDENT[:9, :2], [label] * 9)


def test_of_equal_logits_the_first_classes_come_first():
    # Eight classes: the first five are the top five, the first is the top one.
    found = evaluated(np.zeros((8, 8)), np.arange(8))
    assert (found["accuracy"], found["top5_accuracy"]) == (1 / 8, 5 / 8)
    # Class 7 is above; of the others the first four are left.
    found = evaluated(np.eye(8)[[7] * 8], np.arange(8))
    assert (found["accuracy"], found["top5_accuracy"]) == (1 / 8, 5 / 8)


def test_nan_logits_show_in_likelihood_calibration_and_divergence():
    broken = STUDENT.copy()
    broken[17, 3] = np.nan
    found = evaluated(broken, TRUE, teacher=TEACHER)
    for name in ("cross_entropy", "ece", "teacher_kl"):
        assert np.isnan(found[name])


def test_nan_logits_are_not_among_the_five_highest():
    broken = np.full((10, 10), np.nan)
    assert evaluated(broken, np.arange(10))["top5_accuracy"] == 0
