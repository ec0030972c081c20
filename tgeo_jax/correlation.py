"""Soft losses that compare by correlation: DIST and CMKD; `losses` offers them with the others."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from tgeo_jax import numeric, ranking, shapes

Array = jax.Array
DIRECTIONS = ("hard_to_spearman", "hard_to_pearson", "none")
DIFFICULTIES = ("entropy", "doubt", "disagreement", "off")


def dist(
    student_logits_BxK: Array,
    teacher_logits_BxK: Array,
    *,
    temperature: float = 4.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Array:
    """DIST: correlation of predictions across classes and, for each class, across the batch.

    `loss_i = T^2 [inter (1 - rho(row_i)) + intra (1 - mean_c rho(column_c))]`, rho Pearson's
    correlation of `softmax(student / T)` with `softmax(teacher / T)`. The second term belongs to
    the batch; every sample carries it, so that the mean over the batch is exact.

    Args:
        student_logits_BxK: student logits.
        teacher_logits_BxK: teacher logits.
        temperature: T > 0.
        inter: weight of the rows, beta in the paper, >= 0.
        intra: weight of the columns, gamma in the paper, >= 0.

    Returns:
        loss_B in [0, 2 T^2 (inter + intra)].

    Raises:
        ValueError: wrong ranks or sizes, temperature <= 0.

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (arXiv 2205.10536),
        equations 8 to 10; the factor T^2 is that of the authors' code.

    Examples:
        >>> z = jnp.array([[2., 0., 1.], [0., 1., 2.]])
        >>> print(dist(z, z).round(4), dist(z, -z, temperature=1.0, intra=0.0).round(2))
        [0. 0.] [1.87 1.87]
    """
    shapes.check(student_logits_BxK=student_logits_BxK, teacher_logits_BxK=teacher_logits_BxK)
    numeric.check_temperature(temperature)
    s_BxK, t_BxK = (
        jax.nn.softmax(numeric.at_least_float32(logits_BxK) / temperature)
        for logits_BxK in (student_logits_BxK, teacher_logits_BxK)
    )
    rows_B = 1 - ranking.pearson(s_BxK, t_BxK)
    return temperature**2 * (inter * rows_B + intra * _intra_class(s_BxK, t_BxK))


def cmkd(
    student_logits_BxK: Array,
    teacher_logits_BxK: Array,
    labels_B: Array | None = None,
    *,
    temperature: float = 4.0,
    rank_strength: float | None = None,
    direction: str = "hard_to_spearman",
    difficulty: str = "entropy",
    difficulty_temperature: float = 4.0,
    normalise_difficulty: bool = False,
    standardise: bool = True,
    intra: float = 0.0,
) -> Array:
    """Correlation matching: predicted values by Pearson, ranks by Spearman, mixed by difficulty.

    `loss_i = T^2 [(1 - h_i) d_P + h_i d_S]`, `d_P = 1 - pearson(p^S, p^T)`,
    `d_S = 1 - pearson(soft_rank(z^S), rank(z^T))`, z standardised logits, p = softmax(z / T).
    Our reconstruction: of the paper only abstract and introduction were at hand.

    Args:
        student_logits_BxK: student logits.
        teacher_logits_BxK: teacher logits.
        labels_B: class indices in [0, K); only difficulty `doubt` needs them.
        temperature: T > 0.
        rank_strength: of the soft rank, > 0, in units of the (standardised) logits; 3/K if None.
        direction: `hard_to_spearman` as above, `hard_to_pearson` with h and 1 - h exchanged,
            `none` weighs both one half.
        difficulty: h in [0, 1], a constant for the student: `entropy` of
            softmax(teacher / difficulty_temperature) over log K, `doubt` 1 - T_y,
            `disagreement` sum_k |S_k - T_k| / 2, or `off`, h = 0.
        difficulty_temperature: for `entropy`, > 0.
        normalise_difficulty: stretch h over the batch to [0, 1]; all equal, to 1e-6, becomes 1/2.
            `off` stays 0.
        standardise: whether z is standardised as in `logit_std`, or the raw logits.
        intra: weight of DIST's intra-class term, >= 0.

    Returns:
        loss_B in [0, 2 T^2 (1 + intra)].

    Raises:
        ValueError: wrong ranks or sizes, an unknown direction or difficulty, `doubt` without
            labels, a temperature or rank_strength <= 0.

    References:
        "Efficient and Robust Knowledge Distillation from A Stronger Teacher Based on Correlation
        Matching" (arXiv 2410.06561); docs/methods/cmkd.md says what is ours.

    Examples:
        >>> z = jnp.array([[3., 1., 2., 0.]])
        >>> print(cmkd(z, 2 * z + 1).round(4))  # a positive affine map: nothing
        [0.]
        >>> print(cmkd(z, z[:, ::-1], temperature=1.0, rank_strength=0.01,
        ...            difficulty="off", direction="hard_to_pearson").round(4))  # 1 - spearman
        [2.]
    """
    both = {"student_logits_BxK": student_logits_BxK, "teacher_logits_BxK": teacher_logits_BxK}
    shapes.check(**both, **({} if labels_B is None else {"labels_B": labels_B}))
    numeric.check_temperature(temperature)
    numeric.check_temperature(difficulty_temperature, "difficulty_temperature")
    numeric.check_choice("direction", direction, DIRECTIONS)
    numeric.check_choice("difficulty", difficulty, DIFFICULTIES)
    if rank_strength is not None and not rank_strength > 0:
        raise ValueError(f"rank_strength={rank_strength}: must be > 0, or None for 3/K")
    strength = 3 / student_logits_BxK.shape[-1] if rank_strength is None else rank_strength
    raw_S, raw_T = (numeric.at_least_float32(z_BxK) for z_BxK in both.values())
    s_BxK, t_BxK = (z_scores(z_BxK) if standardise else z_BxK for z_BxK in (raw_S, raw_T))
    p_BxK, q_BxK = (jax.nn.softmax(z_BxK / temperature) for z_BxK in (s_BxK, t_BxK))
    value_B = 1 - ranking.pearson(p_BxK, q_BxK)
    rank_B = 1 - ranking.soft_spearman(s_BxK, t_BxK, strength=strength)
    if direction == "none":
        mixed_B = (value_B + rank_B) / 2
    else:
        h_B = _difficulty(raw_S, raw_T, labels_B, difficulty, difficulty_temperature)
        if normalise_difficulty and difficulty != "off":
            h_B = _stretched(h_B)
        easy_B, hard_B = (value_B, rank_B) if direction == "hard_to_spearman" else (rank_B, value_B)
        mixed_B = (1 - h_B) * easy_B + h_B * hard_B
    if intra:
        mixed_B += intra * _intra_class(p_BxK, q_BxK)
    return temperature**2 * mixed_B


def z_scores(logits_BxK: Array) -> Array:
    """Zero mean and unit (unbiased) deviation for each sample; zeros where all are equal.

    `Z(z) = (z - mean z) / (1e-7 + std z)`

    Args:
        logits_BxK: logits.

    Returns:
        [B, K], at least float32.

    References:
        Sun et al. 2024 (arXiv 2403.01427), algorithm 1.

    Examples:
        >>> print(z_scores(jnp.array([[3., 1., 2.]])).round(3))
        [[ 1. -1.  0.]]
    """
    logits_BxK = numeric.at_least_float32(logits_BxK)
    centred_BxK = logits_BxK - logits_BxK.mean(axis=-1, keepdims=True)
    freedom = max(logits_BxK.shape[-1] - 1, 1)
    variance_Bx1 = jnp.sum(jnp.square(centred_BxK), axis=-1, keepdims=True) / freedom
    return centred_BxK / (1e-7 + numeric.safe_sqrt(variance_Bx1))


def _intra_class(student_probs_BxK: Array, teacher_probs_BxK: Array) -> Array:
    """DIST's term of the batch, a scalar."""
    return 1 - jnp.mean(ranking.pearson(student_probs_BxK.T, teacher_probs_BxK.T))


