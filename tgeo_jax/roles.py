"""Roles: the axis "who teaches?".

A role says where a batch's teacher logits come from, and whether a teacher trains along. `alone`
is training without a teacher: that is how teachers, plain students and the first anchor are
trained, by the same step as everything else. Adding a role is adding a function here and its name
to `ROLES`; its keyword-only arguments become the configuration section of the same name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Variables = Any
Weight = Sequence[float]  # one value, or one for each stretch between learning-rate drops


class Cached(NamedTuple):
    """Which augmented views of each example have stored logits; none: the clean image's."""

    views: int
    augmentation_seed: int


class Weights(NamedTuple):
    """Weights of the six terms of two networks that learn together; see `trikd`."""

    hard_student: Weight = (1.0,)
    teacher_student: Weight = (1.0,)
    anchor_student: Weight = (0.0,)
    hard_teacher: Weight = (1.0,)
    student_teacher: Weight = (1.0,)
    anchor_teacher: Weight = (0.0,)


class Role(NamedTuple):
    """A role as a value; everything absent is training alone."""

    teach: Callable[[Variables, Array], Array] | None = None  # (variables, inputs) -> logits
    cached: Cached | None = None
    peer: nn.Module | None = None  # a teacher that trains along
    anchored: bool = False  # by a trained network of the student's architecture
    weights: Weights = Weights()
    num_teachers: int = 0  # M where each of M teachers has a ratio of its own: logits [M, B, K]
    workdirs: tuple[str, ...] = ()  # of several teachers
    needs_trained: bool = False  # whether a trained teacher must be given

    @property
    def has_teacher(self) -> bool:
        """Whether there is anything to distil from."""
        return self.teach is not None or self.cached is not None or self.peer is not None


def alone(teacher: nn.Module | None) -> Role:
    """No teacher: the inner loss is the mean hard loss, ratios and soft losses are not used.

    Examples:
        >>> alone(None).has_teacher
        False
    """
    del teacher
    return Role()


def frozen(teacher: nn.Module | None) -> Role:
    """A trained teacher that no longer changes, in evaluation mode on the student's own view.

    `t_i = stop_gradient(f_T(x_i))`, running statistics, no dropout.

    Args:
        teacher: the teacher's module; its variables travel separately.

    Raises:
        ValueError: no teacher module.

    References:
        Hinton, Vinyals, Dean 2015; the same augmented view for both, as in all CIFAR
        distillation recipes.

    Examples:
        >>> from tgeo_jax import models
        >>> module, images = models.build("mlp", 3), jnp.zeros((2, 8, 8, 1))
        >>> variables = module.init(jax.random.key(0), images)
        >>> frozen(module).teach(variables, images).shape
        (2, 3)
    """
    return Role(teach=_in_evaluation_mode(_present("frozen", teacher)), needs_trained=True)


def cached(
    teacher: nn.Module | None, *, views: int = 0, augmentation_seed: int = 0, name: str = ""
) -> Role:
    """A frozen teacher whose logits are computed once and stored beside the dataset.

    With `views=0` the logits are those of the clean image, whatever view the student sees. With
    `views=V` each example has V augmented views, fixed by its id and `augmentation_seed`; student
    and teacher see the same one, another in every epoch, V epochs long.

    Args:
        teacher: the teacher's module.
        views: V >= 0.
        augmentation_seed: in [0, 2**32).
        name: of the file beside the dataset; empty: made from teacher.workdir.

    Raises:
        ValueError: no teacher module, views negative, a seed that 32 bits cannot hold.

    References:
        Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent"
        (arXiv 2106.05237), on fixed against consistent teaching.

    Examples:
        >>> from tgeo_jax import models
        >>> cached(models.build("mlp", 3), views=2).cached
        Cached(views=2, augmentation_seed=0)
    """
    _present("cached", teacher)
    del name  # where the logits lie is no concern of a step
    if views < 0:
        raise ValueError(f"role.cached.views={views}: must be >= 0; 0 is the clean image")
    if not 0 <= augmentation_seed < 2**32:
        raise ValueError(
            f"role.cached.augmentation_seed={augmentation_seed}: must be in [0, 2**32)"
        )
    return Role(cached=Cached(views, augmentation_seed), needs_trained=True)


