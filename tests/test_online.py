"""Teachers that train along: against explicit re-derivations and the methods they contain."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from tests import methods
from tgeo_jax import distill, fusion, models, parallel, ratios, roles
from tgeo_jax.data import resident
from tgeo_jax.dispatch import Resident
from tgeo_jax.randomness import Purpose
from tgeo_jax.state import Learner, Teacher

K = methods.NUM_CLASSES
STUDENT = models.build("cnn", K, widths=(3,))
PEER = models.build("cnn", K, widths=(2,))  # another architecture, and BatchNorm in both
ANCHOR, TRAINED = methods.trained(STUDENT, 11), methods.trained(PEER, 12)
BATCHES = [methods.examples(8, seed) for seed in range(6)]
OUTER = methods.examples(6, seed=20)
NO_TEACHER = Teacher(None, None)
# Momentum and weight decay: each network must have its own optimiser state.
OPTIMIZER = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))


def _method(role: roles.Role, **changes) -> distill.Distillation:
    fields = {"role": role, "ratio": ratios.weighted(), "optimizer": OPTIMIZER, "student": STUDENT}
    return methods.method(**{**fields, **changes})


def _start(method, seed=0, trained=None, anchor=ANCHOR):
    images = BATCHES[0].images_BxHxWxC
    return jax.jit(
        lambda: distill.init_state(method, seed, images, trained_teacher=trained, anchor=anchor)
    )()


@functools.cache
def _compiled(method):
    return methods.quick_jit(lambda t, s, b, v: distill.train_step(method, t)(s, b, v))


def _train(method, state, teacher=NO_TEACHER, batches=BATCHES[:3]):
    """The states after each step, and the metrics of each step."""
    states, found = [], []
    for batch in batches:
        state, metrics = _compiled(method)(teacher, state, batch, OUTER)
        states.append(state)
        found.append({name: value.total / value.count for name, value in metrics.items()})
    return states, found


def _cross_entropy(logits, labels):
    return jnp.mean(methods.hard_by_hand(logits, labels))


def _kl(learner, target):
    return jnp.mean(methods.soft_by_hand(learner, target))


@functools.partial(jax.jit, static_argnames=("hard", "soft"))
def _expected_step(student, teacher, images, labels, weights, hard=1.0, soft=1.0):
    """Re-derives both networks' next states and the losses; `hard`, `soft` are the ratio's."""
    s, new_s = methods.train_mode(STUDENT, student.params, student.batch_stats, images)
    t, new_t = methods.train_mode(PEER, teacher.params, teacher.batch_stats, images)
    a = STUDENT.apply(ANCHOR, images, train=False)

    def student_loss(params):
        z = methods.train_mode(STUDENT, params, student.batch_stats, images)[0]
        return (
            weights["hard_student"] * hard * _cross_entropy(z, labels)
            + weights["teacher_student"] * soft * _kl(z, t)
            + weights["anchor_student"] * _kl(z, a)
        )

    def teacher_loss(params):
        z = methods.train_mode(PEER, params, teacher.batch_stats, images)[0]
        return (
            weights["hard_teacher"] * _cross_entropy(z, labels)
            + weights["student_teacher"] * _kl(z, s)
            + weights["anchor_teacher"] * _kl(z, a)
        )

    def stepped(network, loss, updated):
        grads = jax.grad(loss)(network.params)
        updates, opt_state = OPTIMIZER.update(grads, network.opt_state, network.params)
        params = optax.apply_updates(network.params, updates)
        return Learner(params, updated["batch_stats"], opt_state)

    seen = {
        "soft_loss": _kl(s, t),
        "student_teacher_loss": _kl(t, s),
        "anchor_student_loss": _kl(s, a),
        "anchor_teacher_loss": _kl(t, a),
        "teacher_loss": _cross_entropy(t, labels),
        "hard_loss": _cross_entropy(s, labels),
    }
    return stepped(student, student_loss, new_s), stepped(teacher, teacher_loss, new_t), seen


def _check_steps(method, weights_by_step, anchored=True, **ratio):
    """Trains and re-derives; weights are those of each step by name."""
    state = _start(method, seed=3, trained=TRAINED)
    states, found = _train(method, state, batches=BATCHES[: len(weights_by_step)])
    student, teacher = state.student, state.teacher.learner
    for step, weights in enumerate(weights_by_step):
        images = methods.augmented(method, 3, step, BATCHES[step])
        student, teacher, seen = _expected_step(
            student, teacher, images, BATCHES[step].labels_B, weights, **ratio
        )
        after = states[step]
        methods.close((after.student, after.teacher.learner), (student, teacher))
        named = {name: value for name, value in seen.items() if anchored or "anchor" not in name}
        methods.close({name: found[step][name] for name in named}, named)
        if anchored:
            assert methods.same(after.anchor, ANCHOR)


TERMS = roles.Weights._fields
ONES = dict.fromkeys(TERMS, 1.0)
DISTINCT = dict(zip(TERMS, (0.7, 1.3, 0.4, 1.6, 0.9, 2.1), strict=True))


def test_mutual_learning_is_the_step_of_its_equations():
    weights = ONES | {"anchor_student": 0.0, "anchor_teacher": 0.0}
    _check_steps(_method(roles.dml(PEER)), [weights] * 4, anchored=False)


def test_trikd_is_the_step_of_its_equations():
    _check_steps(_method(roles.trikd(PEER)), [ONES] * 3)


@pytest.mark.parametrize(("hard", "soft"), [(1.0, 1.0), (0.75, 0.25)])
def test_every_weight_multiplies_its_own_term_and_the_ratio_two_of_the_students(hard, soft):
    role = roles.trikd(PEER, **{name: (value,) for name, value in DISTINCT.items()})
    ratio = ratios.weighted() if hard == soft else ratios.constant(alpha=0.25)
    _check_steps(_method(role, ratio=ratio), [DISTINCT] * 3, hard=hard, soft=soft)


@pytest.mark.parametrize("term", TERMS)
def test_one_weight_alone_trains_by_one_term(term):
    only = {name: float(name == term) for name in TERMS}
    role = roles.trikd(PEER, **{name: (value,) for name, value in only.items()})
    _check_steps(_method(role), [only] * 2, anchored="anchor" in term)


def test_weights_move_on_at_the_drops_and_the_last_one_holds():
    role = roles.trikd(
        PEER,
        hard_student=(1.0, 0.5),
        teacher_student=(1.0, 2.0, 3.0),
        anchor_student=(0.0, 1.5),
        student_teacher=(0.3,),
        anchor_teacher=(1.0, 2.5, 0.0, 0.6),
    )
    method = _method(role, drop_steps=(1, 3, 4))
    by_step = {  # 0 | 1 2 | 3 | 4 5
        "hard_student": (1.0, 0.5, 0.5, 0.5, 0.5, 0.5),
        "teacher_student": (1.0, 2.0, 2.0, 3.0, 3.0, 3.0),
        "anchor_student": (0.0, 1.5, 1.5, 1.5, 1.5, 1.5),
        "hard_teacher": (1.0,) * 6,
        "student_teacher": (0.3,) * 6,
        "anchor_teacher": (1.0, 2.5, 2.5, 0.0, 0.6, 0.6),
    }
    _check_steps(method, [{n: v[step] for n, v in by_step.items()} for step in range(6)])


def test_trikd_without_anchor_weights_is_mutual_learning():
    trikd = _method(roles.trikd(PEER, anchor_student=(0,), anchor_teacher=(0,)))
    mutual = _method(roles.dml(PEER))
    (states, found), (expected, of_mutual) = (
        _train(method, _start(method, seed=5)) for method in (trikd, mutual)
    )
    assert methods.same(states[-1], expected[-1])
    assert set(found[0]) == set(of_mutual[0])


def test_trikd_with_a_frozen_teacher_and_no_anchor_weights_is_ordinary_distillation():
    ratio = ratios.constant(alpha=0.7)
    weights = {"anchor_student": (0,), "anchor_teacher": (0,)}
    # The teacher's own weights have nobody to weigh.
    weights |= {"student_teacher": (5,), "hard_teacher": (5,)}
    trikd = _method(roles.trikd(PEER, start="frozen", **weights), ratio=ratio)
    frozen = _method(roles.frozen(PEER), ratio=ratio)
    teacher = Teacher(TRAINED, None)
    (states, _), (expected, _) = (
        _train(method, _start(method, seed=5), teacher) for method in (trikd, frozen)
    )
    methods.close(states[-1].student, expected[-1].student)
    assert states[-1].teacher is None


def test_trikd_with_a_frozen_teacher_adds_the_anchors_term_to_distillation():
    role = roles.trikd(PEER, start="frozen", hard_student=(0.7,), anchor_student=(1.8,))
    method = _method(role, ratio=ratios.constant(alpha=0.4), optimizer=optax.sgd(0.1))
    state = _start(method)
    (after,), _ = _train(method, state, Teacher(TRAINED, None), BATCHES[:1])
    images, labels = methods.augmented(method, 0, 0, BATCHES[0]), BATCHES[0].labels_B

    def loss(params):
        z = methods.train_mode(STUDENT, params, state.student.batch_stats, images)[0]
        return (
            0.7 * 0.6 * _cross_entropy(z, labels)
            + 0.4 * _kl(z, PEER.apply(TRAINED, images))
            + 1.8 * _kl(z, STUDENT.apply(ANCHOR, images))
        )

    grads = jax.jit(jax.grad(loss))(state.student.params)
    methods.close(
        after.student.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.student.params, grads)
    )


def test_a_teacher_that_is_not_fresh_begins_at_the_given_variables():
    method = _method(roles.trikd(PEER, start="trained"))
    learner = _start(method, trained=TRAINED).teacher.learner
    assert methods.same({"params": learner.params, "batch_stats": learner.batch_stats}, TRAINED)


def test_a_fresh_teacher_is_another_one_for_every_seed_and_not_the_student():
    # Of the student's architecture: the same key would make the same network.
    method = _method(roles.dml(STUDENT))
    first, second = (_start(method, seed) for seed in (0, 1))
    kernels = [
        np.asarray(network.params["Dense_0"]["kernel"])
        for state in (first, second)
        for network in (state.student, state.teacher.learner)
    ]
    for n, kernel in enumerate(kernels):
        assert all(not np.allclose(kernel, other) for other in kernels[:n])


def test_the_anchor_says_the_same_whatever_the_batch_that_a_sample_is_in():
    """Evaluation mode: by batch statistics the others of a batch would change the anchor's word."""
    method = _method(roles.trikd(PEER), training_view=lambda keys, images: images / 255.0)
    state = _start(method)
    small, large = BATCHES[0], jax.tree.map(lambda *x: jnp.concatenate(x), *BATCHES[:2])
    views = [
        jax.jit(lambda s, b: distill.objective.look(method, NO_TEACHER, s, s.step, b))(state, batch)
        for batch in (small, large)
    ]
    of_small, of_large = (view.anchor_logits_BxK for view in views)
    np.testing.assert_allclose(of_small, of_large[:8], rtol=1e-5)


