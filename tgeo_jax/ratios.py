"""Fusion ratios: the axis "how much teacher, for this sample?".

A ratio is a pair of pure functions. `init(key, num_classes)` makes its meta-parameters (an empty
dict where nothing is learned); `weights(meta_params, situation)` gives every sample the weight of
its hard loss and of its soft loss. Adding one is adding a function here and its name to `RATIOS`;
its keyword-only arguments become the configuration section of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax import geometry, shapes

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
    progress: Array  # fraction of training done, in [0, 1)


class FusionRatio(NamedTuple):
    """A ratio as a value: how its meta-parameters begin, and the weights they give."""

    init: Callable[[Array, int], MetaParams]  # (key, num_classes) -> meta_params
    weights: Callable[[MetaParams, Situation], tuple[Array, Array]]  # -> hard_B, soft_B


class FusionNetwork(nn.Module):
    """MLP from geometric features to a ratio: F -> hidden -> 1, leaky ReLU, sigmoid.

    Shapes: features_BxF -> alpha_B, never [B, 1]: against [B] losses that would broadcast to
    [B, B] and silently turn a per-sample ratio into a batch-wise one.

    Attributes:
        hidden: widths of the hidden layers.
        initial_ratio: alpha of every sample at the start, nearly, in (0, 1).

    References:
        TGeo-KD (arXiv 2312.15112): 9K -> 32 -> 16 -> 1, leaky-ReLU slope 0.01.

    Examples:
        >>> network = FusionNetwork()
        >>> variables = network.init(jax.random.key(0), jnp.ones((4, 90)))
        >>> network.apply(variables, jnp.ones((4, 90))).shape
        (4,)
    """

    hidden: Sequence[int] = (32, 16)
    initial_ratio: float = 0.5

    @nn.compact
    def __call__(self, features_BxF: Array) -> Array:
        shapes.check(features_BxF=features_BxF)
        x = features_BxF
        for width in self.hidden:
            x = nn.leaky_relu(nn.Dense(width)(x), negative_slope=0.01)
        bias = math.log(self.initial_ratio / (1 - self.initial_ratio))
        # Not zeros: a zero kernel would pass no gradient to the layers below on the first update.
        logit_Bx1 = nn.Dense(
            1,
            kernel_init=nn.initializers.variance_scaling(0.01, "fan_in", "normal"),
            bias_init=nn.initializers.constant(bias),
        )(x)
        return nn.sigmoid(logit_Bx1)[..., 0]


def constant(*, alpha: float = 0.9) -> FusionRatio:
    """The same ratio for every sample: `hard = 1 - alpha`, `soft = alpha`.

    Args:
        alpha: weight of the soft loss, in [0, 1].

    Raises:
        ValueError: alpha outside [0, 1].

    References:
        Hinton, Vinyals, Dean 2015; 0.9 is the CIFAR recipe of the distillation literature.

    Examples:
        >>> ratio = constant(alpha=0.25)
        >>> situation = Situation(*[jnp.zeros((2, 3))] * 2, *[jnp.zeros(2)] * 3, None, 0.0)
        >>> [print(weight) for weight in ratio.weights({}, situation)] and None
        [0.75 0.75]
        [0.25 0.25]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ratio.constant.alpha={alpha}: must lie in [0, 1]; 0.9 is usual on CIFAR")

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        del meta_params
        ones_B = jnp.ones_like(situation.soft_B)
        return (1 - alpha) * ones_B, alpha * ones_B

    return FusionRatio(lambda key, num_classes: {}, weights)


def tgeo(
    *, relations: str = "full", hidden: Sequence[int] = (32, 16), initial_ratio: float = 0.5
) -> FusionRatio:
    """TGeo-KD's ratio: a network looks at the trilateral geometry of each sample.

    `soft_i = alpha_i`, `hard_i = 1 - alpha_i`, `alpha_i = FusionNetwork(features_i)`; the
    network is trained by the bilevel gradient of the validation loss.

    Args:
        relations: what the network sees, a relation set of `geometry.RELATIONS`.
        hidden: widths of its hidden layers; none makes it linear.
        initial_ratio: ratio at the start, in (0, 1).

    Raises:
        ValueError: an unknown relation set, a width that is not positive, a ratio outside (0, 1).

    References:
        TGeo-KD (arXiv 2312.15112), ICLR 2024.

    Examples:
        >>> params = tgeo(relations="sg_tg").init(jax.random.key(0), 10)
        >>> params["params"]["Dense_0"]["kernel"].shape
        (20, 32)
    """
    num_blocks = len(geometry.relation_blocks(relations))
    if not 0 < initial_ratio < 1:
        raise ValueError(f"ratio.tgeo.initial_ratio={initial_ratio}: must lie strictly in (0, 1)")
    if not all(isinstance(width, int) and width > 0 for width in hidden):
        raise ValueError(f"ratio.tgeo.hidden={tuple(hidden)}: widths must be positive integers")
    network = FusionNetwork(tuple(hidden), initial_ratio)

    def init(key: Array, num_classes: int) -> MetaParams:
        return network.init(key, jnp.zeros((1, num_blocks * num_classes)))

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        assert situation.class_means_KxK is not None  # every role with a teacher has them
        features_BxF = geometry.trilateral_features(
            jax.nn.softmax(situation.student_logits_BxK.astype(jnp.float32)),
            jax.nn.softmax(situation.teacher_logits_BxK.astype(jnp.float32)),
            situation.labels_B,
            situation.class_means_KxK,
            relations,
        )
        alpha_B: Any = network.apply(meta_params, features_BxF)
        return 1 - alpha_B, alpha_B

    return FusionRatio(init, weights)


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


RATIOS: dict[str, Callable[..., FusionRatio]] = {"constant": constant, "tgeo": tgeo}
