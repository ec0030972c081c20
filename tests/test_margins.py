"""Margin losses: by hand, by finite differences, by PyTorch, and through the hypergradient."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import methods
from tgeo_jax import assemble, bilevel, distill, losses, margins, models
from tgeo_jax import config as configs
from tgeo_jax.errors import ConfigError
from tgeo_jax.models.cosine import CosineHead

SOFT_SCALE = 16.0
MARGINS = {"arcface": margins.arcface, "cosface": margins.cosface}


def cosines(seed=0, batch=6, classes=5, largest=0.95):
    random = np.random.RandomState(seed)
    return random.uniform(-largest, largest, (batch, classes)), random.randint(0, classes, batch)


def test_arcface_by_hand():
    # theta = 60 degrees, m = 30 degrees: the true cosine becomes 0.
    logits = jnp.array([[0.5 * SOFT_SCALE, 0.25 * SOFT_SCALE]])
    found = margins.arcface(logits, jnp.array([0]), SOFT_SCALE, scale=2.0, margin=math.pi / 6)
    np.testing.assert_allclose(found, [math.log(1 + math.exp(2 * 0.25))], rtol=1e-6)


def test_arcface_by_hand_beyond_a_straight_angle():
    # theta = 170 degrees and m = 30: together more than 180, so c - m sin m.
    cosine, margin = math.cos(math.radians(170)), math.pi / 6
    logits = jnp.array([[cosine * SOFT_SCALE, 0.0]])
    found = margins.arcface(logits, jnp.array([0]), SOFT_SCALE, scale=2.0, margin=margin)
    target = cosine - margin * 0.5
    np.testing.assert_allclose(found, [math.log(1 + math.exp(-2 * target))], rtol=1e-6)


def test_cosface_by_hand():
    logits = jnp.array([[0.5 * SOFT_SCALE, 0.25 * SOFT_SCALE], [0.0, 0.0]])
    found = margins.cosface(logits, jnp.array([0, 1]), SOFT_SCALE, scale=4.0, margin=0.25)
    np.testing.assert_allclose(found, [math.log(2), math.log(1 + math.e)], rtol=1e-6)


@pytest.mark.parametrize("name", MARGINS)
def test_without_a_margin_it_is_cross_entropy_of_scaled_cosines(x64, name):
    values, labels = cosines()
    found = MARGINS[name](SOFT_SCALE * values, labels, SOFT_SCALE, scale=64.0, margin=0.0)
    expected = losses.cross_entropy(64 * jnp.asarray(values), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", MARGINS)
def test_a_margin_only_makes_it_harder_and_falls_with_the_true_cosine(x64, name):
    angles = np.linspace(0.01, math.pi - 0.01, 200)
    values = np.stack([np.cos(angles), np.zeros(200)], axis=1)
    labels = np.zeros(200, int)
    with_margin = MARGINS[name](SOFT_SCALE * values, labels, SOFT_SCALE, scale=4.0)
    without = losses.cross_entropy(4 * jnp.asarray(values), jnp.asarray(labels))
    assert np.all(with_margin >= without)
    assert np.all(np.diff(with_margin) > 0)  # the angle grows


@pytest.mark.parametrize("name", MARGINS)
def test_gradients_are_those_of_central_differences(x64, name):
    values, labels = cosines(1)
    logits, step = SOFT_SCALE * values, 1e-6

    def loss(z):
        return jnp.sum(MARGINS[name](z, labels, SOFT_SCALE, scale=8.0))

    found = jax.grad(loss)(logits)
    for index in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        difference = (loss(up) - loss(down)) / (2 * step)
        assert found[index] == pytest.approx(float(difference), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0000002])
def test_values_and_derivatives_are_finite_at_the_ends(name, cosine, dtype):
    logits = jnp.asarray([[cosine * SOFT_SCALE, 0.0]], dtype)
    labels = jnp.array([0])

    def loss(z):
        return jnp.sum(MARGINS[name](z, labels, SOFT_SCALE))

    value, grads = jax.value_and_grad(loss)(logits)
    _, second = jax.jvp(jax.grad(loss), (logits,), (jnp.ones_like(logits),))
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.isfinite(np.float32(grads)).all()
    assert np.isfinite(np.float32(second)).all()


@pytest.mark.parametrize("cosine", [0.9999999, 0.99999, 0.0, -0.9, -0.99999])
def test_arcface_pulls_an_embedding_towards_its_class_by_a_bounded_force(cosine):
    # The derivative by the cosine grows as 1 / sin(theta); by the angle it must stay bounded.
    def loss(angle):
        logits = SOFT_SCALE * jnp.stack([jnp.cos(angle), jnp.zeros(())])[None]
        return margins.arcface(logits, jnp.array([0]), SOFT_SCALE)[0]

    force = float(jax.grad(loss)(jnp.float32(math.acos(cosine))))
    assert 0 <= force <= 64.1


def torch_margin(torch, name, values, labels, scale, margin):
    """The published formulas, by arc cosine."""
    true = values.gather(1, labels[:, None])[:, 0]
    if name == "cosface":
        target = true - margin
    else:
        theta = torch.acos(true)
        wrapped = true - margin * math.sin(margin)
        target = torch.where(theta + margin <= math.pi, torch.cos(theta + margin), wrapped)
    moved = values.scatter(1, labels[:, None], target[:, None])
    return torch.nn.functional.cross_entropy(scale * moved, labels, reduction="none")


@pytest.mark.parametrize(("name", "margin"), [("arcface", 0.5), ("arcface", 1.2), ("cosface", 0.4)])
def test_values_and_gradients_are_those_of_pytorch(x64, name, margin):
    torch = pytest.importorskip("torch")
    values, labels = cosines(2, batch=40, largest=0.999)
    there = torch.tensor(values, requires_grad=True)
    expected = torch_margin(torch, name, there, torch.tensor(labels), 30.0, margin)
    expected.sum().backward()

    def loss(c):
        found = MARGINS[name](SOFT_SCALE * c, labels, SOFT_SCALE, scale=30.0, margin=margin)
        return jnp.sum(found), found

    grads, found = jax.grad(loss, has_aux=True)(jnp.asarray(values))
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(grads, there.grad.numpy(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MARGINS)
def test_the_hypergradient_through_a_margin_is_that_of_central_differences(x64, name):
    random = np.random.RandomState(3)
    x, held_out = jnp.asarray(random.randn(2, 8, 4))
    labels, held_labels = jnp.asarray(random.randint(0, 3, (2, 8)))
    teacher = jnp.asarray(3 * random.randn(8, 3))
    head = CosineHead(3, SOFT_SCALE)
    params = {"map": jnp.asarray(random.randn(4, 5)), "head": head.init(jax.random.key(0), x)}
    params["head"] = {"params": {"weight": jnp.asarray(random.randn(3, 5))}}
    hard = margins.hard_loss(name, SOFT_SCALE, scale=8.0)
    weights = jnp.asarray(random.randn(8))
    sgd = optax.sgd(0.1, momentum=0.9)

    def logits(params, x):
        return head.apply(params["head"], jnp.tanh(x @ params["map"]))

    def inner(params, weights):
        z, share = logits(params, x), jax.nn.sigmoid(weights)
        soft = losses.kl(z, teacher, temperature=4.0)
        return jnp.mean((1 - share) * hard(z, labels) + share * soft)

    def outer(params):
        return jnp.mean(hard(logits(params, held_out), held_labels))

    @jax.jit
    def after(weights):
        grads = jax.grad(inner)(params, weights)
        updates, _ = sgd.update(grads, sgd.init(params), params)
        return outer(optax.apply_updates(params, updates))

    found = {
        estimator: bilevel.one_step(
            inner, outer, params, weights, sgd, sgd.init(params), estimator=estimator
        ).meta_grads
        for estimator in ("mixed", "reverse")
    }
    np.testing.assert_allclose(found["mixed"], found["reverse"], rtol=1e-10, atol=1e-14)
    for index in range(len(weights)):
        step = jnp.zeros_like(weights).at[index].set(1e-5)
        difference = (after(weights + step) - after(weights - step)) / 2e-5
        assert found["mixed"][index] == pytest.approx(float(difference), rel=1e-5, abs=1e-9)


def test_inner_and_outer_loss_of_a_step_have_the_margin_and_the_rest_has_none():
    student = models.build("iresnet", 4, widths=(3, 3), depths=(1,), embedding=5, dropout=0.0)
    chosen = methods.method(
        student=student, hard_loss=margins.hard_loss("arcface", student.soft_scale)
    )
    batch, val_batch = methods.examples(8), methods.examples(8, seed=1)
    state = methods.start(chosen)
    step = methods.quick_jit(distill.train_step(chosen, methods.teacher()))
    new, found = step(state, batch, val_batch)
    inputs = methods.augmented(chosen, 0, 0, batch)
    logits, _ = methods.train_mode(student, state.student.params, state.student.batch_stats, inputs)
    hard = margins.arcface(logits, batch.labels_B, student.soft_scale)
    assert float(found["hard_loss"].total) == pytest.approx(float(hard.sum()), rel=1e-4)
    assert float(hard.mean()) > 5 + float(methods.hard_by_hand(logits, batch.labels_B).mean())
    soft = methods.soft_by_hand(logits, student_sees(inputs))
    assert float(found["soft_loss"].total) == pytest.approx(float(soft.sum()), rel=1e-4)
    clean = chosen.clean_view(val_batch.images_BxHxWxC)
    outer_logits, _ = methods.train_mode(
        student, new.student.params, state.student.batch_stats, clean
    )
    outer = margins.arcface(outer_logits, val_batch.labels_B, student.soft_scale)
    assert float(found["outer_loss"].total / 8) == pytest.approx(float(outer.mean()), rel=1e-3)


def student_sees(inputs):
    """The frozen teacher's logits of `methods`."""
    teacher = models.build("mlp", methods.NUM_CLASSES, hidden=())
    return teacher.apply(methods.teacher().variables, inputs)