def test_neither_anchor_nor_teacher_has_a_gradient_through_the_students_step():
    method = _method(roles.trikd(PEER), optimizer=optax.sgd(0.1))
    state = _start(method)

    def students_norm(anchor, params):
        learner = state.teacher.learner.replace(params=params)
        before = state.replace(anchor=anchor, teacher=state.teacher.replace(learner=learner))
        after, _ = distill.train_step(method, NO_TEACHER)(before, BATCHES[0], OUTER)
        return optax.tree.norm(after.student.params)

    grads = jax.jit(jax.grad(students_norm, (0, 1)))(ANCHOR, state.teacher.learner.params)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_class_means_begin_uniform_and_follow_the_teachers_predictions():
    method = _method(roles.dml(PEER))
    state = _start(method, trained=TRAINED)
    np.testing.assert_allclose(state.teacher.class_means_KxK, np.full((K, K), 1 / K), rtol=1e-6)
    expected = np.full((K, K), 1 / K)
    # Class 1 does not occur at all, class 3 only at first.
    for step, labels in enumerate([[0, 0, 2, 3, 3, 3, 0, 2], [0, 0, 0, 0, 2, 2, 2, 2]]):
        batch = BATCHES[step]._replace(labels_B=jnp.asarray(labels))
        learner = state.teacher.learner
        images = methods.augmented(method, 0, step, batch)
        logits = methods.train_mode(PEER, learner.params, learner.batch_stats, images)[0]
        probs = scipy.special.softmax(logits, axis=1)
        for c in set(labels):
            mean = probs[np.asarray(labels) == c].mean(axis=0)
            expected[c] = 0.99 * expected[c] + 0.01 * mean
        (state,), _ = _train(method, state, batches=[batch])
        np.testing.assert_allclose(state.teacher.class_means_KxK, expected, rtol=1e-5)
    assert np.abs(expected - 1 / K).max() > 1e-3
    np.testing.assert_allclose(expected[1], 1 / K)