COMBINE = ("mean", "each")


def several(
    teacher: nn.Module | None, *, workdirs: Sequence[str] = (), combine: str = "mean"
) -> Role:
    """Several frozen teachers, whatever their architectures.

    `mean`: one teacher that predicts the mean of their probabilities,
    `t_i = log mean_m softmax(f_m(x_i))`. `each`: every teacher has its own soft loss and its own
    ratio; the inner loss is the mean of the M fused losses.

    Args:
        teacher: a module with `models` for them all; see `Ensemble`.
        workdirs: the finished runs that trained them, two or more.
        combine: `mean` or `each`.

    Raises:
        ValueError: no module, fewer than two workdirs, an unknown way to combine.

    References:
        Hinton, Vinyals, Dean 2015, ensembles of teachers. One ratio for each is ours.

    Examples:
        >>> from tgeo_jax import models
        >>> both = Ensemble((models.build("mlp", 3), models.build("cnn", 3)))
        >>> several(both, workdirs=("a", "b"), combine="each").num_teachers
        2
    """
    if combine not in COMBINE:
        raise ValueError(f"role.several.combine={combine!r}: use one of {', '.join(COMBINE)}")
    if len(workdirs) < 2:
        raise ValueError(
            f"role.several.workdirs={tuple(workdirs)}: must name the workdirs of two or more "
            "trained teachers; for one use role.name='frozen'"
        )
    teach_each = _in_evaluation_mode(_present("several", teacher))
    if combine == "each":
        return Role(teach_each, num_teachers=len(workdirs), workdirs=tuple(workdirs))

    def teach(variables: Variables, inputs: Array) -> Array:
        return mean_prediction(teach_each(variables, inputs))

    return Role(teach, workdirs=tuple(workdirs))


def dml(
    teacher: nn.Module | None,
    *,
    hard_student: Weight = (1.0,),
    teacher_student: Weight = (1.0,),
    hard_teacher: Weight = (1.0,),
    student_teacher: Weight = (1.0,),
) -> Role:
    """Mutual learning: two networks train side by side, each on the other's predictions.

    `trikd` without an anchor; see there.

    Args:
        teacher: the peer's module; it starts untrained.
        hard_student, teacher_student, hard_teacher, student_teacher: as in `trikd`.

    Raises:
        ValueError: no teacher module, a negative weight.

    References:
        Zhang et al. 2018, "Deep Mutual Learning" (arXiv 1706.00384), equations 3 to 6, both
        networks updated from the same forward passes.

    Examples:
        >>> from tgeo_jax import models
        >>> dml(models.build("mlp", 3)).anchored
        False
    """
    weights = Weights(
        hard_student=hard_student,
        teacher_student=teacher_student,
        hard_teacher=hard_teacher,
        student_teacher=student_teacher,
    )
    _check_weights("dml", weights)
    return Role(peer=_present("dml", teacher), weights=weights)


STARTS = ("fresh", "trained", "frozen")


