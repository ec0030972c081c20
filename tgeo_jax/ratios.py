"""Fusion ratios: the axis "how much teacher, for this sample?".

A ratio is a pair of pure functions. `init(key, num_classes)` makes its meta-parameters (an empty
dict where nothing is learned); `weights(meta_params, situation)` gives every sample the weight of
its hard loss and of its soft loss. A ratio whose meta-parameters live for one batch only also says
where they start and what their hypergradient makes of them (`PerBatch`). Adding a ratio is adding
a function here and its name to `RATIOS`; its keyword-only arguments become the configuration
section of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tgeo_jax import losses
from tgeo_jax.fusion import (
    FusionRatio,
    MetaParams,
    PerBatch,
    Situation,
    for_each_teacher,
    nothing_learned,
    teacher_share,
)
from tgeo_jax.learned_ratios import FusionNetwork, LossNetwork, bikd, rw, tgeo

Array = jax.Array
__all__ = [
    "RATIOS",
    "FusionNetwork",
    "FusionRatio",
    "LossNetwork",
    "PerBatch",
    "Situation",
    "ada",
    "annealed",
    "bikd",
    "constant",
    "for_each_teacher",
    "rw",
    "teacher_share",
    "tgeo",
    "weighted",
    "wls",
]


def constant(*, alpha: float = 0.9, warmup_epochs: int = 0) -> FusionRatio:
    """The same ratio for every sample: `hard = 1 - alpha`, `soft = alpha min(epoch / warmup, 1)`.

    Args:
        alpha: weight of the soft loss, in [0, 1].
        warmup_epochs: over which the soft weight grows, >= 0; the first epoch is number 1.

    Raises:
        ValueError: alpha outside [0, 1], warmup_epochs negative.

    References:
        Hinton, Vinyals, Dean 2015; 0.9 is the CIFAR recipe of the distillation literature. The
        warm-up is that of DKD (arXiv 2203.08679), which uses 20 epochs.

    Examples:
        >>> ratio = constant(alpha=0.25)
        >>> situation = Situation(*[jnp.zeros((2, 3))] * 2, *[jnp.zeros(2)] * 3, None, 1, 9)
        >>> [print(weight) for weight in ratio.weights({}, situation)] and None
        [0.75 0.75]
        [0.25 0.25]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ratio.constant.alpha={alpha}: must lie in [0, 1]; 0.9 is usual on CIFAR")
    return _fixed("constant", 1 - alpha, alpha, warmup_epochs)


def weighted(*, hard: float = 1.0, soft: float = 1.0, warmup_epochs: int = 0) -> FusionRatio:
    """Two weights that need not add up to 1: `hard`, and `soft min(epoch / warmup, 1)`.

    Args:
        hard: weight of the hard loss, >= 0.
        soft: weight of the soft loss, >= 0.
        warmup_epochs: as in `constant`.

    Raises:
        ValueError: a weight or warmup_epochs that is negative.

    References:
        The weighting of DKD (1 and 1), DIST (1 and 2), logit standardisation (0.1 and 9) and of
        mutual learning and TriKD (1 and 1).

    Examples:
        >>> situation = Situation(*[jnp.zeros((1, 3))] * 2, *[jnp.zeros(1)] * 3, None, 5, 9)
        >>> [print(w) for w in weighted(soft=2.0, warmup_epochs=20).weights({}, situation)] and None
        [1.]
        [0.5]
    """
    for name, value in (("hard", hard), ("soft", soft)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"ratio.weighted.{name}={value}: must be a finite number >= 0")
    return _fixed("weighted", hard, soft, warmup_epochs)


SHAPES = ("linear", "cosine")


def annealed(*, shape: str = "linear") -> FusionRatio:
    """Teacher annealing: from the teacher alone in the first epoch to the label alone in the last.

    `soft = alpha_e`, `hard = 1 - alpha_e`; linear `alpha_e = (E - e) / (E - 1)`, cosine
    `alpha_e = (1 + cos(pi (e - 1) / (E - 1))) / 2`, e = 1, ..., E; 1 where E = 1.

    Args:
        shape: `linear` or `cosine`.

    Raises:
        ValueError: an unknown shape.

    References:
        Clark et al. 2019, "BAM! Born-Again Multi-Task Networks for Natural Language
        Understanding" (arXiv 1907.04829), teacher annealing; the cosine is ours.

    Examples:
        >>> situation = Situation(*[jnp.zeros((1, 3))] * 2, *[jnp.zeros(1)] * 3, None, 2, 5)
        >>> [print(weight) for weight in annealed().weights({}, situation)] and None
        [0.25]
        [0.75]
    """
    if shape not in SHAPES:
        raise ValueError(f"ratio.annealed.shape={shape!r}: use one of {', '.join(SHAPES)}")

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        del meta_params
        done = (situation.epoch - 1) / jnp.maximum(situation.num_epochs - 1, 1)
        alpha = 1 - done if shape == "linear" else (1 + jnp.cos(math.pi * done)) / 2
        ones_B = jnp.ones_like(situation.soft_B)
        return (1 - alpha) * ones_B, alpha * ones_B

    return FusionRatio(nothing_learned, weights, reads_class_means=False)