def _difficulty(
    student_logits_BxK: Array,
    teacher_logits_BxK: Array,
    labels_B: Array | None,
    kind: str,
    tau: float,
) -> Array:
    """h_B of `cmkd`, without a derivative."""
    student_logits_BxK, teacher_logits_BxK = jax.lax.stop_gradient(
        (student_logits_BxK, teacher_logits_BxK)
    )
    if kind == "off":
        return jnp.zeros(teacher_logits_BxK.shape[:1], teacher_logits_BxK.dtype)
    if kind == "entropy":
        log_p_BxK = jax.nn.log_softmax(teacher_logits_BxK / tau)
        entropy_B = -jnp.sum(jnp.exp(log_p_BxK) * log_p_BxK, axis=-1)
        return entropy_B / math.log(log_p_BxK.shape[-1])
    if kind == "doubt":
        if labels_B is None:
            raise ValueError("difficulty='doubt' is 1 - T_y: pass labels_B")
        probs_BxK = jax.nn.softmax(teacher_logits_BxK)
        return 1 - jnp.take_along_axis(probs_BxK, labels_B[:, None], axis=-1)[:, 0]
    probs = (jax.nn.softmax(z_BxK) for z_BxK in (student_logits_BxK, teacher_logits_BxK))
    return jnp.sum(jnp.abs(next(probs) - next(probs)), axis=-1) / 2


def _stretched(h_B: Array) -> Array:
    """Min-max over the batch; what only rounding tells apart is not stretched."""
    span = h_B.max() - h_B.min()
    differs = span > 1e-6
    return jnp.where(differs, (h_B - h_B.min()) / jnp.where(differs, span, 1), 0.5)
