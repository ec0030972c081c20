"""The inner and the outer loss of a method, as functions of the student's parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tgeo_jax import fusion, metrics, randomness
from tgeo_jax.method import Distillation
from tgeo_jax.metrics import Seen
from tgeo_jax.randomness import Purpose
from tgeo_jax.roles import Weights
from tgeo_jax.state import Batch, Teacher, TrainState

Array = jax.Array
PyTree = Any


class View(NamedTuple):
    """A batch as the networks get it; `inputs` is dropped once they have seen them.

    Logits are those of the teacher, [B, K] or [M, B, K], and of the anchor; None if there is none.
    """

    inputs: Any
    labels_B: Array
    teacher_logits: Array | None
    anchor_logits_BxK: Array | None = None


def look(
    method: Distillation, teacher: Teacher, state: TrainState, step: Array, batch: Batch
) -> View:
    """Augments a batch and asks the frozen networks about it.

    Args:
        method: what is trained.
        teacher: frozen teachers, if there are any.
        state: its seed and its anchor are used.
        step: whose random numbers to use; prequential steps look one ahead.
        batch: raw images.

    Returns:
        The view. A teacher that trains along is asked later, by its own forward pass.
    """
    role, cached = method.role, method.role.cached
    view_index: Any = 0
    if cached is not None and cached.views:
        view_index = step // method.steps_per_epoch % cached.views
        assert batch.ids_B is not None
        keys_B = randomness.example_keys(cached.augmentation_seed, view_index, batch.ids_B)
    else:
        key = randomness.key(state.seed, step, Purpose.AUGMENT)
        keys_B = jax.random.split(key, batch.images_BxHxWxC.shape[0])
    inputs = method.training_view(keys_B, batch.images_BxHxWxC)
    teacher_logits: Any = None
    anchor_logits_BxK: Any = None
    if role.teach is not None:
        teacher_logits = role.teach(teacher.variables, inputs)
    elif cached is not None:
        assert batch.teacher_logits_BxVxK is not None
        teacher_logits = batch.teacher_logits_BxVxK[:, view_index]
    if role.anchored:
        anchor_logits_BxK = jax.lax.stop_gradient(
            method.student.apply(state.anchor, inputs, train=False)
        )
    return View(inputs, batch.labels_B, teacher_logits, anchor_logits_BxK)


def training_mode(
    module: Any,
    params: PyTree,
    batch_stats: PyTree,
    inputs: Array,
    key: Array,
    replicas: int = 1,
) -> tuple[Array, PyTree]:
    """Any network's logits in training mode, and the running statistics they would lead to.

    With several replicas each sees its part of the batch by itself, as devices under `jax.pmap`
    do: BatchNorm by the statistics of that part, dropout by a key of its own; the running
    statistics are the mean over the replicas.
    """

    def run(inputs: Array, key: Array) -> tuple[Array, PyTree]:
        logits_BxK, updated = module.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return logits_BxK, updated.get("batch_stats", {})

    if replicas == 1:
        return run(inputs, key)
    parts = inputs.reshape(replicas, -1, *inputs.shape[1:])
    logits, stats = jax.vmap(run)(parts, jax.random.split(key, replicas))
    logits_BxK = logits.reshape(-1, logits.shape[-1])
    return logits_BxK, jax.tree.map(lambda values: values.mean(axis=0), stats)


def viewer(method: Distillation, state: TrainState, batch_stats: PyTree, view: View) -> Callable:
    """params -> (logits, (new batch_stats, view)) with this step's randomness."""
    key = randomness.key(state.seed, state.step, Purpose.DROPOUT)

    def apply(params: PyTree) -> tuple[Array, tuple[PyTree, View]]:
        logits_BxK, new_stats = training_mode(
            method.student, params, batch_stats, view.inputs, key, method.replicas
        )
        return logits_BxK, (new_stats, view._replace(inputs=None))

    return apply


def role_weights(method: Distillation, step: Array) -> Any:
    """The role's six weights at a step, `roles.Weights` of scalars.

    Examples:
        >>> from types import SimpleNamespace
        >>> role = SimpleNamespace(weights=Weights(anchor_student=(1.0, 100.0)))
        >>> method = SimpleNamespace(role=role, drop_steps=(5, 8))
        >>> print([float(role_weights(method, step).anchor_student) for step in (4, 5, 8)])
        [1.0, 100.0, 100.0]
    """
    stretch = sum((jnp.asarray(step >= drop, jnp.int32) for drop in method.drop_steps), 0)

    def now(values: Any) -> Array:
        return jnp.asarray(values, jnp.float32)[jnp.minimum(stretch, len(values) - 1)]

    scalars: Any = map(now, method.role.weights)
    return Weights(*scalars)


def soft_losses(method: Distillation, logits_BxK: Array, targets: Array, labels_B: Array) -> Array:
    """The soft loss, [B], or [M, B] where each of M teachers has its own."""
    if targets.ndim == 3:
        return jax.vmap(method.soft_loss, (None, 0, None))(logits_BxK, targets, labels_B)
    return method.soft_loss(logits_BxK, targets, labels_B)


def over_teachers(values: Array) -> Array:
    """Sum over the teachers where there are several, [M, B] -> [B].

    Examples:
        >>> print(over_teachers(jnp.ones(2)), over_teachers(jnp.ones((3, 2))))
        [1. 1.] [3. 3.]
    """
    return values.sum(axis=0) if values.ndim == 2 else values


