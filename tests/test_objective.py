"""Inner and outer loss: which logits a step compares with, and what several teachers add up to."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from tests import methods
from tgeo_jax import distill, fusion, models, objective, parallel, randomness, ratios, roles
from tgeo_jax.dispatch import Resident
from tgeo_jax.state import Teacher

K, RATE = methods.NUM_CLASSES, methods.RATE
STUDENT = models.build("cnn", K, widths=(3,))
MLP, CNN = models.build("mlp", K, hidden=(3,)), models.build("cnn", K, widths=(2,))
FROZEN = methods.trained(CNN, 21)
MEANS = jax.nn.softmax(jax.random.normal(jax.random.key(8), (K, K)))
BATCHES = [methods.examples(8, seed) for seed in range(6)]
OUTER = methods.examples(6, seed=20)
CLEAN = methods.method().clean_view


def _method(role, **changes) -> distill.Distillation:
    fields = {"role": role, "student": STUDENT, "optimizer": optax.sgd(RATE)}
    return methods.method(**{"ratio": ratios.constant(alpha=0.6), **fields, **changes})


def _start(method, seed=0, **given):
    images = BATCHES[0].images_BxHxWxC
    return jax.jit(lambda: distill.init_state(method, seed, images, **given))()


@functools.cache
def _compiled(method):
    return methods.quick_jit(lambda t, s, b, v: distill.train_step(method, t)(s, b, v))


def _train(method, state, teacher, batches, outer=OUTER):
    found: Any = None
    for batch in batches:
        state, found = _compiled(method)(teacher, state, batch, outer)
    return state, {name: value.total / value.count for name, value in found.items()}


@functools.cache
def _looker(method):
    return methods.quick_jit(lambda s, n, b: objective.look(method, Teacher(None, None), s, n, b))


def _outer(method, state, teacher, batch, params):
    return methods.quick_jit(lambda p, s, b: objective.outer_loss(method, teacher, s, b)(p))(
        params, state, batch
    )


def _stored(batch, views: int):
    """A batch whose stored logits tell example and view: 1000 * id + 10 * view + class."""
    ids = 100 + np.arange(len(batch.labels_B))
    parts = 1000.0 * ids[:, None, None], 10.0 * np.arange(views)[None, :, None], np.arange(K)
    return batch._replace(
        ids_B=jnp.asarray(ids), teacher_logits_BxVxK=jnp.asarray(sum(parts[1:], parts[0]))
    )


THREE_VIEWS = _method(roles.cached(MLP, views=3, augmentation_seed=17), steps_per_epoch=2)


@pytest.mark.parametrize(
    ("step", "view"), [(0, 0), (1, 0), (2, 1), (4, 2), (5, 2), (6, 0), (8, 1), (29, 2)]
)
def test_every_epoch_looks_at_its_own_stored_view(step, view):
    """Epoch e = step // 2 + 1 sees view (e - 1) % 3, the logits and the images of it."""
    method, batch = THREE_VIEWS, _stored(BATCHES[0], views=3)
    images = []
    for seed in (0, 5):
        found = _looker(method)(_start(method, seed), jnp.int32(step), batch)
        expected = 1000.0 * np.arange(100, 108)[:, None] + 10.0 * view + np.arange(K)[None]
        np.testing.assert_array_equal(found.teacher_logits, expected)
        images.append(found.inputs)
    keys = jnp.stack(
        [
            randomness.example_keys(17, view, jnp.asarray([example]))[0]
            for example in range(100, 108)
        ]
    )
    expected = method.training_view(keys, batch.images_BxHxWxC)
    np.testing.assert_allclose(images[0], expected, rtol=1e-6)
    # Whatever the run's seed: the teacher saw this view once and for all.
    np.testing.assert_array_equal(images[0], images[1])


