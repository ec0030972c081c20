"""What a fusion ratio is: what it may look at, and the functions that make it up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
MetaParams = Any  # a pytree of arrays


class Situation(NamedTuple):
    """What a ratio may look at. The trainer stops every gradient before handing it over."""

    student_logits_BxK: Array
    teacher_logits_BxK: Array
    labels_B: Array
    hard_B: Array  # hard loss of each sample
    soft_B: Array  # soft loss of each sample
    class_means_KxK: (
        Array | None
    )  # mean teacher prediction of each class, see geometry; None if not needed
    epoch: Array  # 1, 2, ..., num_epochs
    num_epochs: Array | int


class PerBatch(NamedTuple):
    """Meta-parameters that live for one batch: probed at `start`, replaced by `update`."""

    start: Callable[[int], MetaParams]  # batch size -> where the hypergradient is taken
    update: Callable[[MetaParams], MetaParams]  # hypergradient -> what the real step uses


class FusionRatio(NamedTuple):
    """A ratio as a value: how its meta-parameters begin, and the weights they give."""

    init: Callable[[Array, int], MetaParams]  # (key, num_classes) -> meta_params
    weights: Callable[[MetaParams, Situation], tuple[Array, Array]]  # -> hard_B, soft_B
    per_batch: PerBatch | None = None
    # Finding the class means of a frozen teacher costs a pass over the training split.
    reads_class_means: bool = True


def nothing_learned(key: Array, num_classes: int) -> MetaParams:
    """The `init` of a ratio without meta-parameters.

    Examples:
        >>> nothing_learned(jax.random.key(0), 10)
        {}
    """
    del key, num_classes
    return {}


def for_each_teacher(ratio: FusionRatio, num_teachers: int) -> FusionRatio:
    """One ratio of that kind for each of M teachers: the mean of M fused losses.

    `hard_i = mean_m hard_i^m`, `soft_i^m = (ratio m's soft_i) / M`. The situation holds teacher
    logits [M, B, K], soft losses [M, B] and class means [M, K, K].

    Args:
        ratio: of one teacher.
        num_teachers: M.

    Returns:
        A ratio whose soft weights are [M, B] and whose meta-parameters have a leading axis M.

    Examples:
        >>> zeros, two = jnp.zeros((1, 3)), jnp.zeros((2, 1, 3))
        >>> situation = Situation(zeros, two, jnp.zeros(1, int), jnp.zeros(1), jnp.zeros((2, 1)),
        ...                       None, 1, 9)
        >>> from tgeo_jax import ratios
        >>> ratio = for_each_teacher(ratios.constant(alpha=0.5), 2)
        >>> hard, soft = ratio.weights({}, situation)
        >>> print(hard, soft.ravel())
        [0.5] [0.25 0.25]
    """

    def init(key: Array, num_classes: int) -> MetaParams:
        keys_M = jax.random.split(key, num_teachers)
        return jax.vmap(lambda key: ratio.init(key, num_classes))(keys_M)

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        def of_one(meta_params, teacher_logits_BxK, soft_B, class_means_KxK):
            return ratio.weights(
                meta_params,
                situation._replace(
                    teacher_logits_BxK=teacher_logits_BxK,
                    soft_B=soft_B,
                    class_means_KxK=class_means_KxK,
                ),
            )

        hard_MxB, soft_MxB = jax.vmap(of_one)(
            meta_params,
            situation.teacher_logits_BxK,
            situation.soft_B,
            situation.class_means_KxK,
        )
        return hard_MxB.mean(axis=0), soft_MxB / num_teachers

    if ratio.per_batch is None:
        return ratio._replace(init=init, weights=weights)
    per_batch = ratio.per_batch

    def start(batch_size: int) -> MetaParams:
        one = per_batch.start(batch_size)
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * num_teachers), one)

    lifted = PerBatch(start, jax.vmap(per_batch.update))
    return FusionRatio(init, weights, lifted, ratio.reads_class_means)


def teacher_share(hard_weight_B: Array, soft_weight_B: Array) -> Array:
    """The teacher's share of the two weights: alpha itself where they add up to 1.

    `share_i = soft_i / (hard_i + soft_i)`, 0 where both are 0.

    Args:
        hard_weight_B: weights of the hard loss, >= 0.
        soft_weight_B: weights of the soft loss, >= 0.

    Returns:
        share_B in [0, 1].

    Examples:
        >>> print(teacher_share(jnp.array([1., 0.]), jnp.array([3., 0.])))
        [0.75 0. ]
    """
    total_B = hard_weight_B + soft_weight_B
    return jnp.where(total_B > 0, soft_weight_B / jnp.where(total_B > 0, total_B, 1), 0.0)
