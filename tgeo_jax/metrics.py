"""Metrics as (sum, count) pairs, so that they add up exactly over steps, batches and devices.

What no sum can tell, the area under the ROC curve, comes from all scores instead (`Scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tgeo_jax import classification, fusion, geometry, losses, numeric, roles

Array = jax.Array
CALIBRATION_BINS = 15
RATIO_BINS = 50  # over [0, 1]; quantiles of the ratio are therefore good to 0.02
MOST_CONFUSED = 100  # classes up to which a confusion matrix is counted
MOST_RECALLS = 20  # classes up to which each one's recall is a metric of its own


class Mean(struct.PyTreeNode):
    """A mean that can still be added to: `total / count`; a zero count means "not measured"."""

    total: Array
    count: Array


class Scores(struct.PyTreeNode):
    """Scores of a binary task, batch by batch: their ranks over a whole split are wanted.

    Each field holds an array for each batch, [B] or with leading axes: the log-odds of class 1,
    whether that is the label, and whether the example counts.
    """

    scores: tuple[Array, ...]
    is_positive: tuple[Array, ...]
    is_real: tuple[Array, ...]


Metrics = dict[str, Any]  # Means, and `Scores` as "auc"


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
) -> Metrics:
    """What is measured of predictions in evaluation.

    Args:
        logits_BxK: in evaluation mode.
        labels_B: class indices.
        is_real_B: False for padding, which does not count.
        teacher_logits_BxK: the teacher's on the same images, if there is one.

    Returns:
        `accuracy`; `cross_entropy` in nats, which is also called log-loss; `calibration` (the sum
        of `confidence - right` in each of `CALIBRATION_BINS` bins of confidence, from which
        `summarise` makes `ece`); with K <= `MOST_CONFUSED` `confusion`, whose total is [K, K]
        counts in integers: row the label, column the top class; with K = 2 `auc`, the `Scores` by
        log-odds logit_1 - logit_0, which round to fewer ties than probabilities; with K > 5
        `top5_accuracy`; and with a teacher's logits `teacher_agreement` and
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
    found: Metrics = {
        "accuracy": mean(right_B, is_real_B),
        "cross_entropy": mean(losses.cross_entropy(logits_BxK, labels_B), is_real_B),
        "calibration": Mean(
            jnp.zeros(CALIBRATION_BINS, gap_B.dtype).at[bin_B].add(gap_B),
            jnp.sum(is_real_B.astype(jnp.float32)),
        ),
    }
    num_classes = logits_BxK.shape[-1]
    if num_classes <= MOST_CONFUSED:
        counts = jnp.zeros((num_classes, num_classes), jnp.int32)
        found["confusion"] = Mean(
            counts.at[labels_B, top_B].add(is_real_B.astype(jnp.int32)),
            jnp.sum(is_real_B.astype(jnp.int32)),
        )
    if num_classes == 2:
        odds_B = logits_BxK[:, 1] - logits_BxK[:, 0]
        found["auc"] = Scores((odds_B,), (labels_B == 1,), (is_real_B,))
    if num_classes > 5:
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


def add_up(batches: Sequence[Metrics]) -> Metrics:
    """The metrics of several batches together.

    Args:
        batches: of each the same metrics.

    Returns:
        Sums of totals and counts; scores side by side.

    Examples:
        >>> one = {"accuracy": mean(jnp.array([True, False, True]))}
        >>> print(add_up([one, one])["accuracy"].count)
        6.0
    """

    def of_all(*found: Any) -> Any:
        if isinstance(found[0], Scores):
            fields = ("scores", "is_positive", "is_real")
            return Scores(*(sum((getattr(one, name) for one in found), ()) for name in fields))
        return jax.tree.map(lambda *values: sum(values[1:], values[0]), *found)

    return {name: of_all(*(batch[name] for batch in batches)) for name in batches[0]}


def summarise(sums: Metrics) -> dict[str, Any]:
    """Numbers to log from summed metrics; what was never measured is left out.

    `ratio_variance` becomes `ratio_std`; `ratio_histogram` a list of its counts, with the quantiles
    `ratio_q05`, `ratio_q50` and `ratio_q95` (interpolated within a bin); `calibration` the expected
    calibration error `ece`; `confusion` becomes `macro_f1` and with K <= `MOST_RECALLS` `recall_0`,
    `recall_1`, ...; and the scores in `auc` the area under the ROC curve, unless one of the two
    classes is missing.

    Args:
        sums: named metrics of one seed, in NumPy.

    Returns:
        Plain floats by name, of the histogram a list of whole numbers.

    Examples:
        >>> summarise({"loss": Mean(np.float32(3), np.float32(2)), "x": Mean(0., 0.)})
        {'loss': 1.5}
    """
    found: dict[str, Any] = {}
    for name, summed in sums.items():
        if isinstance(summed, Scores):
            area = _area(summed)
            found |= {} if area is None else {name: area}
            continue
        total, count = summed.total, summed.count
        if not count > 0:
            continue
        if name == "ratio_histogram":
            found[name] = [round(float(samples)) for samples in total]
            for percent in (5, 50, 95):
                found[f"ratio_q{percent:02d}"] = histogram_quantile(
                    np.asarray(total), percent / 100
                )
        elif name == "calibration":
            found["ece"] = float(np.abs(np.asarray(total)).sum() / count)
        elif name == "confusion":
            found["macro_f1"] = classification.macro_f1(total)
            if len(total) <= MOST_RECALLS:
                recalls = classification.recall(total).tolist()
                found |= {f"recall_{label}": value for label, value in enumerate(recalls)}
        elif name == "ratio_variance":
            found["ratio_std"] = float(np.sqrt(total / count))
        else:
            found[name] = float(total / count)
    return found


def _area(found: Scores) -> float | None:
    is_real_N = np.concatenate(found.is_real)
    # Padding may hold anything.
    scores_N = np.concatenate(found.scores)[is_real_N]
    return classification.auc(scores_N, np.concatenate(found.is_positive)[is_real_N])


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