@pytest.mark.parametrize("estimator", ["mixed", "reverse"])
def test_a_learned_ratio_over_a_teacher_that_trains_along_gets_its_hypergradient(x64, estimator):
    """Against the derivative of the whole, written out; the teacher is a constant in it."""
    role = roles.trikd(PEER, hard_student=(0.7,), teacher_student=(1.3,), anchor_student=(0.4,))
    ratio, rate = ratios.tgeo(hidden=(4,)), 0.1
    method = _method(role, ratio=ratio, optimizer=optax.sgd(rate), estimator=estimator)
    double = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
    state = _start(method, trained=TRAINED)
    state = state.replace(
        **{n: double(getattr(state, n)) for n in ("student", "teacher", "fusion")}
    )
    (after,), _ = _train(method, state, batches=BATCHES[:1])
    student, teacher = state.student, state.teacher.learner
    images, labels = methods.augmented(method, 0, 0, BATCHES[0]), BATCHES[0].labels_B
    t = methods.train_mode(PEER, teacher.params, teacher.batch_stats, images)[0]
    a = STUDENT.apply(ANCHOR, images)
    s = methods.train_mode(STUDENT, student.params, student.batch_stats, images)[0]
    uniform = jnp.full((K, K), 1 / K)
    situation = fusion.Situation(s, t, labels, None, None, uniform, 1, 10)

    def outer(meta_params):
        alpha = ratio.weights(meta_params, situation)[1]

        def inner(params):
            z = methods.train_mode(STUDENT, params, student.batch_stats, images)[0]
            hard, soft = methods.hard_by_hand(z, labels), methods.soft_by_hand(z, t)
            return jnp.mean(0.7 * (1 - alpha) * hard + 1.3 * alpha * soft) + 0.4 * _kl(z, a)

        moved = jax.tree.map(
            lambda p, g: p - rate * g, student.params, jax.grad(inner)(student.params)
        )
        clean = method.clean_view(OUTER.images_BxHxWxC)
        logits = methods.train_mode(STUDENT, moved, student.batch_stats, clean)[0]
        return _cross_entropy(logits, OUTER.labels_B)

    grads = jax.jit(jax.grad(outer))(state.fusion.params)
    assert optax.tree.norm(grads) > 1e-6
    moved = jax.tree.map(lambda new, old: old - new, after.fusion.params, state.fusion.params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    # The anchor's and the clean view's inputs are float32 whatever the parameters.
    methods.close(moved, grads, rtol=1e-5, atol=1e-7 * largest)


def _states(method, seeds):
    images = BATCHES[0].images_BxHxWxC
    anchors = jax.tree.map(lambda leaf: np.stack([leaf * (1 + seed) for seed in seeds]), ANCHOR)
    init = jax.vmap(
        lambda seed, anchor: distill.init_state(method, seed, images, anchor=anchor),
        out_axes=parallel.SEED_AXES,
    )
    return jax.jit(init)(np.asarray(seeds, np.uint32), anchors)


def _dispatch(method, state, num_steps, train):
    data = Resident(train, OUTER)
    return methods.dispatch(method, state, NO_TEACHER, data, num_steps, meta_batch_size=6)


def test_a_dispatch_of_two_seeds_equals_two_runs_step_by_step():
    method = _method(roles.trikd(PEER), ratio=ratios.tgeo(hidden=(4,)))
    train, purposes = methods.examples(40), (Purpose.TRAIN_ORDER, Purpose.VALIDATION_ORDER)
    together, _ = _dispatch(method, _states(method, [4, 5]), 4, train)
    for index, seed in enumerate([4, 5]):
        rows, outer_rows = (
            resident.batch_indices(seed, 0, 4, size, count, purpose)
            for size, count, purpose in zip((8, 6), (40, 6), purposes, strict=True)
        )
        state = _start(method, seed, anchor=jax.tree.map(lambda x, s=seed: x * (1 + s), ANCHOR))
        for n in range(4):
            batch = jax.tree.map(lambda x, rows=rows[n]: x[rows], train)
            outer = jax.tree.map(lambda x, rows=outer_rows[n]: x[rows], OUTER)
            state, _ = _compiled(method)(NO_TEACHER, state, batch, outer)
        for part in ("student", "teacher", "fusion", "anchor"):
            own = jax.tree.map(lambda x, i=index: x[i], getattr(together, part))
            methods.close(own, getattr(state, part), rtol=2e-4, atol=1e-5)


class Clipped(nn.Module):
    """A student that a pixel at infinity leaves cold."""

    @nn.compact
    def __call__(self, images_BxHxWxC, train=False):
        return nn.Dense(K)(jnp.clip(images_BxHxWxC, 0, 1).reshape(len(images_BxHxWxC), -1))


def test_what_is_not_finite_in_one_seeds_teacher_is_blamed_and_undone():
    raw = {"training_view": lambda keys, images: images, "clean_view": lambda images: images}
    method = _method(roles.dml(PEER), student=Clipped(), **raw)
    train = methods.examples(40)
    images = np.asarray(train.images_BxHxWxC, np.float32) / 255
    orders = [resident.batch_indices(s, 0, 5, 8, 40, Purpose.TRAIN_ORDER) for s in (0, 1)]
    # Met by seed 1 at step 3, by seed 0 one step later.
    (example, *_) = set(orders[1][3].tolist()) & set(orders[0][4].tolist())
    poisoned = images.copy()
    poisoned[example] = np.inf
    good, _ = _dispatch(method, _states(method, [0, 1]), 3, train._replace(images_BxHxWxC=images))
    state, outcome = _dispatch(
        method, _states(method, [0, 1]), 5, train._replace(images_BxHxWxC=poisoned)
    )
    assert methods.failed(outcome) == [[], ["soft_loss"]]
    assert int(state.step) == 3
    methods.close(state, good, rtol=0, atol=0)
    np.testing.assert_array_equal(outcome.sums["hard_loss"].count, [24, 24])
