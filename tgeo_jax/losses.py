"""Hard and soft losses, one number per sample: the axis "what is compared?".

Every loss returns `[B]`, computes in at least float32 whatever its inputs, and stays finite with
finite gradients at saturated logits. A soft loss is a function of this module in `SOFT_LOSSES`;
its keyword-only arguments become the configuration section of the same name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tgeo_jax import shapes

Array = jax.Array
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
    log_probs_BxK = jax.nn.log_softmax(_at_least_float32(logits_BxK))
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
    _check_temperature(temperature)
    # Both sides as log-probabilities: with the teacher as probabilities, log 0 at a saturated
    # softmax makes its gradient NaN.
    log_p_BxK = jax.nn.log_softmax(_at_least_float32(teacher_logits_BxK) / temperature)
    log_q_BxK = jax.nn.log_softmax(_at_least_float32(student_logits_BxK) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p_BxK) * (log_p_BxK - log_q_BxK), axis=-1)


SOFT_LOSSES: dict[str, Callable[..., Array]] = {"kl": kl}


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
    function = functools.partial(SOFT_LOSSES[name], **options)
    if "labels_B" in inspect.signature(SOFT_LOSSES[name]).parameters:
        return function
    return lambda student_logits_BxK, teacher_logits_BxK, labels_B: function(
        student_logits_BxK, teacher_logits_BxK
    )


def _at_least_float32(values: Array) -> Array:
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be > 0 (4 is usual on CIFAR)")