def test_assembled_losses_are_those_of_the_configuration(digits_dir):
    config = configs.default()
    config.data.dir, config.role.name, config.loss.hard = digits_dir, "dml", "cosface"
    config.student.name = config.teacher.name = "iresnet"
    for which, scale in (("student", 8.0), ("teacher", 4.0)):
        config[which].iresnet.update(widths=(2, 2), depths=(1,), embedding=3, soft_scale=scale)
    method = assemble.assemble(config).method
    z, labels = jnp.array([[4.0, 2.0, 0.0]]), jnp.array([0])
    for found, scale in ((method.hard_loss, 8.0), (method.teacher_hard_loss, 4.0)):
        expected = losses.cross_entropy(64 * (z / scale - jnp.array([[0.4, 0, 0]])), labels)
        np.testing.assert_allclose(found(z, labels), expected, rtol=1e-5, atol=1e-6)


REFUSED = [
    ({"student.name": "cnn"}, r"loss\.hard='arcface': needs networks .* student\.name='cnn'"),
    (
        {"role.name": "dml", "teacher.name": "mlp"},
        r"loss\.hard='arcface': .*teacher\.name='mlp' has none; use one of iresnet, iresnet18",
    ),
    ({"loss.arcface.margin": 2.0}, r"loss\.arcface\.margin=2\.0: must lie in \[0, 1\.57\]"),
    ({"loss.arcface.scale": 0.0}, r"loss\.arcface\.scale=0\.0: must lie in \[1e-6"),
    ({"loss.hard": "cosface", "loss.cosface.margin": -0.1}, r"loss\.cosface\.margin=-0\.1"),
    ({"student.iresnet.soft_scale": 0.0}, r"student\.iresnet\.soft_scale=0\.0: must lie in"),
    ({"student.iresnet.embedding": 0}, r"student\.iresnet\.embedding=0: must be a positive"),
    ({"student.iresnet.dropout": 1.0}, r"student\.iresnet\.dropout=1\.0: must lie in \[0, 1\)"),
    ({"loss.hard": "arcfaces"}, r"loss\.hard='arcfaces': unknown; did you mean 'arcface'\?"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_is_refused_before_data_are_touched(changes, message):
    config = configs.default()
    config.role.name, config.student.name, config.loss.hard = "alone", "iresnet", "arcface"
    configs.check(config)
    for field, value in changes.items():
        *sections, name = field.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    with pytest.raises(ConfigError, match=message):
        configs.check(config)


def test_a_frozen_teacher_needs_no_cosine_head():
    config = configs.default()
    config.student.name, config.loss.hard = "iresnet", "arcface"
    config.teacher.update(name="mlp", workdir="runs/teacher")
    configs.check(config)


def test_cross_entropy_takes_a_cosine_head_as_it_is():
    logits, labels = jnp.array([[4.0, -4.0]]), jnp.array([1])
    found = margins.hard_loss("cross_entropy", 4.0)(logits, labels)
    np.testing.assert_array_equal(found, losses.cross_entropy(logits, labels))
