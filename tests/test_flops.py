"""What a bilevel step costs, counted by the compiler: the design's 8F, 7F and 10F."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from tests import methods
from tgeo_jax import distill, ratios, roles
from tgeo_jax.state import Batch, Teacher

BATCH = 32


class Student(nn.Module):
    """Five BatchNorm convolutions: the first, which passes no gradient on, weighs little."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images
        for width, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2)):
            x = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(methods.NUM_CLASSES)(x.mean((1, 2)))


def _method(**changes):
    # The teacher's logits are given: its own forward pass is not what is measured.
    given = roles.Role(lambda variables, images: variables)
    return methods.method(
        student=Student(),
        role=given,
        ratio=changes.pop("ratio", ratios.tgeo()),
        training_view=lambda key, images: images,
        clean_view=lambda images: images,
        fusion_optimizer=optax.adam(1e-3),
        **changes,
    )


def _arguments(method):
    images = jax.ShapeDtypeStruct((BATCH, 16, 16, 3), jnp.float32)
    batch = Batch(images, jax.ShapeDtypeStruct((BATCH,), jnp.int32))
    state = jax.eval_shape(lambda x: distill.init_state(method, 0, x), images)
    logits = jax.ShapeDtypeStruct((BATCH, methods.NUM_CLASSES), jnp.float32)
    means = jax.ShapeDtypeStruct((methods.NUM_CLASSES,) * 2, jnp.float32)
    return Teacher(logits, means), state, batch


def _flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def _step_flops(**changes) -> float:
    method = _method(**changes)
    teacher, state, batch = _arguments(method)
    return _flops(
        lambda t, s, b, v: distill.train_step(method, t)(s, b, v), teacher, state, batch, batch
    )


@pytest.fixture(scope="module")
def plain() -> float:
    return _step_flops(ratio=ratios.constant(alpha=0.9))


@pytest.mark.parametrize("estimator", ["mixed", "reverse"])
def test_one_step_costs_8_forward_passes(plain, estimator):
    assert _step_flops(estimator=estimator) / plain == pytest.approx(8 / 3, rel=0.02)


def test_fusion_first_costs_10_forward_passes(plain):
    assert _step_flops(order="fusion_first") / plain == pytest.approx(10 / 3, rel=0.02)


def test_prequential_costs_7_forward_passes(plain):
    method = _method(order="prequential")
    teacher, state, batch = _arguments(method)

    # The forward pass comes from the step before: it enters as an argument.
    start = jax.jit(lambda t, s, b: distill.prequential_start(method, t, s, b))
    current = jax.eval_shape(start, teacher, state, batch)
    flops = _flops(
        lambda t, s, f, b: distill.prequential_step(method, t, s, f, b),
        teacher, state, current, batch,
    )  # fmt: skip
    assert flops / plain == pytest.approx(7 / 3, rel=0.02)


def test_rw_costs_10_forward_passes(plain):
    assert _step_flops(ratio=ratios.rw()) / plain == pytest.approx(10 / 3, rel=0.02)


@pytest.mark.parametrize(
    ("role", "networks"),
    # 3F for each of two networks of one architecture, and F for the anchor.
    [(roles.dml(Student()), 2.0), (roles.trikd(Student()), 7 / 3)],
    ids=["dml", "trikd"],
)
def test_a_peer_costs_a_plain_step_and_an_anchor_a_forward_pass(plain, role, networks):
    method = dataclasses.replace(_method(ratio=ratios.weighted()), role=role)
    _, _, batch = _arguments(_method())
    images = batch.images_BxHxWxC
    anchor = jax.eval_shape(lambda x: method.student.init(jax.random.key(0), x), images)
    state = jax.eval_shape(lambda x, a: distill.init_state(method, 0, x, anchor=a), images, anchor)
    flops = _flops(
        lambda s, b: distill.train_step(method, Teacher(None, None))(s, b, b), state, batch
    )
    assert flops / plain == pytest.approx(networks, rel=0.01)
