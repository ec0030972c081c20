"""Joins the three axes into one training step.

    batch -> teacher logits (roles) -+
          -> student logits ---------+-> hard_B, soft_B (losses) -+
                                     +-> weights of both (ratios) +-> inner loss -> student update
    validation batch -> outer loss at the updated student -> hypergradient -> fusion update

`step(state, batch, val_batch) -> (state, metrics)` is pure; jit, scan, vmap over seeds and
sharding are applied to it from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tgeo_jax import bilevel, metrics, objective, online, randomness
from tgeo_jax.method import ORDERS, Distillation
from tgeo_jax.metrics import Seen
from tgeo_jax.objective import View
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch, Fusion, Learner, Teacher, TrainState

Array = jax.Array
PyTree = Any
Found = dict[str, metrics.Mean]
__all__ = [
    "ORDERS",
    "Distillation",
    "init_state",
    "prequential_start",
    "prequential_step",
    "train_step",
]


def init_state(
    method: Distillation,
    seed: Array | int,
    images_BxHxWxC: Array | np.ndarray,
    *,
    trained_teacher: PyTree = None,
    anchor: PyTree = None,
) -> TrainState:
    """The state before the first step.

    Args:
        method: what will be trained.
        seed: scalar; two seeds share nothing.
        images_BxHxWxC: raw images, only their shape and dtype matter.
        trained_teacher: variables that a teacher which trains along starts from; None: fresh.
        anchor: variables of the anchor, of the student's architecture, where the role has one.

    Returns:
        A `TrainState` at step 0.

    Examples: in `train_step`, which needs the same method.
    """
    inputs = method.clean_view(jnp.asarray(images_BxHxWxC))
    variables = method.student.init(randomness.key(seed, 0, Purpose.STUDENT_INIT), inputs)
    params = variables["params"]
    meta_params, peer = {}, None
    if method.role.has_teacher:
        fusion_key = randomness.key(seed, 0, Purpose.FUSION_INIT)
        meta_params = method.fusion_ratio.init(fusion_key, method.num_classes)
    if method.role.peer is not None:
        peer = online.init(method, seed, inputs, trained_teacher)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        student=Learner(params, variables.get("batch_stats", {}), method.optimizer.init(params)),
        fusion=Fusion(meta_params, method.fusion_optimizer.init(meta_params)),
        teacher=peer,
        anchor=anchor if method.role.anchored else None,
    )


def train_step(
    method: Distillation, teacher: Teacher, updates_fusion: bool | None = None
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, dict[str, metrics.Mean]]]:
    """The pure training step of a method.

    Inner loss: `mean_i [hard_weight_i * hard_i + soft_weight_i * soft_i]`, the weights constant
    with respect to the student, and what the role adds to it (see `roles.trikd`). Outer loss: mean
    hard loss of the updated student on `val_batch`, in training mode but without touching the
    running statistics. The hard loss is the cross-entropy unless the method has another. Where the
    ratio has nothing to learn, `val_batch` is ignored. A teacher that trains along takes its own
    step, from the forward passes of before both steps.

    Args:
        method: what is trained.
        teacher: its variables and class means; arrays or tracers.
        updates_fusion: whether this step takes the hypergradient; None: every `meta_every`-th does,
            by a branch in the compiled program.

    Returns:
        `step(state, batch, val_batch) -> (state, metrics)`. With order `prequential`, `val_batch`
        is the next training batch.

    References:
        TGeo-KD (arXiv 2312.15112), bilevel objective; alternation as in its released code
        (student_first) or Meta-Weight-Net (fusion_first, arXiv 1902.07379).

    Examples:
        >>> from tgeo_jax import losses, models, ratios, roles
        >>> method = Distillation(
        ...     models.build("mlp", 10), 10, roles.alone(None), losses.soft_loss("kl"),
        ...     ratios.constant(), optax.sgd(0.1), optax.adam(1e-3), 10, 10,
        ...     lambda keys, images: images, lambda images: images)
        >>> batch = Batch(jnp.ones((2, 8, 8, 1)), jnp.array([0, 1]))
        >>> start = init_state(method, 0, batch.images_BxHxWxC)
        >>> state, found = train_step(method, Teacher(None, None))(start, batch, batch)
        >>> int(start.step), int(state.step), sorted(found)
        (0, 1, ['accuracy', 'hard_loss'])
    """

    def step(state: TrainState, batch: Batch, val_batch: Batch) -> tuple[TrainState, Found]:
        if method.meta_learned and method.order == "prequential":
            current = prequential_start(method, teacher, state, batch)
            new_state, _, found = prequential_step(
                method, teacher, state, current, val_batch, updates_fusion
            )
            return new_state, found
        view, spoken = objective.look(method, teacher, state, state.step, batch), None
        if method.role.peer is not None:
            spoken = online.speak(method, state, view.inputs)
            view = view._replace(teacher_logits=jax.lax.stop_gradient(spoken.logits_BxK))
        student, fusion, seen, outer = _student_step(
            method, teacher, state, view, val_batch, updates_fusion
        )
        found, peer = metrics.of_step(seen, outer), state.teacher
        if spoken is not None:
            peer, said = online.listen(method, state, spoken, view, seen)
            found |= said
        return _advance(state, student, fusion).replace(teacher=peer), found

    return step


def prequential_start(
    method: Distillation, teacher: Teacher, state: TrainState, batch: Batch
) -> bilevel.Forward:
    """The student's forward pass on a batch, ready to be differentiated by `prequential_step`.

    Args:
        method: what is trained, with order `prequential`.
        teacher: its variables and class means.
        state: before the step.
        batch: the first batch.

    Returns:
        What `prequential_step` takes as `current`; later ones come from the step before.
    """
    view = objective.look(method, teacher, state, state.step, batch)
    apply = objective.viewer(method, state, state.student.batch_stats, view)
    return bilevel.forward(apply, state.student.params)


def prequential_step(
    method: Distillation,
    teacher: Teacher,
    state: TrainState,
    current: bilevel.Forward,
    next_batch: Batch,
    updates_fusion: bool | None = None,
) -> tuple[TrainState, bilevel.Forward, dict[str, metrics.Mean]]:
    """One step given its own forward pass; returns the next batch's, to hand to the next call.

    Args:
        method: what is trained, with order `prequential`.
        teacher: its variables and class means.
        state: before the step.
        current: `prequential_start` of this batch, or what the call before returned.
        next_batch: the next training batch, which is also the outer batch.
        updates_fusion: as in `train_step`.

    Returns:
        (state, forward of the next batch, metrics).
    """
    batch_stats, view = current.aux
    next_view = objective.look(method, teacher, state, state.step + 1, next_batch)

    def outer_loss(logits_BxK: Array) -> tuple[Array, None]:
        targets, labels_B = next_view.teacher_logits, next_view.labels_B
        return objective.outer_value(method, logits_BxK, targets, labels_B), None

    when = takes_hypergradient(method, state, updates_fusion)
    result, following = bilevel.prequential(
        lambda logits, meta: objective.fused_loss(method, teacher, state, view, logits, meta),
        outer_loss,
        current,
        objective.viewer(method, state.replace(step=state.step + 1), batch_stats, next_view),
        state.student.params,
        state.fusion.params,
        method.optimizer,
        state.student.opt_state,
        when=when,
    )
    fusion = _update_fusion(method, state.fusion, result.meta_grads)
    if when is not True:
        fusion = jax.tree.map(lambda a, b: jnp.where(when, a, b), fusion, state.fusion)
    student = Learner(result.params, batch_stats, result.opt_state)
    outer = objective.outer_metric(result.outer_value, next_batch)
    return _advance(state, student, fusion), following, metrics.of_step(result.inner_aux, outer)


def takes_hypergradient(
    method: Distillation, state: TrainState, updates_fusion: bool | None = None
) -> bool | Array:
    """Whether this step takes the hypergradient, as a constant where that is known.

    Args:
        method: what is trained.
        state: before the step.
        updates_fusion: as in `train_step`.

    Examples:
        >>> from types import SimpleNamespace
        >>> method = SimpleNamespace(meta_learned=True, meta_every=2)
        >>> [bool(takes_hypergradient(method, SimpleNamespace(step=step))) for step in range(3)]
        [True, False, True]
    """
    if not method.meta_learned:
        return False
    if updates_fusion is not None or method.meta_every == 1:
        return updates_fusion is not False
    return state.step % method.meta_every == 0


def _student_step(
    method: Distillation,
    teacher: Teacher,
    state: TrainState,
    view: View,
    val_batch: Batch,
    updates_fusion: bool | None,
) -> tuple[Learner, Fusion, Seen, metrics.Mean]:
    when = takes_hypergradient(method, state, updates_fusion)
    if when is False:
        return _plain_step(method, teacher, state, view)
    if when is True:
        return _meta_step(method, teacher, state, view, val_batch)
    return jax.lax.cond(
        when,
        lambda: _meta_step(method, teacher, state, view, val_batch),
        lambda: _plain_step(method, teacher, state, view),
    )


def _plain_step(
    method: Distillation, teacher: Teacher, state: TrainState, view: View
) -> tuple[Learner, Fusion, Seen, metrics.Mean]:
    inner_loss = objective.inner_loss(method, teacher, state, view)
    student, seen = _real_step(method, inner_loss, state, state.fusion.params)
    return student, state.fusion, seen, objective.no_outer_metric()


def _real_step(
    method: Distillation, inner_loss: Callable, state: TrainState, meta_params: PyTree
) -> tuple[Learner, Seen]:
    student = state.student
    (_, (batch_stats, seen)), grads = jax.value_and_grad(inner_loss, has_aux=True)(
        student.params, meta_params
    )
    updates, opt_state = method.optimizer.update(grads, student.opt_state, student.params)
    return Learner(optax.apply_updates(student.params, updates), batch_stats, opt_state), seen


def _meta_step(
    method: Distillation, teacher: Teacher, state: TrainState, view: View, val_batch: Batch
) -> tuple[Learner, Fusion, Seen, metrics.Mean]:
    inner_loss = objective.inner_loss(method, teacher, state, view)
    outer_loss = objective.outer_loss(method, teacher, state, val_batch)
    per_batch = method.fusion_ratio.per_batch
    probe = state.fusion.params if per_batch is None else per_batch.start(view.labels_B.shape[0])
    result = bilevel.one_step(
        inner_loss,
        lambda params: (outer_loss(params), None),
        state.student.params,
        probe,
        method.optimizer,
        state.student.opt_state,
        estimator=method.estimator,
        has_aux=True,
    )
    if per_batch is not None:
        fusion, chosen = state.fusion, per_batch.update(result.meta_grads)
    else:
        fusion = _update_fusion(method, state.fusion, result.meta_grads)
        chosen = fusion.params
    if per_batch is not None or method.order == "fusion_first":
        student, seen = _real_step(method, inner_loss, state, chosen)
    else:
        batch_stats, seen = result.inner_aux
        student = Learner(result.params, batch_stats, result.opt_state)
    return student, fusion, seen, objective.outer_metric(result.outer_value, val_batch)


def _update_fusion(method: Distillation, fusion: Fusion, meta_grads: PyTree) -> Fusion:
    updates, opt_state = method.fusion_optimizer.update(meta_grads, fusion.opt_state, fusion.params)
    return Fusion(optax.apply_updates(fusion.params, updates), opt_state)


def _advance(state: TrainState, student: Learner, fusion: Fusion) -> TrainState:
    return state.replace(step=state.step + 1, student=student, fusion=fusion)
