"""Roles: the axis "who teaches?".

A role says how a batch gets its teacher logits. `alone` is training without a teacher: that is
how teachers and plain students are trained, by the same step as everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

Array = jax.Array
Variables = Any


class Role(NamedTuple):
    """A role as a value; `teach` is None where nobody teaches."""

    teach: Callable[[Variables, Array], Array] | None  # (teacher_variables, images) -> logits_BxK


def alone(teacher: nn.Module | None) -> Role:
    """No teacher: the inner loss is the mean hard loss, ratios and soft losses are not used.

    Examples:
        >>> alone(None).teach is None
        True
    """
    del teacher
    return Role(None)


def frozen(teacher: nn.Module | None) -> Role:
    """A trained teacher that no longer changes, in evaluation mode on the student's own view.

    `t_i = stop_gradient(f_T(x_i))`, running statistics, no dropout.

    Args:
        teacher: the teacher's module; its variables travel separately.

    Returns:
        The role.

    Raises:
        ValueError: no teacher module.

    References:
        Hinton, Vinyals, Dean 2015; the same augmented view for both, as in all CIFAR
        distillation recipes.

    Examples:
        >>> from tgeo_jax import models
        >>> module, images = models.build("mlp", 3), jax.numpy.zeros((2, 8, 8, 1))
        >>> variables = module.init(jax.random.key(0), images)
        >>> frozen(module).teach(variables, images).shape
        (2, 3)
    """
    if teacher is None:
        raise ValueError("role.name='frozen' needs a teacher: set teacher.name and teacher.workdir")
    module = teacher

    def teach(variables: Variables, images: Array) -> Array:
        logits_BxK: Any = module.apply(variables, images, train=False)
        return jax.lax.stop_gradient(logits_BxK)

    return Role(teach)


ROLES: dict[str, Callable[[nn.Module | None], Role]] = {"alone": alone, "frozen": frozen}