def test_the_clean_stored_view_goes_with_ordinary_augmentation():
    method = _method(roles.cached(MLP))
    batch = _stored(BATCHES[0], views=1)
    for seed, step in ((0, 0), (0, 25), (5, 0)):
        found = _looker(method)(_start(method, seed), jnp.int32(step), batch)
        np.testing.assert_array_equal(found.teacher_logits, batch.teacher_logits_BxVxK[:, 0])
        expected = methods.augmented(method, seed, step, batch)
        np.testing.assert_allclose(found.inputs, expected, rtol=1e-6)


def _with_logits(batch, dtype, variables=FROZEN):
    logits = CNN.apply(variables, CLEAN(batch.images_BxHxWxC))
    return batch._replace(
        ids_B=jnp.arange(len(batch.labels_B)),
        teacher_logits_BxVxK=np.asarray(logits)[:, None].astype(dtype),
    )


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-5), (np.float16, 2e-2)])
def test_stored_logits_train_as_the_teacher_itself_where_nothing_is_augmented(dtype, rtol):
    fields = {
        "ratio": ratios.tgeo(hidden=(4,)),
        "outer_soft": 0.3,
        "training_view": lambda keys, images: CLEAN(images),
    }
    asked, stored = _method(roles.frozen(CNN), **fields), _method(roles.cached(CNN), **fields)
    expected, of_asked = _train(asked, _start(asked), Teacher(FROZEN, MEANS), BATCHES[:3])
    batches = [_with_logits(batch, dtype) for batch in BATCHES[:3]]
    state, found = _train(
        stored, _start(stored), Teacher(None, MEANS), batches, _with_logits(OUTER, dtype)
    )
    methods.close(state.student, expected.student, rtol, rtol)
    methods.close(state.fusion, expected.fusion, rtol, rtol)
    methods.close(found, of_asked, rtol, rtol)


def test_stored_views_are_those_that_the_student_sees():
    """A student that is its own teacher has nothing to learn from it, in any epoch."""
    role = roles.cached(MLP, views=3, augmentation_seed=4)
    method = _method(role, student=MLP, steps_per_epoch=2, ratio=ratios.weighted(hard=0.0))
    teacher, ids = methods.trained(MLP, 22), jnp.arange(8)
    views = [
        MLP.apply(
            teacher,
            method.training_view(randomness.example_keys(4, view, ids), BATCHES[0].images_BxHxWxC),
        )
        for view in range(3)
    ]
    batch = BATCHES[0]._replace(ids_B=ids, teacher_logits_BxVxK=jnp.stack(views, axis=1))
    state = _start(method)
    student = state.student.replace(params=teacher["params"])
    state, found = _train(method, state.replace(student=student), Teacher(None, None), [batch] * 7)
    np.testing.assert_allclose(found["soft_loss"], 0, atol=1e-5)
    methods.close(state.student.params, teacher["params"], rtol=1e-4, atol=1e-5)
    assert np.abs(views[0] - views[1]).max() > 0.1


def test_a_prequential_step_looks_one_view_ahead():
    """One step an epoch: the outer batch is of the next epoch, and so is its view."""

    def soft_loss(student_BxK, teacher_BxK, labels_B):
        return teacher_BxK[:, 0] + 0 * student_BxK[:, 0] + 0.0 * labels_B

    method = _method(
        roles.cached(MLP, views=3),
        ratio=ratios.tgeo(hidden=(4,)),
        soft_loss=soft_loss,
        steps_per_epoch=1,
        order="prequential",
        outer_soft=1.0,
    )
    batch = BATCHES[0]._replace(
        ids_B=jnp.arange(8),
        teacher_logits_BxVxK=jnp.tile(jnp.arange(3.0)[None, :, None], (8, 1, K)),
    )
    seen = [
        _train(method, _start(method), Teacher(None, MEANS), [batch] * steps, batch)[1]
        for steps in (1, 2, 3)
    ]
    assert [float(found["soft_loss"]) for found in seen] == [0, 1, 2]
    assert [float(found["outer_loss"]) for found in seen] == [1, 2, 0]


