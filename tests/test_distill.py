"""The training step against its formula and against itself by other routes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods
from tgeo_jax import bilevel, distill, losses, models, randomness, ratios, roles
from tgeo_jax.randomness import Purpose

BATCH, VAL_BATCH = methods.examples(8), methods.examples(6, seed=1)


@functools.cache
def _compiled(method):
    return jax.jit(lambda s, b, v: distill.train_step(method, methods.teacher())(s, b, v))


def _step(method, state, batch=BATCH, val_batch=VAL_BATCH):
    return _compiled(method)(state, batch, val_batch)


def _view(method, state):
    key = randomness.key(state.seed, state.step, Purpose.AUGMENT)
    return method.training_view(jax.random.split(key, 8), BATCH.images_BxHxWxC)


def _train_mode(method, state, params, images):
    variables = {"params": params, "batch_stats": state.student.batch_stats}
    return method.student.apply(variables, images, train=True, mutable=["batch_stats"])


def _close(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def _same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_constant_ratio_step_is_sgd_on_hintons_loss():
    method = methods.method(ratio=ratios.constant(alpha=0.75), optimizer=optax.sgd(methods.RATE))
    state = methods.start(method)
    images = _view(method, state)
    teacher_logits = method.role.teach(methods.teacher().variables, images)

    def hinton(params):
        logits, _ = _train_mode(method, state, params, images)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, BATCH.labels_B)
        soft = optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(logits / methods.TEMPERATURE),
            jax.nn.log_softmax(teacher_logits / methods.TEMPERATURE),
        )
        return jnp.mean(0.25 * hard + 0.75 * methods.TEMPERATURE**2 * soft)

    grads = jax.jit(jax.grad(hinton))(state.student.params)
    expected = jax.tree.map(lambda p, g: p - methods.RATE * g, state.student.params, grads)
    after, _ = _step(method, state)
    _close(after.student.params, expected)


def _check_is_sgd_with_fixed_weights(method, state, images, teacher_logits, alpha):
    """The step must follow the gradient of the fused loss with these very weights."""

    def loss(params):
        logits, _ = _train_mode(method, state, params, images)
        hard = losses.cross_entropy(logits, BATCH.labels_B)
        soft = losses.kl(logits, teacher_logits, temperature=methods.TEMPERATURE)
        return jnp.mean((1 - alpha) * hard + alpha * soft)

    grads = jax.jit(jax.grad(loss))(state.student.params)
    expected = jax.tree.map(lambda p, g: p - methods.RATE * g, state.student.params, grads)
    _close(_step(method, state)[0].student.params, expected)


def test_a_ratio_of_ones_own_is_a_constant_for_the_student_too():
    """Even one that forgets to stop gradients: its weights would pull on the loss otherwise."""

    def weights(meta_params, situation):
        alpha = jax.nn.sigmoid(situation.hard_B + situation.student_logits_BxK[:, 0])
        return 1 - alpha, alpha

    own = ratios.FusionRatio(lambda key, num_classes: {}, weights)
    method = methods.method(ratio=own, optimizer=optax.sgd(methods.RATE))
    state, teacher = methods.start(method), methods.teacher()
    images = _view(method, state)
    teacher_logits = method.role.teach(teacher.variables, images)
    logits, _ = _train_mode(method, state, state.student.params, images)
    hard = losses.cross_entropy(logits, BATCH.labels_B)
    alpha = jax.nn.sigmoid(hard + logits[:, 0])

    _check_is_sgd_with_fixed_weights(method, state, images, teacher_logits, alpha)


def test_learned_ratio_is_a_constant_for_the_student():
    method = methods.method(optimizer=optax.sgd(methods.RATE))
    state, teacher = methods.start(method), methods.teacher()
    images = _view(method, state)
    teacher_logits = method.role.teach(teacher.variables, images)
    logits, _ = _train_mode(method, state, state.student.params, images)
    situation = ratios.Situation(
        logits, teacher_logits, BATCH.labels_B, None, None, teacher.class_means_KxK, 1, 10
    )
    _, alpha = method.ratio.weights(state.fusion.params, situation)

    _check_is_sgd_with_fixed_weights(method, state, images, teacher_logits, alpha)


@pytest.mark.parametrize("order", distill.ORDERS)
def test_training_changes_the_fusion_network(order):
    method = methods.method(order=order)
    state = methods.start(method)
    after, _ = _step(method, state)
    assert not _same(after.fusion.params, state.fusion.params)


def test_a_constant_ratio_has_nothing_to_learn_and_no_outer_loss():
    method = methods.method(ratio=ratios.constant())
    state = methods.start(method)
    assert not method.meta_learned
    assert _step(method, state)[1]["outer_loss"].count == 0


def test_student_first_updates_the_student_with_the_old_ratio():
    learned, fixed = methods.method(), methods.method(fusion_optimizer=optax.sgd(0.0))
    state = methods.start(learned)
    _close(_step(learned, state)[0].student, _step(fixed, state)[0].student)


def test_fusion_first_updates_the_student_with_the_new_ratio():
    method = methods.method(order="fusion_first", fusion_optimizer=optax.sgd(50.0))
    state = methods.start(method)
    after, _ = _step(method, state)
    # The same fusion update by student_first, then a plain step with that ratio held fixed.
    fusion = _step(methods.method(fusion_optimizer=optax.sgd(50.0)), state)[0].fusion
    _close(after.fusion.params, fusion.params)
    frozen = methods.method(fusion_optimizer=optax.sgd(0.0))
    expected, _ = _step(frozen, state.replace(fusion=fusion))
    _close(after.student, expected.student)
    assert not _same(after.student.params, _step(frozen, state)[0].student.params)


def test_mixed_and_reverse_give_the_same_step():
    state = methods.start(methods.method())
    mixed, reverse = (
        _step(methods.method(estimator=estimator), state)[0] for estimator in ("mixed", "reverse")
    )
    _close(mixed, reverse, rtol=1e-4, atol=1e-6)


def _loss_ratio() -> ratios.FusionRatio:
    """A learned ratio that looks at both losses, as loss-based ones do."""

    def weights(meta_params, situation):
        alpha = jax.nn.sigmoid(
            meta_params["a"] * situation.hard_B - meta_params["b"] * situation.soft_B
        )
        return 1 - alpha, alpha

    return ratios.FusionRatio(
        lambda key, num_classes: {"a": jnp.asarray(0.7), "b": jnp.asarray(0.2)}, weights
    )


@pytest.mark.parametrize("ratio", [ratios.tgeo(hidden=(4,)), _loss_ratio()])
def test_finite_difference_holds_the_ratios_inputs_fixed(x64, ratio):
    """Otherwise it would differentiate the features too, which the method forbids."""
    to_double = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )
    updates = {}
    for estimator in ("mixed", "finite_difference"):
        # A linear student: kinks of ReLU within the perturbation would be errors of their own.
        student = models.build("mlp", methods.NUM_CLASSES, hidden=())
        method = methods.method(estimator=estimator, student=student, ratio=ratio)
        state = to_double(methods.start(method))
        after, _ = _step(method, state)
        change = jax.tree.map(lambda a, b: a - b, after.fusion.params, state.fusion.params)
        updates[estimator] = np.concatenate([np.ravel(x) for x in jax.tree.leaves(change)])
    mixed, approximate = updates["mixed"], updates["finite_difference"]
    np.testing.assert_allclose(approximate, mixed, rtol=0, atol=1e-3 * np.abs(mixed).max())


@pytest.mark.parametrize("order", distill.ORDERS)
def test_meta_every_updates_the_fusion_network_on_its_steps_only(order):
    # With momentum: a step that updates with a zero gradient would still move.
    fusion_optimizer = optax.sgd(1.0, momentum=0.9)
    method = methods.method(meta_every=3, order=order, fusion_optimizer=fusion_optimizer)
    state = methods.start(method)
    changed = []
    for _ in range(7):
        after, _ = _step(method, state)
        changed.append(not _same(after.fusion, state.fusion))
        state = after
    assert changed == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("order", distill.ORDERS)
def test_running_statistics_see_the_training_batch_once_and_nothing_else(order):
    method = methods.method(order=order)
    state = methods.start(method)
    images = _view(method, state)
    _, updated = _train_mode(method, state, state.student.params, images)
    after, _ = _step(method, state)
    _close(after.student.batch_stats, updated["batch_stats"])


def test_prequential_steps_in_a_row_equal_one_step_on_the_next_batch():
    """The reused forward pass changes nothing: each is one_step with the next batch outside."""
    method = methods.method(order="prequential")
    teacher, state = methods.teacher(), methods.start(method)
    batches = [methods.examples(8, seed) for seed in range(4)]
    step = jax.jit(lambda s, f, b: distill.prequential_step(method, teacher, s, f, b))
    forward = jax.jit(lambda s, b: distill.prequential_start(method, teacher, s, b))(
        state, batches[0]
    )
    leaves, structure = jax.tree.flatten(forward)
    pipelined = state
    for following in batches[1:]:
        # Under the first trace's structure, as the dispatcher carries it: one compilation.
        forward = jax.tree.unflatten(structure, leaves)
        pipelined, forward, _ = step(pipelined, forward, following)
        leaves = jax.tree.leaves(forward)
    naive = state
    for batch, following in itertools.pairwise(batches):
        naive, _ = _step(method, naive, batch, following)
    _close(pipelined, naive, rtol=1e-4, atol=1e-6)


def test_prequential_meta_gradient_is_that_of_the_next_training_loss():
    method = methods.method(order="prequential", optimizer=optax.sgd(methods.RATE))
    teacher, state = methods.teacher(), methods.start(method)
    next_batch = methods.examples(8, seed=3)
    after, found = _step(method, state, BATCH, next_batch)
    images = _view(method, state)
    teacher_logits = method.role.teach(teacher.variables, images)
    key = randomness.key(0, 1, Purpose.AUGMENT)
    next_images = method.training_view(jax.random.split(key, 8), next_batch.images_BxHxWxC)

    def next_loss(params):
        logits, _ = _train_mode(method, state, params, next_images)
        return jnp.mean(losses.cross_entropy(logits, next_batch.labels_B))

    def inner(params, meta_params):
        logits, _ = _train_mode(method, state, params, images)
        hard = losses.cross_entropy(logits, BATCH.labels_B)
        soft = losses.kl(logits, teacher_logits, temperature=methods.TEMPERATURE)
        situation = jax.lax.stop_gradient(
            ratios.Situation(
                logits, teacher_logits, BATCH.labels_B, hard, soft, teacher.class_means_KxK, 1, 10
            )
        )
        hard_weight, soft_weight = method.ratio.weights(meta_params, situation)
        return jnp.mean(hard_weight * hard + soft_weight * soft)

    sgd = optax.sgd(methods.RATE)
    result = jax.jit(
        lambda p, m: bilevel.one_step(inner, next_loss, p, m, sgd, sgd.init(p), estimator="reverse")
    )(state.student.params, state.fusion.params)
    expected = jax.tree.map(lambda p, g: p - g, state.fusion.params, result.meta_grads)
    _close(after.fusion.params, expected, rtol=1e-4, atol=1e-6)
    mean = found["outer_loss"].total / found["outer_loss"].count
    np.testing.assert_allclose(mean, result.outer_value, rtol=1e-5)


def test_alone_is_plain_cross_entropy():
    method = methods.method(role=roles.alone(None), optimizer=optax.sgd(methods.RATE))
    state = methods.start(method)
    images = _view(method, state)

    def plain(params):
        logits, _ = _train_mode(method, state, params, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, BATCH.labels_B).mean()

    grads = jax.jit(jax.grad(plain))(state.student.params)
    expected = jax.tree.map(lambda p, g: p - methods.RATE * g, state.student.params, grads)
    after, found = _step(method, state)
    _close(after.student.params, expected)
    assert set(found) == {"hard_loss", "accuracy"}


def test_same_seed_and_step_give_the_same_bits():
    method = methods.method()
    state = methods.start(method, seed=3)
    assert _same(_step(method, state)[0], _step(method, state)[0])
    assert not _same(
        _step(method, state)[0].student, _step(method, methods.start(method))[0].student
    )


GOLDEN = {
    "hard_loss": 1.6132550,
    "soft_loss": 1.7171888,
    "outer_loss": 1.4828910,
    "ratio": 0.48885393,
}
GOLDEN_AFTER = {"student_norm": 3.2492144, "fusion_change": 0.0041283662}


def test_golden_first_step():
    state = methods.start(methods.method())
    after, found = _step(methods.method(), state)
    measured = {name: float(found[name].total / found[name].count) for name in GOLDEN}
    measured["student_norm"] = float(optax.tree.norm(after.student.params))
    measured["fusion_change"] = float(
        optax.tree.norm(jax.tree.map(jnp.subtract, after.fusion.params, state.fusion.params))
    )
    expected = GOLDEN | GOLDEN_AFTER
    for name, value in measured.items():
        assert value == pytest.approx(expected[name], rel=2e-4), (
            f"{name} of the very first step is {value:.8g}, it was {expected[name]}. "
            "Something changed what every training run computes: initialisation, keys, data "
            "views, losses, the ratio, or the hypergradient. If that was intended, say so in "
            f"CHANGELOG.md under 'Results change' and put the new numbers here: {measured}"
        )


def test_unknown_order_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="order='teacher_first': use one of student_first"):
        methods.method(order="teacher_first")


def test_prequential_refuses_other_estimators():
    with pytest.raises(ValueError, match=r"meta\.estimator='reverse'"):
        methods.method(order="prequential", estimator="reverse")
