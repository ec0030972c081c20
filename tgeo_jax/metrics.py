"""Metrics as (sum, count) pairs, so that they add up exactly over steps, batches and devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tgeo_jax import fusion, geometry, losses, numeric, roles

Array = jax.Array
CALIBRATION_BINS = 15
RATIO_BINS = 50  # over [0, 1]; quantiles of the ratio are therefore good to 0.02


class Mean(struct.PyTreeNode):
    """A mean that can still be added to: `total / count`; a zero count means "not measured"."""

    total: Array
    count: Array


def mean(values_B: Array, where_B: Array | None = None) -> Mean:
    """Sum and count of values, optionally only of those selected.

    Args:
        values_B: one number per sample.
        where_B: boolean or 0/1 selection of the same shape; all by default.

    Returns:
        A `Mean` of float32 scalars.

    Examples:
        >>> found = mean(jnp.array([1., 2., 6.]), jnp.array([True, True, False]))
        >>> print(found.total, found.count)
        3.0 2.0
    """
    weight_B = jnp.ones(values_B.shape) if where_B is None else where_B.astype(jnp.float32)
    # where, not a product: a masked sample may hold inf or NaN.
    selected_B = jnp.where(weight_B > 0, values_B.astype(jnp.float32), 0.0)
    return Mean(jnp.sum(selected_B * weight_B), jnp.sum(weight_B))


class Seen(NamedTuple):
    """What a step saw of each sample; None where nobody teaches, or nothing anchors."""

    logits_BxK: Array
    labels_B: Array
    hard_B: Array
    situation: fusion.Situation | None
    weights: tuple[Array, Array] | None
    anchor_B: Array | None = None


def of_step(seen: Seen, outer: Mean) -> dict[str, Mean]:
    """All metrics of one training step.

    Args:
        seen: what the step saw.
        outer: the outer loss, with a count of 0 where there was none.

    Returns:
        `hard_loss` and `accuracy`; with a teacher also `soft_loss`, `teacher_loss` (its
        cross-entropy), `outer_loss` and those of `ratio_metrics`; with an anchor
        `anchor_student_loss`. Several teachers count as the mean of their predictions, their
        soft losses as their mean.

    Examples:
        >>> logits, labels = jnp.eye(2), jnp.array([0, 0])
        >>> seen = Seen(logits, labels, losses.cross_entropy(logits, labels), None, None)
        >>> found = of_step(seen, Mean(0.0, 0.0))
        >>> print(found["accuracy"].total / found["accuracy"].count)
        0.5
    """
    right_B = jnp.argmax(seen.logits_BxK, axis=-1) == seen.labels_B
    found = {"hard_loss": mean(seen.hard_B), "accuracy": mean(right_B)}
    if seen.situation is None or seen.weights is None:
        return found
    teacher_logits_BxK, soft_B = seen.situation.teacher_logits_BxK, seen.situation.soft_B
    if teacher_logits_BxK.ndim == 3:
        teacher_logits_BxK = roles.mean_prediction(teacher_logits_BxK)
        soft_B = soft_B.mean(axis=0)
    if seen.anchor_B is not None:
        found["anchor_student_loss"] = mean(seen.anchor_B)
    return found | {
        "soft_loss": mean(soft_B),
        "teacher_loss": mean(losses.cross_entropy(teacher_logits_BxK, seen.labels_B)),
        "outer_loss": outer,
        **ratio_metrics(
            fusion.teacher_share(*seen.weights),
            jnp.argmax(teacher_logits_BxK, axis=-1) == seen.labels_B,
            geometry.student_teacher_edge(seen.logits_BxK, teacher_logits_BxK),
        ),
    }


def of_logits(
    logits_BxK: Array,
    labels_B: Array,
    is_real_B: Array,
    teacher_logits_BxK: Array | None = None,
) -> dict[str, Mean]:
    """What is measured of predictions in evaluation.

    Args:
        logits_BxK: in evaluation mode.
        labels_B: class indices.
        is_real_B: False for padding, which does not count.
        teacher_logits_BxK: the teacher's on the same images, if there is one.

    Returns:
        `accuracy`, `cross_entropy`, `calibration` (the sum of `confidence - right` in each of
        `CALIBRATION_BINS` bins of confidence, from which `summarise` makes `ece`), with K > 5
        `top5_accuracy`, and with a teacher's logits `teacher_agreement` and
        `teacher_kl` = KL(teacher || student) at temperature 1.

    References:
        Expected calibration error: Guo et al. 2017, arXiv 1706.04599, equation 3, with 15 bins.

    Examples:
        >>> logits, labels = 5 * jnp.eye(6), jnp.arange(6).at[0].set(5)
        >>> found = of_logits(logits, labels, jnp.ones(6, bool))
        >>> print(found["accuracy"].total, found["top5_accuracy"].total)
        5.0 5.0
    """
    logits_BxK = numeric.at_least_float32(logits_BxK)
    top_B = jnp.argmax(logits_BxK, axis=-1)
    right_B = top_B == labels_B
    confidence_B = jnp.exp(jnp.max(jax.nn.log_softmax(logits_BxK), axis=-1))
    bin_B = jnp.clip((confidence_B * CALIBRATION_BINS).astype(jnp.int32), 0, CALIBRATION_BINS - 1)
    gap_B = jnp.where(is_real_B, confidence_B - right_B, 0)
    found = {
        "accuracy": mean(right_B, is_real_B),
        "cross_entropy": mean(losses.cross_entropy(logits_BxK, labels_B), is_real_B),
        "calibration": Mean(
            jnp.zeros(CALIBRATION_BINS, gap_B.dtype).at[bin_B].add(gap_B),
            jnp.sum(is_real_B.astype(jnp.float32)),
        ),
    }
    if logits_BxK.shape[-1] > 5:
        own_B = jnp.take_along_axis(logits_BxK, labels_B[:, None], axis=-1)
        # As in a stable sort: equal logits in the order of their indices; what is NaN is last.
        later = jnp.arange(logits_BxK.shape[-1])[None, :] >= labels_B[:, None]
        after = (logits_BxK < own_B) | (later & (logits_BxK == own_B))
        rank_B = jnp.sum(~after, axis=-1)
        found["top5_accuracy"] = mean(rank_B < 5, is_real_B)
    if teacher_logits_BxK is not None:
        agrees_B = top_B == jnp.argmax(teacher_logits_BxK, axis=-1)
        kl_B = losses.kl(logits_BxK, teacher_logits_BxK, temperature=1.0)
        found["teacher_agreement"] = mean(agrees_B, is_real_B)
        found["teacher_kl"] = mean(kl_B, is_real_B)
    return found


def ratio_metrics(ratio_B: Array, teacher_right_B: Array, st_edge_B: Array) -> dict[str, Mean]:
    """What is logged of a ratio: mean, spread, histogram, and its mean in four situations.

    The situations are teacher right or wrong, times the student-teacher edge above the batch's
    median ("large") or not ("small"): figure 2 of TGeo-KD's paper.

    Args:
        ratio_B: ratio of each sample, in [0, 1].
        teacher_right_B: whether the teacher's top class is the true one.
        st_edge_B: length of the student-teacher edge, >= 0.

    Returns:
        Named `Mean`s; `ratio_variance` is within the batch, `ratio_histogram` holds [RATIO_BINS]
        fractions.

    Examples:
        >>> found = ratio_metrics(jnp.array([.2, .8]), jnp.array([False, True]), jnp.ones(2))
        >>> print(found["ratio_teacher_wrong"].total)
        0.2
    """
    large_B = st_edge_B > jnp.median(st_edge_B)
    bins_B = jnp.clip((ratio_B * RATIO_BINS).astype(jnp.int32), 0, RATIO_BINS - 1)
    counts = jax.nn.one_hot(bins_B, RATIO_BINS).sum(0)
    right_B, wrong_B = teacher_right_B, ~teacher_right_B
    return {
        "ratio": mean(ratio_B),
        "ratio_variance": mean((ratio_B - ratio_B.mean()) ** 2),
        "ratio_histogram": Mean(counts, jnp.asarray(float(ratio_B.size))),
        "ratio_teacher_right": mean(ratio_B, right_B),
        "ratio_teacher_wrong": mean(ratio_B, wrong_B),
        "ratio_right_large_edge": mean(ratio_B, right_B & large_B),
        "ratio_right_small_edge": mean(ratio_B, right_B & ~large_B),
        "ratio_wrong_large_edge": mean(ratio_B, wrong_B & large_B),
        "ratio_wrong_small_edge": mean(ratio_B, wrong_B & ~large_B),
    }


def summarise(sums: dict[str, Mean]) -> dict[str, float]:
    """Numbers to log from summed metrics; what was never measured is left out.

    `ratio_variance` becomes `ratio_std`, `ratio_histogram` the quantiles `ratio_q05`, `ratio_q50`
    and `ratio_q95` (interpolated within a bin), `calibration` the expected calibration error `ece`.

    Args:
        sums: named `Mean`s of NumPy scalars (the histogram's total is an array).

    Returns:
        Plain floats by name.

    Examples:
        >>> summarise({"loss": Mean(np.float32(3), np.float32(2)), "x": Mean(0., 0.)})
        {'loss': 1.5}
    """
    found: dict[str, float] = {}
    for name, summed in sums.items():
        total, count = summed.total, summed.count
        if not count > 0:
            continue
        if name == "ratio_histogram":
            for percent in (5, 50, 95):
                found[f"ratio_q{percent:02d}"] = histogram_quantile(
                    np.asarray(total), percent / 100
                )
        elif name == "calibration":
            found["ece"] = float(np.abs(np.asarray(total)).sum() / count)
        elif name == "ratio_variance":
            found["ratio_std"] = float(np.sqrt(total / count))
        else:
            found[name] = float(total / count)
    return found


def histogram_quantile(counts: np.ndarray, quantile: float) -> float:
    """Quantile of values in [0, 1] known only by their histogram of equal bins.

    Args:
        counts: count of each bin.
        quantile: in [0, 1].

    Returns:
        The value below which that share lies, linear within a bin.

    Examples:
        >>> histogram_quantile(np.array([0, 4, 4, 0]), 0.25)
        0.375
    """
    cumulative = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    cumulative /= cumulative[-1]
    edges = np.linspace(0, 1, len(counts) + 1)
    index = int(np.searchsorted(cumulative, quantile, side="left"))
    if index == 0:
        index = int(np.argmax(cumulative > 0))
        return float(edges[index - 1])
    low, high = cumulative[index - 1], cumulative[index]
    share = (quantile - low) / (high - low) if high > low else 1.0
    return float(edges[index - 1] + share * (edges[index] - edges[index - 1]))
