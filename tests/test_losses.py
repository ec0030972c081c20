"""Every soft loss runs through one table: a new one in `SOFT_LOSSES` gets its rows for free."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tgeo_jax import losses

BATCH, CLASSES = 4, 5
LABELS = np.int32([0, 3, 4, 3])
WITH_TEMPERATURE = [
    name
    for name, function in losses.SOFT_LOSSES.items()
    if "temperature" in inspect.signature(function).parameters
]
# Confident and opposed, confident and agreed, one-sided, and ties at both ends.
SATURATED_STUDENT = 1e4 * np.float32(
    [[1, -1, 0, 0, 0], [1, -1, -1, -1, -1], [0, 0, 0, 0, 0], [1, 1, -1, -1, 1]]
)
SATURATED_TEACHER = 1e4 * np.float32(
    [[-1, 1, 0, 0, 0], [1, -1, -1, -1, -1], [1, -1, -1, -1, -1], [-1, -1, 1, 1, -1]]
)


def logits(seed, dtype=np.float32, shape=(BATCH, CLASSES)):
    return (2 * np.random.RandomState(seed).randn(*shape)).astype(dtype)


def central_differences(function, at, step=1e-5):
    """Derivatives of a scalar function, from its values alone."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        above, below = at.copy(), at.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


@pytest.fixture(params=losses.SOFT_LOSSES)
def soft_loss(request):
    return losses.soft_loss(request.param)


def test_soft_loss_gives_one_finite_float32_number_for_each_sample(soft_loss):
    found = soft_loss(logits(0), logits(1), LABELS)
    assert found.shape == (BATCH,)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_soft_loss_gradient_equals_a_finite_difference(soft_loss, side):
    # Unequal weights: an error that mixes samples would cancel in a plain sum.
    weights = np.float64([1.0, -2.0, 0.5, 3.0])
    at = [logits(0, np.float64), logits(1, np.float64)]
    position = ["student", "teacher"].index(side)

    def total(one):
        both = [one if i == position else other for i, other in enumerate(at)]
        return jnp.sum(weights * soft_loss(*both, LABELS))

    with jax.enable_x64(True):
        gradient = jax.grad(total)(jnp.asarray(at[position]))
        expected = central_differences(jax.jit(total), at[position])
        assert gradient.dtype == jnp.float64
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


def test_soft_loss_of_saturated_logits_is_finite(soft_loss):
    found = soft_loss(SATURATED_STUDENT, SATURATED_TEACHER, LABELS)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("argument", [0, 1])
def test_soft_loss_gradient_at_saturated_logits_is_finite(soft_loss, argument):
    gradient = jax.grad(lambda *both: jnp.sum(soft_loss(*both, LABELS)), argument)
    assert np.isfinite(gradient(SATURATED_STUDENT, SATURATED_TEACHER)).all()


def test_soft_loss_is_the_same_under_jit(soft_loss):
    inputs = logits(0), logits(1), LABELS
    np.testing.assert_allclose(
        jax.jit(soft_loss)(*inputs), soft_loss(*inputs), rtol=1e-5, atol=1e-6
    )