def trikd(
    teacher: nn.Module | None,
    *,
    hard_student: Weight = (1.0,),
    teacher_student: Weight = (1.0,),
    anchor_student: Weight = (1.0,),
    hard_teacher: Weight = (1.0,),
    student_teacher: Weight = (1.0,),
    anchor_teacher: Weight = (1.0,),
    start: str = "fresh",
    generations: int = 2,
    anchor: str = "",
) -> Role:
    """Three networks: a teacher that trains along, the student, and an anchor that holds both.

    `L_S = w_S h_i CE(s) + w_tS r_i D(s, t) + w_aS D(s, a)` and
    `L_T = w_T CE(t) + w_aT D(t, a) + w_sT D(t, s)`, batch means; D is the soft loss (learner first,
    target second and constant), h and r the ratio's weights, a the frozen anchor. Both take one
    step from one forward pass each. The trained student anchors the next generation. Our
    reconstruction: of the paper only abstract and introduction were at hand.

    Args:
        teacher: the teacher's module.
        hard_student: w_S, like all weights >= 0: one value, or one for each stretch between the
            drops of the student's learning rate, the last one holding on; (1, 100) is the "step"
            schedule.
        teacher_student: w_tS.
        anchor_student: w_aS.
        hard_teacher: w_T.
        student_teacher: w_sT.
        anchor_teacher: w_aT.
        start: where the teacher starts: `fresh`; `trained`, from teacher.workdir; or `frozen`,
            that one without training it on.
        generations: G >= 1 when a run trains its own anchor first and then G generations; not used
            where `anchor` is given.
        anchor: workdir of a finished run whose student is the anchor; empty: train one.

    Raises:
        ValueError: no teacher module, a negative weight, an unknown start, generations < 1.

    References:
        "Triplet Knowledge Distillation" (arXiv 2305.15975); docs/methods/trikd.md says what is
        ours.

    Examples:
        >>> from tgeo_jax import models
        >>> trikd(models.build("mlp", 3), anchor_teacher=(1, 100)).weights.anchor_teacher
        (1, 100)
    """
    if start not in STARTS:
        raise ValueError(f"role.trikd.start={start!r}: use one of {', '.join(STARTS)}")
    if generations < 1:
        raise ValueError(f"role.trikd.generations={generations}: must be >= 1")
    del anchor  # its variables are in the state
    module = _present("trikd", teacher)
    weights = Weights(
        hard_student=hard_student,
        teacher_student=teacher_student,
        anchor_student=anchor_student,
        hard_teacher=hard_teacher,
        student_teacher=student_teacher,
        anchor_teacher=anchor_teacher,
    )
    _check_weights("trikd", weights)
    # Without a weight there is nothing to be anchored to: mutual learning.
    role = Role(anchored=any((*anchor_student, *anchor_teacher)), weights=weights)
    if start == "frozen":
        return role._replace(teach=_in_evaluation_mode(module), needs_trained=True)
    return role._replace(peer=module, needs_trained=start == "trained")


ROLES: dict[str, Callable[..., Role]] = {
    "alone": alone,
    "frozen": frozen,
    "cached": cached,
    "several": several,
    "dml": dml,
    "trikd": trikd,
}


class Ensemble(nn.Module):
    """Several networks as one module: logits [M, B, K] of M networks on the same inputs.

    Attributes:
        models: the networks; their variables lie under `models_0`, `models_1`, ...
    """

    models: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, inputs: Array, train: bool = False) -> Array:
        return jnp.stack([model(inputs, train=train) for model in self.models])


def mean_prediction(logits_MxBxK: Array) -> Array:
    """Logits of the mean of several predicted distributions.

    `log mean_m softmax(z_m)`, shape [B, K], at least float32.

    Examples:
        >>> z = jnp.log(jnp.array([[[.9, .1]], [[.5, .5]]]))
        >>> print(jnp.exp(mean_prediction(z)))
        [[0.7 0.3]]
    """
    logits_MxBxK = logits_MxBxK.astype(jnp.promote_types(logits_MxBxK.dtype, jnp.float32))
    log_probs_MxBxK = jax.nn.log_softmax(logits_MxBxK)
    return jax.nn.logsumexp(log_probs_MxBxK, axis=0) - math.log(logits_MxBxK.shape[0])


def _present(name: str, teacher: nn.Module | None) -> nn.Module:
    if teacher is None:
        raise ValueError(f"role.name={name!r} needs a teacher: set teacher.name")
    return teacher


def _in_evaluation_mode(module: nn.Module) -> Callable[[Variables, Array], Array]:
    def teach(variables: Variables, inputs: Array) -> Array:
        logits: Any = module.apply(variables, inputs, train=False)
        return jax.lax.stop_gradient(logits)

    return teach


def _check_weights(name: str, weights: Weights) -> None:
    for field, values in weights._asdict().items():
        if not values or not all(value >= 0 and math.isfinite(value) for value in values):
            raise ValueError(
                f"role.{name}.{field}={tuple(values)}: must hold one or more finite numbers >= 0"
            )
