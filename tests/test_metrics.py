import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
