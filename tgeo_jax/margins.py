"""Hard losses: cross-entropy, and the margin losses of face recognition.

A face network ends in a cosine head: its logits are `soft_scale * cos(theta_k)`, theta_k the angle
between an image's embedding and the weights of class k. Soft losses, geometry, ratios and
predictions see those. A margin loss divides by `soft_scale` again, makes the true class harder to
reach, and multiplies by a scale of its own. A hard loss is a function of this module in
`HARD_LOSSES`; its keyword-only arguments become the configuration section of the same name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tgeo_jax import losses, numeric, shapes

Array = jax.Array
HardLoss = Callable[[Array, Array], Array]  # logits_BxK, labels_B -> loss_B
# Of sin(theta)^2: the derivative of sin(theta) by cos(theta), -cos / sin, stays below 1,000.
_SMALLEST_SQUARED_SINE = 1e-6


def arcface(
    logits_BxK: Array,
    labels_B: Array,
    soft_scale: float,
    *,
    scale: float = 64.0,
    margin: float = 0.5,
) -> Array:
    """Cross-entropy of scaled cosines whose true angle is larger by a margin.

    `loss_i = CE(s c_i', y_i)`, c' the cosines c but `c'_y = cos(theta_y + m)`,
    `cos(theta + m) = c cos m - sqrt(1 - c^2) sin m`. Beyond `theta = pi - m` the angle's cosine
    would grow again; there `c'_y = c - m sin m`, as ArcFace's published code has it (not its
    equation): the target falls on, with a step of `1 - cos m - m sin m` (-0.12 at m = 0.5) where
    the two meet. `sin(theta)` is at least 0.001, so that gradients are finite at cosines of 1 and
    -1 too.

    Args:
        logits_BxK: of a cosine head, `soft_scale * cos(theta)`.
        labels_B: class indices in [0, K).
        soft_scale: of that head, > 0.
        scale: s in [1e-6, 1e6].
        margin: m in radians, in [0, pi/2].

    Returns:
        loss_B in nats, >= 0.

    Raises:
        ValueError: wrong ranks or sizes, a scale or margin out of range.

    References:
        Deng et al. 2019, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition" (arXiv
        1801.07698), equation 3; s = 64 and m = 0.5 are theirs.

    Examples:
        >>> logits = jnp.array([[4., -4.]])  # cosines 1 and -1 at soft_scale 4
        >>> print(arcface(logits, jnp.array([0]), 4.0, scale=1.0, margin=jnp.pi / 2).round(3))
        [0.314]
    """
    _check("arcface", scale, margin, math.pi / 2 + 1e-6)
    shapes.check(logits_BxK=logits_BxK, labels_B=labels_B)
    cosines_BxK, true_B = _cosines(logits_BxK, labels_B, soft_scale)
    squared_B = jnp.maximum((1 - true_B) * (1 + true_B), _SMALLEST_SQUARED_SINE)
    moved_B = true_B * math.cos(margin) - jnp.sqrt(squared_B) * math.sin(margin)
    beyond_B = true_B - margin * math.sin(margin)
    # theta + m <= pi, without an arc cosine, whose derivative is infinite at both ends.
    target_B = jnp.where(true_B >= -math.cos(margin), moved_B, beyond_B)
    return _with_target(cosines_BxK, labels_B, target_B, scale)


def cosface(
    logits_BxK: Array,
    labels_B: Array,
    soft_scale: float,
    *,
    scale: float = 64.0,
    margin: float = 0.4,
) -> Array:
    """Cross-entropy of scaled cosines, the true one less a margin.

    `loss_i = CE(s c_i', y_i)`, c' the cosines c but `c'_y = c_y - m`.

    Args:
        logits_BxK: of a cosine head, `soft_scale * cos(theta)`.
        labels_B: class indices in [0, K).
        soft_scale: of that head, > 0.
        scale: s in [1e-6, 1e6].
        margin: m in [0, 2].

    Returns:
        loss_B in nats, >= 0.

    Raises:
        ValueError: wrong ranks or sizes, a scale or margin out of range.

    References:
        Wang et al. 2018, "CosFace: Large Margin Cosine Loss for Deep Face Recognition" (arXiv
        1801.09414), equation 4; s = 64, and m = 0.40 as in ArcFace's comparison.

    Examples:
        >>> logits = jnp.array([[2., 2.]])
        >>> print(cosface(logits, jnp.array([0]), 4.0, scale=1.0, margin=0.0).round(4))  # log 2
        [0.6931]
    """
    _check("cosface", scale, margin, 2.0)
    shapes.check(logits_BxK=logits_BxK, labels_B=labels_B)
    cosines_BxK, true_B = _cosines(logits_BxK, labels_B, soft_scale)
    return _with_target(cosines_BxK, labels_B, true_B - margin, scale)


HARD_LOSSES: dict[str, Callable[..., Array]] = {
    "cross_entropy": losses.cross_entropy,
    "arcface": arcface,
    "cosface": cosface,
}


def hard_loss(name: str, soft_scale: float | None, **options: Any) -> HardLoss:
    """The hard loss of that name for a network, under one signature for all.

    Args:
        name: a key of `HARD_LOSSES`.
        soft_scale: of the network's cosine head; None: it has none.
        **options: keyword-only arguments of that loss.

    Returns:
        A function (logits_BxK, labels_B) -> loss_B. `cross_entropy` takes the logits as they are,
        those of a cosine head too.

    Raises:
        ValueError: a margin loss for a network without a cosine head.

    Examples:
        >>> hard_loss("arcface", None)
        Traceback (most recent call last):
        ...
        ValueError: loss.hard='arcface': needs a network that ends in a cosine head
    """
    if name == "cross_entropy":
        return losses.cross_entropy
    if soft_scale is None:
        raise ValueError(f"loss.hard={name!r}: needs a network that ends in a cosine head")
    numbers = {key: float(value) for key, value in options.items()}
    return functools.partial(HARD_LOSSES[name], soft_scale=float(soft_scale), **numbers)


def _check(name: str, scale: float, margin: float, largest: float) -> None:
    if not 1e-6 <= scale <= 1e6:
        raise ValueError(f"loss.{name}.scale={scale}: must lie in [1e-6, 1e6]; 64 is usual")
    if not 0 <= margin <= largest:
        raise ValueError(f"loss.{name}.margin={margin}: must lie in [0, {largest:.3g}]")


def _cosines(logits_BxK: Array, labels_B: Array, soft_scale: float) -> tuple[Array, Array]:
    cosines_BxK = numeric.at_least_float32(logits_BxK) / soft_scale
    return cosines_BxK, jnp.take_along_axis(cosines_BxK, labels_B[:, None], axis=-1)[:, 0]


def _with_target(cosines_BxK: Array, labels_B: Array, target_B: Array, scale: float) -> Array:
    is_true_BxK = jax.nn.one_hot(labels_B, cosines_BxK.shape[-1], dtype=bool)
    moved_BxK = jnp.where(is_true_BxK, target_B[:, None], cosines_BxK)
    return losses.cross_entropy(scale * moved_BxK, labels_B)
