"""Hard and soft losses, one number per sample: the axis "what is compared?".

Every loss returns `[B]`, computes in at least float32 whatever its inputs, and stays finite with
finite gradients at saturated logits. A soft loss is a function of this module in `SOFT_LOSSES`;
its keyword-only arguments become the configuration section of the same name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tgeo_jax import correlation, numeric, shapes
from tgeo_jax.correlation import cmkd, dist

Array = jax.Array
__all__ = [
    "SOFT_LOSSES",
    "SoftLoss",
    "cmkd",
    "cross_entropy",
    "dist",
    "dkd",
    "kl",
    "logit_std",
    "soft_loss",
    "weighted_sum",
]
SoftLoss = Callable[[Array, Array, Array], Array]  # student_BxK, teacher_BxK, labels_B -> loss_B


def cross_entropy(logits_BxK: Array, labels_B: Array) -> Array:
    """Cross-entropy with the true class.

    `loss_i = logsumexp(z_i) - z_i[y_i]`

    Args:
        logits_BxK: unnormalised log-probabilities.
        labels_B: class indices in [0, K).

    Returns:
        loss_B in nats, >= 0.

    Raises:
        ValueError: wrong ranks or sizes, non-integer labels.

    Examples:
        >>> print(cross_entropy(jnp.array([[0., 0.]]), jnp.array([1])).round(4))  # log 2
        [0.6931]
    """
    shapes.check(logits_BxK=logits_BxK, labels_B=labels_B)
    log_probs_BxK = jax.nn.log_softmax(numeric.at_least_float32(logits_BxK))
    return -jnp.take_along_axis(log_probs_BxK, labels_B[:, None], axis=-1)[:, 0]


def kl(student_logits_BxK: Array, teacher_logits_BxK: Array, *, temperature: float = 4.0) -> Array:
    """Kullback-Leibler divergence from the teacher's softened prediction to the student's.

    `loss_i = T^2 * sum_k p_k (log p_k - log q_k)`, p = softmax(teacher / T),
    q = softmax(student / T). The factor T^2 keeps gradients comparable across temperatures.

    Args:
        student_logits_BxK: student logits.
        teacher_logits_BxK: teacher logits.
        temperature: T > 0.

    Returns:
        loss_B in nats, >= 0, temperature**2 included.

    Raises:
        ValueError: wrong ranks or sizes, temperature <= 0.

    References:
        Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Examples:
        >>> z = jnp.array([[2., 0.]])
        >>> print(kl(-z, z, temperature=2.0).round(4))  # 4 * tanh(1/2)
        [1.8485]
    """
    shapes.check(student_logits_BxK=student_logits_BxK, teacher_logits_BxK=teacher_logits_BxK)
    numeric.check_temperature(temperature)
    # Both sides as log-probabilities: with the teacher as probabilities, log 0 at a saturated
    # softmax makes its gradient NaN.
    log_p_BxK = jax.nn.log_softmax(numeric.at_least_float32(teacher_logits_BxK) / temperature)
    log_q_BxK = jax.nn.log_softmax(numeric.at_least_float32(student_logits_BxK) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p_BxK) * (log_p_BxK - log_q_BxK), axis=-1)


def dkd(
    student_logits_BxK: Array,
    teacher_logits_BxK: Array,
    labels_B: Array,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Array:
    """Decoupled distillation: the true class against the rest, and the rest among themselves.

    `loss_i = T^2 (alpha * TCKD_i + beta * NCKD_i)`; TCKD is the KL divergence between the binary
    distributions (p_y, 1 - p_y), NCKD that between the softmaxes over the other K - 1 classes.
    `kl` is `TCKD + (1 - p_y of the teacher) NCKD`.

    Args:
        student_logits_BxK: student logits, K > 2.
        teacher_logits_BxK: teacher logits.
        labels_B: class indices in [0, K).
        temperature: T > 0.
        alpha: weight of TCKD, >= 0.
        beta: weight of NCKD, >= 0.

    Returns:
        loss_B in nats, >= 0, temperature**2 included.

    Raises:
        ValueError: wrong ranks or sizes, K = 2, temperature <= 0.

    References:
        Zhao et al. 2022, "Decoupled Knowledge Distillation" (arXiv 2203.08679), equation 7.

    Examples:
        >>> z = jnp.array([[2., 0., 0.]])
        >>> print(dkd(0 * z, z, jnp.array([0]), temperature=1.0, beta=0.0).round(4))
        [0.4331]
    """
    both = {"student_logits_BxK": student_logits_BxK, "teacher_logits_BxK": teacher_logits_BxK}
    shapes.check(**both, labels_B=labels_B)
    numeric.check_temperature(temperature)
    num_classes = student_logits_BxK.shape[-1]
    if num_classes < 3:
        raise ValueError(
            f"loss 'dkd' with K = {num_classes} classes: it needs more than 2, because it compares "
            "the classes other than the true one; use 'kl'"
        )
    is_true_BxK = jax.nn.one_hot(labels_B, num_classes, dtype=bool)
    p, q = (
        _decoupled(numeric.at_least_float32(logits_BxK) / temperature, is_true_BxK)
        for logits_BxK in (teacher_logits_BxK, student_logits_BxK)
    )
    tckd_B, nckd_B = (
        jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        for log_p, log_q in zip(p, q, strict=True)
    )
    return temperature**2 * (alpha * tckd_B + beta * nckd_B)


def logit_std(
    student_logits_BxK: Array, teacher_logits_BxK: Array, *, temperature: float = 2.0
) -> Array:
    """KL divergence between standardised logits: shapes are compared, not magnitudes.

    `loss_i = T^2 KL(softmax(Z(teacher) / T), softmax(Z(student) / T))`,
    `Z(z) = (z - mean z) / (1e-7 + std z)` for each sample, std unbiased.

    Args:
        student_logits_BxK: student logits.
        teacher_logits_BxK: teacher logits.
        temperature: base temperature T > 0.

    Returns:
        loss_B in nats, >= 0, temperature**2 included.

    Raises:
        ValueError: wrong ranks or sizes, temperature <= 0.

    References:
        Sun et al. 2024, "Logit Standardization in Knowledge Distillation" (arXiv 2403.01427),
        algorithm 1.

    Examples:
        >>> z = jnp.array([[3., 1., 2.]])
        >>> print(logit_std(z, 10 * z + 7).round(4))  # a positive affine map changes nothing
        [0.]
    """
    shapes.check(student_logits_BxK=student_logits_BxK, teacher_logits_BxK=teacher_logits_BxK)
    student, teacher = (correlation.z_scores(z) for z in (student_logits_BxK, teacher_logits_BxK))
    return kl(student, teacher, temperature=temperature)


SOFT_LOSSES: dict[str, Callable[..., Array]] = {
    "kl": kl,
    "dkd": dkd,
    "dist": dist,
    "logit_std": logit_std,
    "cmkd": cmkd,
}


def soft_loss(name: str, **options: Any) -> SoftLoss:
    """The soft loss of that name, with its options fixed, under one signature for all.

    Args:
        name: a key of `SOFT_LOSSES`.
        **options: keyword-only arguments of that loss.

    Returns:
        A function (student_logits_BxK, teacher_logits_BxK, labels_B) -> loss_B.

    Examples:
        >>> z = jnp.zeros((2, 3))
        >>> print(soft_loss("kl", temperature=1.0)(z, z, jnp.array([0, 1])))
        [0. 0.]
    """
    # A whole number stands for a float: its square would have to fit into 32 bits.
    numbers = {key: float(v) if type(v) is int else v for key, v in options.items()}
    function = functools.partial(SOFT_LOSSES[name], **numbers)
    if "labels_B" in inspect.signature(SOFT_LOSSES[name]).parameters:
        return function
    return lambda student_logits_BxK, teacher_logits_BxK, labels_B: function(
        student_logits_BxK, teacher_logits_BxK
    )


def weighted_sum(parts: Sequence[SoftLoss], weights: Sequence[float]) -> SoftLoss:
    """Several soft losses as one: `loss_i = sum_j weight_j * part_j,i`.

    Args:
        parts: from `soft_loss`.
        weights: one for each.

    Returns:
        A function (student_logits_BxK, teacher_logits_BxK, labels_B) -> loss_B.

    Raises:
        ValueError: no parts, or not as many weights as parts.

    Examples:
        >>> z = jnp.array([[2., 0.]])
        >>> kl_loss = soft_loss("kl", temperature=2.0)
        >>> both = weighted_sum([kl_loss, kl_loss], (1.0, 0.5))
        >>> print(both(-z, z, jnp.array([0])) / kl_loss(-z, z, jnp.array([0])))
        [1.5]
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(parts)} losses: give one for each")
    pairs = list(zip(weights, parts, strict=True))

    def loss(student_logits_BxK: Array, teacher_logits_BxK: Array, labels_B: Array) -> Array:
        terms = [w * part(student_logits_BxK, teacher_logits_BxK, labels_B) for w, part in pairs]
        return sum(terms[1:], terms[0])

    return loss


def _decoupled(logits_BxK: Array, is_true_BxK: Array) -> tuple[Array, Array]:
    """Log-probabilities of (true class, all others) [B, 2], and of the others, 0 at the true one.

    From log-sums, never from 1 - p: that is 0 in float32 long before the others' sum is.
    """
    others_BxK = jnp.where(is_true_BxK, -jnp.inf, logits_BxK)
    log_others_B = jax.nn.logsumexp(others_BxK, axis=-1)
    true_B = jnp.sum(jnp.where(is_true_BxK, logits_BxK, 0), axis=-1)
    binary_Bx2 = jax.nn.log_softmax(jnp.stack([true_B, log_others_B], axis=-1))
    among_BxK = jnp.where(is_true_BxK, 0, logits_BxK - log_others_B[:, None])
    return binary_Bx2, among_BxK