class Dropping(nn.Module):
    """Half of its inputs, other ones in every training pass."""

    @nn.compact
    def __call__(self, images_BxHxWxC, train=False):
        x = images_BxHxWxC.reshape(len(images_BxHxWxC), -1)
        return nn.Dense(K)(nn.Dropout(0.5, deterministic=not train)(x))


def test_student_and_teacher_drop_units_of_their_own_and_others_at_every_step():
    fields = {"student": Dropping(), "optimizer": optax.sgd(0.0), "outer_soft": 1.0}
    method = _method(roles.dml(Dropping()), ratio=ratios.tgeo(hidden=(4,)), **fields)
    state = _start(method)
    # The same network twice: equal masks would make equal logits, and no loss between them.
    peer = state.teacher.replace(learner=state.student)
    seen = [
        _train(method, state.replace(teacher=peer), Teacher(None, None), [BATCHES[0]] * steps)[1]
        for steps in (1, 2)
    ]
    of_steps = [[float(found[name]) for found in seen] for name in ("soft_loss", "outer_loss")]
    assert all(value > 0.1 for values in of_steps for value in values)
    assert all(abs(first - second) > 1e-3 for first, second in of_steps)


PAIR = roles.Ensemble((MLP, CNN))
EACH = [methods.trained(MLP, 23), methods.trained(CNN, 24)]
BOTH = {
    "params": {f"models_{n}": part["params"] for n, part in enumerate(EACH)},
    "batch_stats": {"models_1": EACH[1]["batch_stats"]},
}


def _several(combine):
    return roles.several(PAIR, workdirs=("a", "b"), combine=combine)


def _answers(images):
    return [MLP.apply(EACH[0], images), CNN.apply(EACH[1], images)]


def test_the_mean_of_several_teachers_is_distilled_as_one():
    method = _method(_several("mean"))
    state = _start(method, seed=2)
    trained, found = _train(method, state, Teacher(BOTH, None), BATCHES[:3])

    def loss(params, batch_stats, images, labels, probs):
        logits, updated = methods.train_mode(STUDENT, params, batch_stats, images)
        soft = methods.soft_by_hand(logits, jnp.log(probs))
        hard = methods.hard_by_hand(logits, labels)
        return jnp.mean(0.4 * hard + 0.6 * soft), (updated["batch_stats"], soft)

    params, batch_stats = state.student.params, state.student.batch_stats
    for step, batch in enumerate(BATCHES[:3]):
        images = methods.augmented(method, 2, step, batch)
        probs = sum(scipy.special.softmax(logits, axis=1) for logits in _answers(images)) / 2
        grads, (batch_stats, soft) = jax.jit(jax.grad(loss, has_aux=True))(
            params, batch_stats, images, batch.labels_B, probs
        )
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
    methods.close((trained.student.params, trained.student.batch_stats), (params, batch_stats))
    np.testing.assert_allclose(found["soft_loss"], soft.mean(), rtol=1e-5)
    right = np.log(probs)[np.arange(8), np.asarray(BATCHES[2].labels_B)]
    np.testing.assert_allclose(found["teacher_loss"], -right.mean(), rtol=1e-5)


def _each_by_hand(method, state, meta_params, batch, params, logits, means):
    """The mean of the two fused losses, each with its own network's ratio of its own teacher."""
    images = methods.augmented(method, int(state.seed), int(state.step), batch)
    z, _ = methods.train_mode(STUDENT, params, state.student.batch_stats, images)
    total = 0.0
    for m, (answer, of_class) in enumerate(zip(_answers(images), means, strict=True)):
        own = jax.tree.map(lambda leaf, m=m: leaf[m], meta_params)
        situation = fusion.Situation(logits, answer, batch.labels_B, None, None, of_class, 1, 10)
        alpha = method.ratio.weights(own, situation)[1]
        hard = methods.hard_by_hand(z, batch.labels_B)
        total += jnp.mean((1 - alpha) * hard + alpha * methods.soft_by_hand(z, answer)) / 2
    return total


