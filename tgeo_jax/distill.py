"""Joins the three axes into one training step.

    batch -> teacher logits (roles) -+
          -> student logits ---------+-> hard_B, soft_B (losses) -+
                                     +-> weights of both (ratios) +-> inner loss -> student update
    validation batch -> outer loss at the updated student -> hypergradient -> fusion update

`step(state, batch, val_batch) -> (state, metrics)` is pure; jit, scan, vmap over seeds and
sharding are applied to it from outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tgeo_jax import bilevel, losses, metrics, randomness, ratios, roles
from tgeo_jax.metrics import Seen
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Batch, Fusion, Learner, Teacher, TrainState

Array = jax.Array
PyTree = Any
ORDERS = ("student_first", "fusion_first", "prequential")


@dataclasses.dataclass(frozen=True)
class Distillation:
    """One answer on each axis, and how to optimise.

    Attributes:
        student: the student's module.
        num_classes: K.
        role: who teaches.
        soft_loss: what is compared.
        ratio: how much teacher, for each sample.
        optimizer: the student's.
        fusion_optimizer: the meta-parameters'.
        total_steps: length of training, for ratios that follow progress.
        training_view: (key, raw images) -> network input, with augmentation.
        clean_view: raw images -> network input, without.
        order: `student_first` (real step, then fusion update at the new student), `fusion_first`
            (virtual step, fusion update, real step) or `prequential` (as student_first, but the
            outer batch is the next training batch).
        meta_every: the fusion network is updated every this many steps.
        estimator: see `bilevel`.
    """

    student: nn.Module
    num_classes: int
    role: roles.Role
    soft_loss: losses.SoftLoss
    ratio: ratios.FusionRatio
    optimizer: optax.GradientTransformation
    fusion_optimizer: optax.GradientTransformation
    total_steps: int
    training_view: Callable[[Array, Array], Array]
    clean_view: Callable[[Array], Array]
    order: str = "student_first"
    meta_every: int = 1
    estimator: str = "mixed"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"meta.order={self.order!r}: use one of {', '.join(ORDERS)}")
        if self.order == "prequential" and self.estimator != "mixed":
            raise ValueError(
                f"meta.estimator={self.estimator!r}: meta.order='prequential' reuses the forward "
                "pass and is only available with meta.estimator='mixed'"
            )


def init_state(method: Distillation, seed: Array | int, images_BxHxWxC: Array) -> TrainState:
    """The state before the first step.

    Args:
        method: what will be trained.
        seed: scalar; two seeds share nothing.
        images_BxHxWxC: raw images, only their shape and dtype matter.

    Returns:
        A `TrainState` at step 0.

    Examples: in `train_step`, which needs the same method.
    """
    variables = method.student.init(
        randomness.key(seed, 0, Purpose.STUDENT_INIT), method.clean_view(images_BxHxWxC)
    )
    params = variables["params"]
    meta_params = {}
    if method.role.teach is not None:
        fusion_key = randomness.key(seed, 0, Purpose.FUSION_INIT)
        meta_params = method.ratio.init(fusion_key, method.num_classes)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        student=Learner(params, variables.get("batch_stats", {}), method.optimizer.init(params)),
        fusion=Fusion(meta_params, method.fusion_optimizer.init(meta_params)),
    )


def train_step(
    method: Distillation, teacher: Teacher
) -> Callable[[TrainState, Batch, Batch], tuple[TrainState, dict[str, metrics.Mean]]]:
    """The pure training step of a method.

    Inner loss: `mean_i [hard_weight_i * CE_i + soft_weight_i * soft_i]`, the weights constant with
    respect to the student. Outer loss: mean cross-entropy of the updated student on `val_batch`,
    in training mode but without touching the running statistics. Where the ratio has nothing to
    learn, `val_batch` is ignored.

    Args:
        method: what is trained.
        teacher: its variables and class means; arrays or tracers.

    Returns:
        `step(state, batch, val_batch) -> (state, metrics)`. With order `prequential`, `val_batch`
        is the next training batch.

    References:
        TGeo-KD (arXiv 2312.15112), bilevel objective; alternation as in its released code
        (student_first) or Meta-Weight-Net (fusion_first, arXiv 1902.07379).

    Examples:
        >>> from tgeo_jax import models
        >>> method = Distillation(
        ...     models.build("mlp", 10), 10, roles.alone(None), losses.soft_loss("kl"),
        ...     ratios.constant(), optax.sgd(0.1), optax.adam(1e-3), 100,
        ...     lambda key, images: images, lambda images: images)
        >>> batch = Batch(jnp.ones((2, 8, 8, 1)), jnp.array([0, 1]))
        >>> start = init_state(method, 0, batch.images_BxHxWxC)
        >>> state, found = train_step(method, Teacher(None, None))(start, batch, batch)
        >>> int(start.step), int(state.step), sorted(found)
        (0, 1, ['accuracy', 'hard_loss'])
    """

    def step(state: TrainState, batch: Batch, val_batch: Batch):
        if not learns_ratio(state):
            return _plain_step(method, teacher, state, batch)
        if method.order == "prequential":
            current = prequential_start(method, teacher, state, batch)
            new_state, _, found = prequential_step(method, teacher, state, current, val_batch)
            return new_state, found
        if method.meta_every == 1:
            return _meta_step(method, teacher, state, batch, val_batch)
        return jax.lax.cond(
            state.step % method.meta_every == 0,
            lambda: _meta_step(method, teacher, state, batch, val_batch),
            lambda: _plain_step(method, teacher, state, batch),
        )

    return step


def learns_ratio(state: TrainState) -> bool:
    """Whether the ratio has meta-parameters; static, so usable while tracing.

    Examples:
        >>> none = jnp.zeros(())
        >>> state = TrainState(none, none, Learner({}, {}, ()), Fusion({"alpha": none}, ()))
        >>> learns_ratio(state), learns_ratio(state.replace(fusion=Fusion({}, ())))
        (True, False)
    """
    return bool(jax.tree.leaves(state.fusion.params))


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
    view = _look(method, teacher, state.seed, state.step, batch)
    apply = _viewer(method, state, state.student.batch_stats, view)
    return bilevel.forward(apply, state.student.params)


def prequential_step(
    method: Distillation,
    teacher: Teacher,
    state: TrainState,
    current: bilevel.Forward,
    next_batch: Batch,
) -> tuple[TrainState, bilevel.Forward, dict[str, metrics.Mean]]:
    """One step given its own forward pass; returns the next batch's, to hand to the next call.

    Args:
        method: what is trained, with order `prequential`.
        teacher: its variables and class means.
        state: before the step.
        current: `prequential_start` of this batch, or what the call before returned.
        next_batch: the next training batch, which is also the outer batch.

    Returns:
        (state, forward of the next batch, metrics).
    """
    batch_stats, view = current.aux
    next_view = _look(method, teacher, state.seed, state.step + 1, next_batch)

    def outer_loss(logits_BxK: Array) -> tuple[Array, None]:
        return jnp.mean(losses.cross_entropy(logits_BxK, next_view.labels_B)), None

    result, following = bilevel.prequential(
        lambda logits, meta: _fused_loss(method, teacher, state, view, logits, meta),
        outer_loss,
        current,
        _viewer(method, state.replace(step=state.step + 1), batch_stats, next_view),
        state.student.params,
        state.fusion.params,
        method.optimizer,
        state.student.opt_state,
        when=method.meta_every == 1 or state.step % method.meta_every == 0,
    )
    fusion = _update_fusion(method, state.fusion, result.meta_grads)
    if method.meta_every > 1:
        updated = state.step % method.meta_every == 0
        fusion = jax.tree.map(lambda a, b: jnp.where(updated, a, b), fusion, state.fusion)
    student = Learner(result.params, batch_stats, result.opt_state)
    outer = _outer_metric(result.outer_value, next_batch)
    return _advance(state, student, fusion), following, metrics.of_step(result.inner_aux, outer)


class _View(NamedTuple):
    """A batch as the networks get it; `inputs` is dropped once the student has seen them."""

    inputs: Any
    labels_B: Array
    teacher_logits_BxK: Array | None


def _look(method: Distillation, teacher: Teacher, seed: Array, step: Array, batch: Batch) -> _View:
    inputs = method.training_view(randomness.key(seed, step, Purpose.AUGMENT), batch.images_BxHxWxC)
    if method.role.teach is None:
        return _View(inputs, batch.labels_B, None)
    return _View(inputs, batch.labels_B, method.role.teach(teacher.variables, inputs))


def _student(
    method: Distillation, params: PyTree, batch_stats: PyTree, inputs: Array, key: Array
) -> tuple[Array, PyTree]:
    """Training-mode logits and the running statistics that they would lead to."""
    logits_BxK, updated = method.student.apply(
        {"params": params, "batch_stats": batch_stats},
        inputs,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return logits_BxK, updated.get("batch_stats", {})


def _viewer(method: Distillation, state: TrainState, batch_stats: PyTree, view: _View) -> Callable:
    """params -> (logits, (new batch_stats, view)) with this step's randomness."""
    key = randomness.key(state.seed, state.step, Purpose.DROPOUT)

    def apply(params: PyTree) -> tuple[Array, tuple[PyTree, _View]]:
        logits_BxK, new_stats = _student(method, params, batch_stats, view.inputs, key)
        return logits_BxK, (new_stats, view._replace(inputs=None))

    return apply


