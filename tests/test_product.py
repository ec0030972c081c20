"""Every soft loss with every ratio under every role: two steps of each, so that none is forgotten.

That the numbers are right is the business of the tests of each axis; here nothing may raise, be
NaN, or stand still.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods
from tgeo_jax import distill, losses, models, ratios, roles
from tgeo_jax.state import Teacher

K = methods.NUM_CLASSES
NETWORKS = {classes: models.build("mlp", classes, hidden=()) for classes in (K, 2)}


def _several(network, combine: str) -> roles.Role:
    both = roles.Ensemble((network, network))
    return roles.several(both, workdirs=("a", "b"), combine=combine)


ROLES = {
    "alone": lambda network: roles.alone(None),
    "frozen": roles.frozen,
    "cached": roles.cached,
    "several mean": lambda network: _several(network, "mean"),
    "several each": lambda network: _several(network, "each"),
    "dml": roles.dml,
    "trikd": roles.trikd,
    "trikd frozen": lambda network: roles.trikd(network, start="frozen"),
}
LEARNED = {"tgeo", "bikd"}  # with meta-parameters that outlive a batch
PLAIN = {name: losses.soft_loss(name) for name in losses.SOFT_LOSSES}
LOSSES = PLAIN | {"kl+dist": losses.weighted_sum([PLAIN["kl"], PLAIN["dist"]], (1.0, 0.5))}


def _method(
    loss="kl", ratio="constant", role="frozen", classes=K, **changes
) -> distill.Distillation:
    clean_view = methods.method().clean_view
    fields = {
        "student": NETWORKS[classes],
        "num_classes": classes,
        "role": ROLES[role](NETWORKS[classes]),
        "soft_loss": LOSSES[loss],
        "ratio": ratios.RATIOS[ratio](),
        "optimizer": optax.sgd(methods.RATE),
        "training_view": lambda keys, images: clean_view(images),
    }
    return methods.method(**{**fields, **changes})


@functools.cache
def _variables(seed: int, classes: int = K):
    """Of one network; larger than at initialisation, so that predictions differ."""
    variables = NETWORKS[classes].init(jax.random.key(seed), jnp.zeros((1, 5, 5, 1)))
    return jax.tree.map(lambda leaf: 3 * leaf, variables)


@functools.cache
def _start(ratio: str, role: str, classes: int = K):
    """The same for every soft loss."""
    images = methods.examples(1).images_BxHxWxC
    method = _method("kl", ratio, role, classes)
    return distill.init_state(method, 0, images, anchor=_variables(3, classes))


@functools.cache
def _teacher(role: str, classes: int = K) -> Teacher:
    means = jnp.eye(classes) * 0.6 + 0.4 / classes
    if role.startswith("several"):
        both = {f"models_{n}": _variables(n, classes)["params"] for n in (1, 2)}
        both = {"models_0": both["models_1"], "models_1": both["models_2"]}
        each = role.endswith("each")
        return Teacher({"params": both}, jnp.stack([means, means.T]) if each else means)
    online = role in ("alone", "dml", "trikd")
    return Teacher(None, None) if online else Teacher(_variables(1, classes), means)


@functools.cache
def _batch(role: str, size: int, seed: int, classes: int = K):
    batch = methods.examples(size, seed)
    batch = batch._replace(labels_B=batch.labels_B % classes)
    if role != "cached":
        return batch
    logits = NETWORKS[classes].apply(
        _variables(1, classes), _method().clean_view(batch.images_BxHxWxC)
    )
    return batch._replace(ids_B=jnp.arange(size), teacher_logits_BxVxK=logits[:, None])


def _same(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def _two_steps(method: distill.Distillation, teacher: Teacher, start, batches):
    step = methods.quick_jit(lambda *args: distill.train_step(method, teacher)(*args))
    state, _ = step(start, *batches[0])
    return jax.device_get(step(state, *batches[1]))


def _check(role: str, ratio: str, start, state, found, *, least_soft: float = 1e-30) -> None:
    assert int(state.step) == 2
    for name, value in found.items():
        assert np.isfinite(value.total).all(), name
    numbers = [x for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.floating)]
    assert all(np.isfinite(leaf).all() for leaf in numbers)
    assert not _same(start.student.params, state.student.params)
    if role == "alone":
        assert set(found) == {"hard_loss", "accuracy"}
        return
    assert found["soft_loss"].total >= least_soft
    assert found["outer_loss"].count == (6 if ratio in {*LEARNED, "rw"} else 0)
    assert _same(start.fusion.params, state.fusion.params) != (ratio in LEARNED)
    if role in ("dml", "trikd"):
        assert not _same(start.teacher.learner.params, state.teacher.learner.params)
    if role.startswith("trikd"):
        assert _same(start.anchor, state.anchor)
        assert found["anchor_student_loss"].total > 0


@pytest.mark.parametrize("role", [name for name in ROLES if name != "alone"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_ratio_takes_two_steps(loss, role):
    batches = [(_batch(role, 8, seed), _batch(role, 6, seed + 2)) for seed in (0, 1)]
    for ratio in ratios.RATIOS:
        try:
            method, start = _method(loss, ratio, role), _start(ratio, role)
            _check(role, ratio, start, *_two_steps(method, _teacher(role), start, batches))
        except Exception as error:
            error.add_note(f"with soft loss {loss!r}, ratio {ratio!r} and role {role!r}")
            raise


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "dkd"])
def test_two_classes_take_two_steps_by_every_loss_with_every_ratio(loss):
    """Every role takes its turn: each meets five pairs of them, dkd has a test of its own below."""
    roles_in_turn = itertools.cycle(name for name in ROLES if name != "alone")
    turns = itertools.islice(roles_in_turn, 3 * list(LOSSES).index(loss), None)
    for ratio, role in zip(ratios.RATIOS, turns, strict=False):
        batches = [(_batch(role, 8, seed, 2), _batch(role, 6, seed + 2, 2)) for seed in (0, 1)]
        try:
            method, start = _method(loss, ratio, role, 2), _start(ratio, role, 2)
            after = _two_steps(method, _teacher(role, 2), start, batches)
            # Of two classes, what compares shapes may find no difference, up to rounding.
            _check(role, ratio, start, *after, least_soft=-1e-3)
        except Exception as error:
            error.add_note(f"with soft loss {loss!r}, ratio {ratio!r} and role {role!r}")
            raise


@pytest.mark.parametrize("ratio", ["constant", "tgeo", "rw"])
def test_alone_takes_two_steps_and_asks_neither_loss_nor_ratio(ratio):
    def not_asked(*args):
        raise AssertionError("nobody teaches")

    method = _method("kl", ratio, "alone", soft_loss=not_asked)
    start, batches = _start("constant", "alone"), [(_batch("alone", 8, n), None) for n in (0, 1)]
    _check("alone", ratio, start, *_two_steps(method, _teacher("alone"), start, batches))


def test_the_table_misses_neither_role_nor_loss():
    assert {name.split()[0] for name in ROLES} == set(roles.ROLES)
    assert set(LOSSES) > set(losses.SOFT_LOSSES)


@pytest.mark.parametrize("role", ["frozen", "several mean", "several each", "dml", "trikd"])
def test_dkd_of_two_classes_is_refused_whoever_teaches(role):
    two = models.build("mlp", 2, hidden=())
    method = dataclasses.replace(_method("dkd"), student=two, role=ROLES[role](two), num_classes=2)
    batch = methods.examples(8)
    batch = batch._replace(labels_B=batch.labels_B % 2)
    images = batch.images_BxHxWxC
    of_one = two.init(jax.random.key(0), method.clean_view(images))
    variables, means = of_one, jnp.full((2, 2), 0.5)
    if role.startswith("several"):
        variables = {"params": {f"models_{n}": of_one["params"] for n in (0, 1)}}
        means = jnp.stack([means, means]) if role.endswith("each") else means
    state = distill.init_state(method, 0, images, anchor=of_one)
    step = distill.train_step(method, Teacher(variables, means))
    # While tracing: nothing has been compiled yet.
    with pytest.raises(ValueError, match=r"'dkd' with K = 2 classes: it needs more than 2"):
        jax.eval_shape(step, state, batch, batch)


@pytest.mark.parametrize("role", ["dml", "trikd"])
@pytest.mark.parametrize("ratio", ["tgeo", "bikd", "rw"])
def test_prequential_order_is_refused_to_a_teacher_that_trains_along(ratio, role):
    with pytest.raises(ValueError, match=r"meta\.order='prequential'.*trains along.*student_first"):
        _method("kl", ratio, role, order="prequential")


@pytest.mark.parametrize("role", [name for name in ROLES if name not in ("alone", "dml", "trikd")])
def test_rw_is_refused_where_it_has_no_weights(role):
    with pytest.raises(ValueError, match=r"ratio\.name='rw'.*virtual step.*use another order"):
        _method("kl", "rw", role, order="prequential")
    with pytest.raises(ValueError, match=r"meta\.every=2: ratio\.name='rw'.*use meta\.every=1"):
        _method("kl", "rw", role, meta_every=2)