@pytest.mark.parametrize("estimator", ["mixed", "reverse"])
def test_each_of_several_teachers_has_its_own_ratio_and_hypergradient(x64, estimator):
    method = _method(_several("each"), ratio=ratios.tgeo(hidden=(4,)), estimator=estimator)
    double = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
    state, teacher = _start(method), Teacher(double(BOTH), double(jnp.stack([MEANS, MEANS.T])))
    state = state.replace(student=double(state.student), fusion=double(state.fusion))
    kernel = state.fusion.params["params"]["Dense_0"]["kernel"]
    assert kernel.shape == (2, 9 * K, 4)
    assert not np.allclose(kernel[0], kernel[1])
    after, _ = _train(method, state, teacher, BATCHES[:1])
    batch, student = BATCHES[0], state.student
    images = methods.augmented(method, 0, 0, batch)
    seen = methods.train_mode(STUDENT, student.params, student.batch_stats, images)[0]

    def stepped(meta_params):
        grads = jax.grad(
            lambda p: _each_by_hand(method, state, meta_params, batch, p, seen, teacher[1])
        )(student.params)
        return jax.tree.map(lambda p, g: p - RATE * g, student.params, grads)

    def outer(meta_params):
        clean = CLEAN(OUTER.images_BxHxWxC)
        logits = methods.train_mode(STUDENT, stepped(meta_params), student.batch_stats, clean)[0]
        return jnp.mean(methods.hard_by_hand(logits, OUTER.labels_B))

    methods.close(after.student.params, jax.jit(stepped)(state.fusion.params), 1e-6, 1e-8)
    grads = jax.jit(jax.grad(outer))(state.fusion.params)
    moved = jax.tree.map(lambda new, old: old - new, after.fusion.params, state.fusion.params)
    largest = [np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(grads)]
    assert np.min(np.max(largest, axis=0)) > 1e-6  # of both networks
    methods.close(moved, grads, rtol=1e-5, atol=1e-7 * np.max(largest))


def test_several_teachers_soft_loss_is_their_mean_and_their_weights_add_up():
    method = _method(_several("each"), ratio=ratios.weighted(hard=0.5, soft=2.0))
    state = _start(method)
    _, found = _train(method, state, Teacher(BOTH, jnp.stack([MEANS] * 2)), BATCHES[:1])
    images = methods.augmented(method, 0, 0, BATCHES[0])
    student = state.student
    z = methods.train_mode(STUDENT, student.params, student.batch_stats, images)[0]
    soft = np.mean([methods.soft_by_hand(z, answer).mean() for answer in _answers(images)])
    np.testing.assert_allclose(found["soft_loss"], soft, rtol=1e-5)
    np.testing.assert_allclose(found["ratio"], 2 / 2.5, rtol=1e-6)


def _outer_case(name):
    """(method, state, teacher, outer batch, the targets by hand), on clean images."""
    clean, trained = CLEAN(OUTER.images_BxHxWxC), None
    peer = methods.trained(CNN, 25)
    if name == "frozen":
        role, teacher, batch = roles.frozen(CNN), Teacher(FROZEN, None), OUTER
        targets = [CNN.apply(FROZEN, clean)]
    elif name == "cached":
        # Of a held-out example only the clean image's logits are stored, whatever the views.
        role, teacher = roles.cached(CNN, views=3), Teacher(None, None)
        batch = _with_logits(OUTER, np.float32)
        targets = [CNN.apply(FROZEN, clean)]
    elif name == "each":
        role, teacher, batch = _several("each"), Teacher(BOTH, None), OUTER
        targets = _answers(clean)
    else:  # by batch statistics, as the student
        role, teacher, batch, trained = roles.trikd(CNN), Teacher(None, None), OUTER, peer
        targets = [methods.train_mode(CNN, peer["params"], peer["batch_stats"], clean)[0]]
    method = _method(role)
    anchor = methods.trained(STUDENT, 26)
    state = _start(method, trained_teacher=trained, anchor=anchor)
    return method, state, teacher, batch, targets