def _fused_loss(
    method: Distillation,
    teacher: Teacher,
    state: TrainState,
    view: _View,
    logits_BxK: Array,
    meta_params: PyTree,
    anchor_logits_BxK: Array | None = None,
) -> tuple[Array, Seen]:
    """The inner loss from logits. The ratio sees `anchor_logits_BxK` where those are given."""
    hard_B = losses.cross_entropy(logits_BxK, view.labels_B)
    if view.teacher_logits_BxK is None:
        return jnp.mean(hard_B), Seen(logits_BxK, view.labels_B, hard_B, None, None)
    soft_B = method.soft_loss(logits_BxK, view.teacher_logits_BxK, view.labels_B)
    seen_logits_BxK, seen_hard_B, seen_soft_B = logits_BxK, hard_B, soft_B
    if anchor_logits_BxK is not None:
        seen_logits_BxK = anchor_logits_BxK
        seen_hard_B = losses.cross_entropy(anchor_logits_BxK, view.labels_B)
        seen_soft_B = method.soft_loss(anchor_logits_BxK, view.teacher_logits_BxK, view.labels_B)
    # Here and only here: a ratio is a constant with respect to the student.
    situation = jax.lax.stop_gradient(
        ratios.Situation(
            student_logits_BxK=seen_logits_BxK,
            teacher_logits_BxK=view.teacher_logits_BxK,
            labels_B=view.labels_B,
            hard_B=seen_hard_B,
            soft_B=seen_soft_B,
            class_means_KxK=teacher.class_means_KxK,
            progress=state.step / method.total_steps,
        )
    )
    hard_weight_B, soft_weight_B = method.ratio.weights(meta_params, situation)
    loss = jnp.mean(hard_weight_B * hard_B + soft_weight_B * soft_B)
    seen = Seen(logits_BxK, view.labels_B, hard_B, situation, (hard_weight_B, soft_weight_B))
    return loss, seen