def test_soft_loss_under_vmap_gives_every_seed_its_own_loss(soft_loss):
    students = logits(0, shape=(3, BATCH, CLASSES))
    teacher = logits(1)
    found = jax.vmap(soft_loss, in_axes=(0, None, None))(students, teacher, LABELS)
    expected = [soft_loss(student, teacher, LABELS) for student in students]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_soft_loss_of_bfloat16_logits_computes_in_float32(soft_loss):
    student, teacher = (jnp.asarray(logits(seed), jnp.bfloat16) for seed in (0, 1))
    found = soft_loss(student, teacher, LABELS)
    # The same values in float32: only the precision of the computation may differ.
    exact = soft_loss(np.asarray(student, np.float32), np.asarray(teacher, np.float32), LABELS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
@pytest.mark.parametrize("name", WITH_TEMPERATURE)
def test_soft_loss_raises_at_a_temperature_that_is_not_positive(name, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}.*must be > 0"):
        losses.soft_loss(name, temperature=temperature)(logits(0), logits(1), LABELS)


@pytest.mark.parametrize(
    ("teacher_shape", "said"),
    [
        ((BATCH, CLASSES + 1), r"K = 6.*K = 5"),
        ((BATCH - 1, CLASSES), r"B = 3.*B = 4"),
        ((CLASSES,), r"teacher_logits_BxK has shape \(5,\); expected rank 2"),
    ],
)
def test_soft_loss_raises_where_student_and_teacher_disagree(soft_loss, teacher_shape, said):
    with pytest.raises(ValueError, match=said):
        soft_loss(logits(0), logits(1, shape=teacher_shape), LABELS)


@pytest.mark.parametrize(
    ("values", "label", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], 2, math.log(4)),
        ([math.log(1), math.log(3)], 0, math.log(4)),  # -log(1 / (1 + 3))
        ([math.log(1), math.log(3)], 1, math.log(4 / 3)),  # -log(3 / (1 + 3))
        ([1e4, -1e4], 0, 0.0),
        ([1e4, -1e4], 1, 2e4),
    ],
)
def test_cross_entropy_by_hand(values, label, expected):
    found = losses.cross_entropy(jnp.float32([values]), jnp.int32([label]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_cross_entropy_equals_scipy():
    found = losses.cross_entropy(logits(0), LABELS)
    log_probs = scipy.special.log_softmax(logits(0, np.float64), axis=1)
    np.testing.assert_allclose(found, -log_probs[np.arange(BATCH), LABELS], rtol=1e-5)


def test_cross_entropy_gradient_equals_a_finite_difference():
    weights = np.float64([1.0, -2.0, 0.5, 3.0])

    def total(values):
        return jnp.sum(weights * losses.cross_entropy(values, LABELS))

    at = logits(0, np.float64)
    with jax.enable_x64(True):
        gradient = jax.grad(total)(jnp.asarray(at))
        expected = central_differences(jax.jit(total), at)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


def test_cross_entropy_gradient_at_saturated_logits_is_softmax_minus_one_hot():
    gradient = jax.grad(lambda z: jnp.sum(losses.cross_entropy(z, jnp.int32([1]))))
    np.testing.assert_array_equal(gradient(jnp.float32([[1e4, -1e4]])), [[1.0, -1.0]])


def test_cross_entropy_of_bfloat16_logits_computes_in_float32():
    values = jnp.asarray(logits(0), jnp.bfloat16)
    found = losses.cross_entropy(values, LABELS)
    assert found.dtype == jnp.float32
    exact = losses.cross_entropy(np.asarray(values, np.float32), LABELS)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS[:, None], r"labels_B has shape \(4, 1\); expected rank 1"),
        (LABELS[:3], r"labels_B has B = 3 but logits_BxK has B = 4"),
        (LABELS.astype(np.float32), r"labels_B has dtype float32"),
    ],
)
def test_cross_entropy_raises_on_wrong_labels(labels, said):
    with pytest.raises(ValueError, match=said):
        losses.cross_entropy(logits(0), labels)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "expected"),
    [
        # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2.
        ([0, 0], [math.log(3), 0], 1.0, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        # Logits twice as large at temperature 2: the same p and q, times 2^2.
        ([0, 0], [math.log(9), 0], 2.0, 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))),
        # The other way round it is another number: 1/2 log 2/3 + 1/2 log 2.
        ([math.log(3), 0], [0, 0], 1.0, 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        # p = (0, 1), log q = (0, -2e4 / T): T^2 * 2e4 / T.
        ([1e4, -1e4], [-1e4, 1e4], 1.0, 2e4),
        ([1e4, -1e4], [-1e4, 1e4], 4.0, 8e4),
    ],
)
def test_kl_by_hand(student, teacher, temperature, expected):
    found = losses.kl(jnp.float32([student]), jnp.float32([teacher]), temperature=temperature)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_equals_the_relative_entropy_of_scipy(temperature):
    found = losses.kl(logits(0), logits(1), temperature=temperature)
    q, p = (
        scipy.special.softmax(logits(seed, np.float64) / temperature, axis=1) for seed in (0, 1)
    )
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_kl_softens_with_temperature_four_by_default():
    q, p = (scipy.special.softmax(logits(seed, np.float64) / 4, axis=1) for seed in (0, 1))
    expected = 16 * scipy.special.rel_entr(p, q).sum(1)
    np.testing.assert_allclose(losses.kl(logits(0), logits(1)), expected, rtol=1e-4)


def test_kl_is_zero_where_student_and_teacher_differ_by_a_constant():
    # Not exactly zero in float32, but far below any loss of use.
    found = losses.kl(logits(0) + 3, logits(0))
    np.testing.assert_allclose(found, np.zeros(BATCH), atol=1e-5)


def test_soft_loss_passes_its_options_on():
    found = losses.soft_loss("kl", temperature=2.0)(logits(0), logits(1), LABELS)
    np.testing.assert_array_equal(found, losses.kl(logits(0), logits(1), temperature=2.0))