def ada() -> FusionRatio:
    """The teacher counts where it is right: `soft_i = alpha_i`, `hard_i = 1 - alpha_i`.

    `alpha_i = max(0, T_y - mean_{k != y} T_k) = max(0, (K T_y - 1) / (K - 1))`, T at temperature 1.

    References:
        The adaptive baseline (ADA-KD) that TGeo-KD (arXiv 2312.15112) compares with.

    Examples:
        >>> teacher = jnp.log(jnp.array([[.8, .1, .1], [.1, .8, .1]]))
        >>> situation = Situation(teacher, teacher, jnp.array([0, 0]), *[jnp.zeros(2)] * 2, None,
        ...                       1, 9)
        >>> print(ada().weights({}, situation)[1].round(4))
        [0.7 0. ]
    """

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        del meta_params
        teacher_loss_B = losses.cross_entropy(situation.teacher_logits_BxK, situation.labels_B)
        num_classes = situation.teacher_logits_BxK.shape[-1]
        alpha_B = jnp.maximum((num_classes * jnp.exp(-teacher_loss_B) - 1) / (num_classes - 1), 0)
        return 1 - alpha_B, alpha_B

    return FusionRatio(nothing_learned, weights, reads_class_means=False)


def wls(*, beta: float = 2.25, convex: bool = False) -> FusionRatio:
    """Weighted soft labels: more teacher where the student is worse than the teacher.

    `w_i = 1 - exp(-CE_i(student) / (CE_i(teacher) + 1e-7))`, a constant for the student;
    `hard = 1`, `soft_i = beta w_i`, or `1 - w_i` and `w_i` if convex.

    Args:
        beta: weight of the soft loss, >= 0; 2.25 on CIFAR, 2.5 on ImageNet. Not used if convex.
        convex: the variant of TGeo-KD's authors.

    Raises:
        ValueError: beta negative or not finite.

    References:
        Zhou et al. 2021, "Rethinking Soft Labels for Knowledge Distillation" (arXiv 2102.00650),
        equation 9. Their soft loss is the cross-entropy with the soft target; `kl` has the same
        gradient.

    Examples:
        >>> zeros = jnp.zeros((1, 2))  # equal losses: w = 1 - 1/e
        >>> situation = Situation(zeros, zeros, jnp.array([0]), *[jnp.zeros(1)] * 2, None, 1, 9)
        >>> print(wls(convex=True).weights({}, situation)[1].round(4))
        [0.6321]
    """
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"ratio.wls.beta={beta}: must be a finite number >= 0; 2.25 on CIFAR")

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        del meta_params
        student_B, teacher_B = (
            losses.cross_entropy(logits_BxK, situation.labels_B)
            for logits_BxK in (situation.student_logits_BxK, situation.teacher_logits_BxK)
        )
        weight_B = 1 - jnp.exp(-student_B / (teacher_B + 1e-7))
        return (1 - weight_B, weight_B) if convex else (jnp.ones_like(weight_B), beta * weight_B)

    return FusionRatio(nothing_learned, weights, reads_class_means=False)


RATIOS: dict[str, Callable[..., FusionRatio]] = {
    "constant": constant,
    "weighted": weighted,
    "annealed": annealed,
    "ada": ada,
    "wls": wls,
    "rw": rw,
    "bikd": bikd,
    "tgeo": tgeo,
}


def _fixed(name: str, hard: float, soft: float, warmup_epochs: int) -> FusionRatio:
    if not warmup_epochs >= 0:
        raise ValueError(f"ratio.{name}.warmup_epochs={warmup_epochs}: must be >= 0")

    def weights(meta_params: MetaParams, situation: Situation) -> tuple[Array, Array]:
        del meta_params
        ones_B = jnp.ones_like(situation.soft_B)
        grown = jnp.minimum(situation.epoch / warmup_epochs, 1) if warmup_epochs else 1
        return hard * ones_B, soft * grown * ones_B

    return FusionRatio(nothing_learned, weights, reads_class_means=False)