def _inner_loss(
    method: Distillation, teacher: Teacher, state: TrainState, batch: Batch
) -> Callable[[PyTree, PyTree], tuple[Array, tuple[PyTree, Seen]]]:
    view = _look(method, teacher, state.seed, state.step, batch)
    apply = _viewer(method, state, state.student.batch_stats, view)
    anchor_logits_BxK = None
    if method.estimator == "finite_difference":
        # Finite differences see through stop_gradient: fix what the ratio looks at from outside.
        anchor_logits_BxK = apply(state.student.params)[0]

    def loss(params: PyTree, meta_params: PyTree) -> tuple[Array, tuple[PyTree, Seen]]:
        logits_BxK, (batch_stats, _) = apply(params)
        value, seen = _fused_loss(
            method, teacher, state, view, logits_BxK, meta_params, anchor_logits_BxK
        )
        return value, (batch_stats, seen)

    return loss


def _plain_step(method: Distillation, teacher: Teacher, state: TrainState, batch: Batch):
    inner_loss = _inner_loss(method, teacher, state, batch)
    student, seen = _real_step(method, inner_loss, state, state.fusion.params)
    return _advance(state, student, state.fusion), metrics.of_step(seen, _no_outer_metric())


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
    method: Distillation, teacher: Teacher, state: TrainState, batch: Batch, val_batch: Batch
):
    inner_loss = _inner_loss(method, teacher, state, batch)
    val_inputs = method.clean_view(val_batch.images_BxHxWxC)
    key = randomness.key(state.seed, state.step, Purpose.OUTER_DROPOUT)

    def outer_loss(params: PyTree) -> Array:
        logits_BxK, _ = _student(method, params, state.student.batch_stats, val_inputs, key)
        return jnp.mean(losses.cross_entropy(logits_BxK, val_batch.labels_B))

    result = bilevel.one_step(
        inner_loss,
        lambda params: (outer_loss(params), None),
        state.student.params,
        state.fusion.params,
        method.optimizer,
        state.student.opt_state,
        estimator=method.estimator,
        has_aux=True,
    )
    fusion = _update_fusion(method, state.fusion, result.meta_grads)
    if method.order == "fusion_first":
        student, seen = _real_step(method, inner_loss, state, fusion.params)
    else:
        batch_stats, seen = result.inner_aux
        student = Learner(result.params, batch_stats, result.opt_state)
    outer = _outer_metric(result.outer_value, val_batch)
    return _advance(state, student, fusion), metrics.of_step(seen, outer)


def _update_fusion(method: Distillation, fusion: Fusion, meta_grads: PyTree) -> Fusion:
    updates, opt_state = method.fusion_optimizer.update(meta_grads, fusion.opt_state, fusion.params)
    return Fusion(optax.apply_updates(fusion.params, updates), opt_state)


def _advance(state: TrainState, student: Learner, fusion: Fusion) -> TrainState:
    return state.replace(step=state.step + 1, student=student, fusion=fusion)


def _outer_metric(outer_value: Array, val_batch: Batch) -> metrics.Mean:
    count = jnp.asarray(float(val_batch.labels_B.size))
    return metrics.Mean(outer_value * count, count)


def _no_outer_metric() -> metrics.Mean:
    return metrics.Mean(jnp.zeros(()), jnp.zeros(()))
