"""Fusion ratios that are learned from the validation loss; `ratios` offers them with the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tgeo_jax import geometry, losses, shapes
from tgeo_jax.fusion import FusionRatio, MetaParams, PerBatch, Situation, nothing_learned

Array = jax.Array


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


class LossNetwork(nn.Module):
    """MLP from two losses to two weights: 2 -> hidden -> 2, tanh, sigmoid.

    Shapes: losses_Bx2 -> weights_Bx2 in (0, 1).

    Attributes:
        hidden: widths of the hidden layers.

    References:
        Nguyen et al. 2026 (PAKDD), BiKD.

    Examples:
        >>> network = LossNetwork()
        >>> network.apply(network.init(jax.random.key(0), jnp.ones((4, 2))), jnp.ones((4, 2))).shape
        (4, 2)
    """

    hidden: Sequence[int] = (64, 64)

    @nn.compact
    def __call__(self, losses_Bx2: Array) -> Array:
        shapes.check(losses_Bx2=losses_Bx2)
        x = losses_Bx2
        for width in self.hidden:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.sigmoid(nn.Dense(2)(x))


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
    _check_widths("tgeo", hidden)
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


def bikd(*, hidden: Sequence[int] = (64, 64)) -> FusionRatio:
    """Two weights without a tie, from the losses of student and teacher.

    `(hard_i, soft_i) = sigmoid(MLP(CE_i(student), CE_i(teacher)))`, tanh between the layers; the
    network is trained by the bilevel gradient, accumulated over 5 steps (`meta.accumulate`).

    Args:
        hidden: widths of its hidden layers; (64,) for CIFAR-10.

    Raises:
        ValueError: a width that is not positive.

    References:
        Nguyen et al. 2026 (PAKDD), BiKD.

    Examples:
        >>> params = bikd().init(jax.random.key(0), 10)
        >>> params["params"]["Dense_0"]["kernel"].shape
        (2, 64)
    """
    _check_widths("bikd", hidden)
    network = LossNetwork(tuple(hidden))

    def init(key: Array, num_classes: int) -> MetaParams:
        del num_classes
        return network.init(key, jnp.zeros((1, 2)))

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        losses_Bx2 = jnp.stack(
            [
                losses.cross_entropy(logits_BxK, situation.labels_B)
                for logits_BxK in (situation.student_logits_BxK, situation.teacher_logits_BxK)
            ],
            axis=-1,
        )
        weights_Bx2: Any = network.apply(meta_params, losses_Bx2)
        return weights_Bx2[:, 0], weights_Bx2[:, 1]

    return FusionRatio(init, weights, reads_class_means=False)


def rw() -> FusionRatio:
    """Reweighting by the hypergradient itself: no network, fresh weights for every batch.

    A virtual step is taken from `eps = 0` on `mean_i [eps_i^CE CE_i + eps_i^KD soft_i]`;
    `u_i = max(-d L_val / d eps_i, 1e-8)`, `soft_i = u_i^KD / (u_i^CE + u_i^KD)`,
    `hard_i = 1 - soft_i`. The real step follows with these, whatever `meta.order` says.

    References:
        Lu et al. 2021, "RW-KD: Sample-wise Loss Terms Re-Weighting for Knowledge Distillation"
        (Findings of EMNLP).

    Examples:
        >>> grads = {"hard": jnp.array([-1., 1.]), "soft": jnp.array([-3., 1.])}
        >>> print(rw().per_batch.update(grads)["soft"])
        [0.75 0.5 ]
    """

    def start(batch_size: int) -> MetaParams:
        return {"hard": jnp.zeros(batch_size), "soft": jnp.zeros(batch_size)}

    def update(meta_grads: MetaParams) -> MetaParams:
        hard_B, soft_B = (jnp.maximum(-meta_grads[name], 1e-8) for name in ("hard", "soft"))
        alpha_B = soft_B / (hard_B + soft_B)
        return {"hard": 1 - alpha_B, "soft": alpha_B}

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        del situation
        return meta_params["hard"], meta_params["soft"]

    return FusionRatio(nothing_learned, weights, PerBatch(start, update), reads_class_means=False)


def _check_widths(name: str, hidden: Sequence[int]) -> None:
    if not all(isinstance(width, int) and width > 0 for width in hidden):
        raise ValueError(f"ratio.{name}.hidden={tuple(hidden)}: widths must be positive integers")