@pytest.mark.parametrize(
    ("name", "share"),
    [("frozen", 0.0), ("frozen", 1.0), ("cached", 0.3), ("each", 0.3), ("trikd", 0.3)],
)
def test_the_outer_loss_is_hard_and_soft_by_its_share_on_clean_images(name, share):
    method, state, teacher, batch, targets = _outer_case(name)
    method = dataclasses.replace(method, outer_soft=share)
    params = methods.trained(STUDENT, 27)["params"]  # not the state's: those of after the step
    found = _outer(method, state, teacher, batch, params)
    logits = methods.train_mode(
        STUDENT, params, state.student.batch_stats, CLEAN(OUTER.images_BxHxWxC)
    )[0]
    hard = methods.hard_by_hand(logits, OUTER.labels_B).mean()
    soft = np.mean([methods.soft_by_hand(logits, target).mean() for target in targets])
    np.testing.assert_allclose(found, (1 - share) * hard + share * soft, rtol=1e-5)


@pytest.mark.parametrize(
    ("drops", "step", "expected"),
    [
        ((), 0, (1, 4, 8)),
        ((), 99, (1, 4, 8)),
        ((5, 8), 4, (1, 4, 8)),
        ((5, 8), 5, (2, 5, 8)),
        ((5, 8), 8, (3, 5, 8)),
        ((5, 8, 9), 99, (3, 5, 8)),
    ],
)
def test_role_weights_count_the_drops_and_hold_the_last_value(drops, step, expected):
    weights = roles.Weights(hard_student=(1, 2, 3), anchor_student=(4, 5), student_teacher=(8,))
    method: Any = SimpleNamespace(role=SimpleNamespace(weights=weights), drop_steps=drops)
    found = jax.jit(lambda n: objective.role_weights(method, n))(step)
    assert (found.hard_student, found.anchor_student, found.student_teacher) == expected
    assert all(value.dtype == jnp.float32 and value.shape == () for value in found)


def test_over_teachers_adds_up_where_there_are_several():
    values = np.float32(np.random.RandomState(0).rand(3, 5))
    np.testing.assert_allclose(objective.over_teachers(jnp.asarray(values)), values.sum(0), 1e-6)
    np.testing.assert_array_equal(objective.over_teachers(jnp.asarray(values[0])), values[0])


def test_stored_logits_go_through_a_dispatch_with_their_examples():
    """Rows of logits are gathered with the images: what is stored tells label and view."""
    train = methods.examples(40)
    logits = np.zeros((40, 2, K), np.float32)
    logits[:, :, 0], logits[:, 1, 1] = np.asarray(train.labels_B)[:, None], 1
    train = train._replace(ids_B=jnp.arange(40), teacher_logits_BxVxK=jnp.asarray(logits))

    def soft_loss(student_BxK, teacher_BxK, labels_B):
        return 1000 * jnp.abs(teacher_BxK[:, 0] - labels_B) + teacher_BxK[:, 1]

    method = _method(roles.cached(MLP, views=2), soft_loss=soft_loss, steps_per_epoch=5)
    states = jax.vmap(
        lambda seed: distill.init_state(method, seed, BATCHES[0].images_BxHxWxC),
        out_axes=parallel.SEED_AXES,
    )(np.arange(2))
    data = Resident(train, OUTER)
    _, outcome = methods.dispatch(method, states, Teacher(None, None), data, 10)
    # No label is missed, and the second of two epochs is that of the second view.
    np.testing.assert_allclose(outcome.sums["soft_loss"].total, [40, 40])
