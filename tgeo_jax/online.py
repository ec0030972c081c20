"""The step of a teacher that trains along with the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tgeo_jax import geometry, metrics, objective, randomness
from tgeo_jax.method import Distillation
from tgeo_jax.metrics import Mean, Seen
from tgeo_jax.objective import View
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Learner, Peer, TrainState

Array = jax.Array
PyTree = Any
_MEMORY = 0.99  # of the running class means, over steps in which the class occurs


class Spoken(NamedTuple):
    """A forward pass of the teacher: its logits, and how to differentiate them later."""

    logits_BxK: Array
    batch_stats: PyTree
    pull_back: Callable[[Array], tuple[PyTree]]


def init(method: Distillation, seed: Array | int, inputs: Array, trained: PyTree) -> Peer:
    """The teacher before the first step: fresh, or with the variables of a trained one.

    Args:
        method: with a role that has a peer.
        seed: of the run.
        inputs: network input, only its shape and dtype matter.
        trained: variables to start from, or None.

    Returns:
        The peer, with uniform class means.
    """
    module = method.role.peer
    assert module is not None
    variables = trained
    if variables is None:
        variables = module.init(randomness.key(seed, 0, Purpose.TEACHER_INIT), inputs)
    params = jax.tree.map(jnp.asarray, variables["params"])
    batch_stats = jax.tree.map(jnp.asarray, variables.get("batch_stats", {}))
    uniform = jnp.full((method.num_classes, method.num_classes), 1 / method.num_classes)
    return Peer(Learner(params, batch_stats, method.optimizer.init(params)), uniform)


def speak(method: Distillation, state: TrainState, inputs: Array) -> Spoken:
    """The teacher's forward pass on this step's inputs, in training mode."""
    assert state.teacher is not None
    learner = state.teacher.learner
    key = randomness.key(state.seed, state.step, Purpose.TEACHER_DROPOUT)
    logits_BxK, pull_back, batch_stats = jax.vjp(
        lambda p: objective.training_mode(
            method.role.peer, p, learner.batch_stats, inputs, key, method.replicas
        ),
        learner.params,
        has_aux=True,
    )
    return Spoken(logits_BxK, batch_stats, pull_back)


def listen(
    method: Distillation, state: TrainState, spoken: Spoken, view: View, seen: Seen
) -> tuple[Peer, dict[str, Mean]]:
    """The teacher's step: it learns from labels, student and anchor.

    `L_T = w_T H(t) + w_aT D(t, a) + w_sT D(t, s)`, H the hard loss (cross-entropy by default),
    D(learner, target) the method's soft loss, the targets constant; batch means.

    Args:
        method: what is trained.
        state: before this step.
        spoken: the forward pass that the student learned from.
        view: of this batch.
        seen: what the student's step saw.

    Returns:
        The teacher after its step, and its metrics.

    References:
        Zhang et al. 2018 (arXiv 1706.00384), equation 6, for the student's part; the anchor's is
        our reconstruction of TriKD (arXiv 2305.15975).
    """
    assert state.teacher is not None
    now = objective.role_weights(method, state.step)
    targets = {"student_teacher": jax.lax.stop_gradient(seen.logits_BxK)}
    if view.anchor_logits_BxK is not None:
        targets["anchor_teacher"] = view.anchor_logits_BxK

    def loss(logits_BxK: Array) -> tuple[Array, dict[str, Array]]:
        total = now.hard_teacher * jnp.mean(method.teacher_hard_loss(logits_BxK, view.labels_B))
        parts = {}
        for name, target_BxK in targets.items():
            parts[name] = method.soft_loss(logits_BxK, target_BxK, view.labels_B)
            total += getattr(now, name) * jnp.mean(parts[name])
        return total, parts

    output_grads, parts = jax.grad(loss, has_aux=True)(spoken.logits_BxK)
    (grads,) = spoken.pull_back(output_grads)
    learner = state.teacher.learner
    updates, opt_state = method.optimizer.update(grads, learner.opt_state, learner.params)
    params = optax.apply_updates(learner.params, updates)
    means_KxK = _remember(state.teacher.class_means_KxK, spoken.logits_BxK, view.labels_B)
    found = {f"{name}_loss": metrics.mean(values_B) for name, values_B in parts.items()}
    return Peer(Learner(params, spoken.batch_stats, opt_state), means_KxK), found


def _remember(means_KxK: Array, logits_BxK: Array, labels_B: Array) -> Array:
    """Moves the mean prediction of every class that occurs towards this batch's."""
    num_classes = means_KxK.shape[0]
    probs_BxK = jax.nn.softmax(jax.lax.stop_gradient(logits_BxK).astype(jnp.float32))
    found_KxK = geometry.class_mean_predictions(probs_BxK, labels_B, num_classes)
    occurs_Kx1 = jax.nn.one_hot(labels_B, num_classes).sum(axis=0)[:, None] > 0
    return jnp.where(occurs_Kx1, _MEMORY * means_KxK + (1 - _MEMORY) * found_KxK, means_KxK)