def fused_loss(
    method: Distillation,
    teacher: Teacher,
    state: TrainState,
    view: View,
    logits_BxK: Array,
    meta_params: PyTree,
    fixed_logits_BxK: Array | None = None,
) -> tuple[Array, Seen]:
    """The inner loss from logits. The ratio sees `fixed_logits_BxK` where those are given."""
    hard_B = method.hard_loss(logits_BxK, view.labels_B)
    if view.teacher_logits is None:
        return jnp.mean(hard_B), Seen(logits_BxK, view.labels_B, hard_B, None, None)
    soft = soft_losses(method, logits_BxK, view.teacher_logits, view.labels_B)
    seen_logits_BxK, seen_hard_B, seen_soft = logits_BxK, hard_B, soft
    if fixed_logits_BxK is not None:
        seen_logits_BxK = fixed_logits_BxK
        seen_hard_B = method.hard_loss(fixed_logits_BxK, view.labels_B)
        seen_soft = soft_losses(method, fixed_logits_BxK, view.teacher_logits, view.labels_B)
    means = teacher.class_means_KxK if state.teacher is None else state.teacher.class_means_KxK
    # Here and only here: a ratio is a constant with respect to the student.
    situation = jax.lax.stop_gradient(
        fusion.Situation(
            student_logits_BxK=seen_logits_BxK,
            teacher_logits_BxK=view.teacher_logits,
            labels_B=view.labels_B,
            hard_B=seen_hard_B,
            soft_B=seen_soft,
            class_means_KxK=means,
            epoch=state.step // method.steps_per_epoch + 1,
            num_epochs=method.num_epochs,
        )
    )
    hard_weight_B, soft_weight = method.fusion_ratio.weights(meta_params, situation)
    if method.role.peer is None and not method.role.anchored:
        loss = jnp.mean(hard_weight_B * hard_B + over_teachers(soft_weight * soft))
        anchor_B = None
    else:
        now = role_weights(method, state.step)
        loss = jnp.mean(now.hard_student * hard_weight_B * hard_B)
        loss += jnp.mean(now.teacher_student * over_teachers(soft_weight * soft))
        anchor_B = None
        if view.anchor_logits_BxK is not None:
            anchor_B = method.soft_loss(logits_BxK, view.anchor_logits_BxK, view.labels_B)
            loss += now.anchor_student * jnp.mean(anchor_B)
    weights = (hard_weight_B, over_teachers(soft_weight))
    seen = Seen(logits_BxK, view.labels_B, hard_B, situation, weights, anchor_B)
    return loss, seen


def inner_loss(
    method: Distillation, teacher: Teacher, state: TrainState, view: View
) -> Callable[[PyTree, PyTree], tuple[Array, tuple[PyTree, Seen]]]:
    """(params, meta_params) -> (inner loss, (new batch_stats, what was seen))."""
    apply = viewer(method, state, state.student.batch_stats, view)
    fixed_logits_BxK = None
    if method.estimator == "finite_difference":
        # Finite differences see through stop_gradient: fix what the ratio looks at from outside.
        fixed_logits_BxK = apply(state.student.params)[0]

    def loss(params: PyTree, meta_params: PyTree) -> tuple[Array, tuple[PyTree, Seen]]:
        logits_BxK, (batch_stats, _) = apply(params)
        value, seen = fused_loss(
            method, teacher, state, view, logits_BxK, meta_params, fixed_logits_BxK
        )
        return value, (batch_stats, seen)

    return loss


def outer_loss(
    method: Distillation, teacher: Teacher, state: TrainState, val_batch: Batch
) -> Callable[[PyTree], Array]:
    """params -> loss on held-out samples, in training mode without touching running statistics.

    `mean_j [(1 - outer_soft) hard_j + outer_soft soft_j]`, the mean over several teachers' soft.
    """
    inputs = method.clean_view(val_batch.images_BxHxWxC)
    key = randomness.key(state.seed, state.step, Purpose.OUTER_DROPOUT)
    targets = None
    if method.outer_soft:
        targets = _outer_targets(method, teacher, state, val_batch, inputs)

    def loss(params: PyTree) -> Array:
        logits_BxK, _ = training_mode(
            method.student, params, state.student.batch_stats, inputs, key, method.replicas
        )
        return outer_value(method, logits_BxK, targets, val_batch.labels_B)

    return loss


def outer_value(
    method: Distillation, logits_BxK: Array, targets: Array | None, labels_B: Array
) -> Array:
    """The outer loss from logits; `targets` are the teacher's and may be None where not used."""
    hard = jnp.mean(method.hard_loss(logits_BxK, labels_B))
    if not method.outer_soft:
        return hard
    assert targets is not None
    soft = jnp.mean(soft_losses(method, logits_BxK, targets, labels_B))
    return (1 - method.outer_soft) * hard + method.outer_soft * soft


def _outer_targets(
    method: Distillation, teacher: Teacher, state: TrainState, val_batch: Batch, inputs: Array
) -> Array:
    if method.role.teach is not None:
        return method.role.teach(teacher.variables, inputs)
    if method.role.cached is not None:
        assert val_batch.teacher_logits_BxVxK is not None
        return val_batch.teacher_logits_BxVxK[:, 0]
    assert state.teacher is not None
    peer = state.teacher.learner
    # By batch statistics, as the student's: the running ones are still those of the beginning.
    key = randomness.key(state.seed, state.step, Purpose.TEACHER_OUTER_DROPOUT)
    logits_BxK, _ = training_mode(
        method.role.peer, peer.params, peer.batch_stats, inputs, key, method.replicas
    )
    return jax.lax.stop_gradient(logits_BxK)


def outer_metric(value: Array, val_batch: Batch) -> metrics.Mean:
    """The outer loss as a metric, weighted by its samples."""
    count = jnp.asarray(float(val_batch.labels_B.size))
    return metrics.Mean(value * count, count)


def no_outer_metric() -> metrics.Mean:
    """What a step without an outer loss reports."""
    return metrics.Mean(jnp.zeros(()), jnp.zeros(()))
