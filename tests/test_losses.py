"""Every soft loss runs through one table: a new one in `SOFT_LOSSES` gets its rows for free."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tgeo_jax import losses

BATCH, CLASSES = 4, 5
LABELS = np.int32([0, 3, 4, 3])
# Unequal: an error that mixes samples would cancel in a plain sum.
ROW_WEIGHTS = np.float64([1.0, -2.0, 0.5, 3.0])
TABLE = {name: losses.soft_loss(name) for name in losses.SOFT_LOSSES}
TABLE["weighted_sum"] = losses.weighted_sum([TABLE["kl"], TABLE["dist"]], (0.5, 2.0))
# Difficulty and the teacher's ranks are constants to its gradient by design; a finite difference
# moves them; tests/test_correlation.py compares the gradient with one that holds both.
HARD_ON_TEACHER = ("cmkd",)
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
EQUAL = np.full((BATCH, CLASSES), 3, np.float32)


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


@pytest.fixture(params=TABLE)
def name(request):
    return request.param


@functools.cache
def compiled(name):
    """Compiled once for all rows of the table that have the same shapes."""
    return jax.jit(TABLE[name])


@functools.cache
def compiled_gradients(name):
    def total(student, teacher, labels, weights):
        return jnp.sum(weights * TABLE[name](student, teacher, labels))

    return jax.jit(jax.value_and_grad(total, (0, 1)))


def gradients(name, student, teacher):
    batch = len(student)
    return compiled_gradients(name)(student, teacher, LABELS[:batch], ROW_WEIGHTS[:batch])[1]


def test_soft_loss_gives_one_finite_float32_number_for_each_sample(name):
    found = compiled(name)(logits(0), logits(1), LABELS)
    assert found.shape == (BATCH,)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((n, "student") for n in TABLE),
        *((n, "teacher") for n in TABLE if n not in HARD_ON_TEACHER),
    ],
)
def test_soft_loss_gradient_equals_a_finite_difference(name, side, x64):
    at = [logits(0, np.float64), logits(1, np.float64)]
    position = ["student", "teacher"].index(side)

    def total(one):
        both = [one if i == position else other for i, other in enumerate(at)]
        return compiled_gradients(name)(*both, LABELS, ROW_WEIGHTS)[0]

    gradient = gradients(name, *at)[position]
    assert gradient.dtype == jnp.float64
    expected = central_differences(total, at[position])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param(SATURATED_STUDENT, SATURATED_TEACHER, id="saturated"),
        pytest.param(SATURATED_TEACHER, SATURATED_STUDENT, id="saturated_the_other_way"),
        # No variance: what standardises or correlates has nothing to divide by.
        pytest.param(EQUAL, logits(1), id="equal_student"),
        pytest.param(logits(0), EQUAL, id="equal_teacher"),
        pytest.param(EQUAL, EQUAL, id="equal_both"),
        pytest.param(logits(0)[:1], logits(1)[:1], id="batch_of_one"),
    ],
)
def test_soft_loss_is_finite_with_finite_gradients_at(name, student, teacher):
    found = compiled(name)(student, teacher, LABELS[: len(student)])
    assert found.shape == (len(student),)
    assert np.isfinite(found).all()
    assert np.isfinite(gradients(name, student, teacher)).all()


def test_soft_loss_is_the_same_without_jit(name):
    inputs = logits(0), logits(1), LABELS
    np.testing.assert_allclose(TABLE[name](*inputs), compiled(name)(*inputs), rtol=1e-5, atol=1e-6)


def test_soft_loss_under_vmap_gives_every_seed_its_own_loss(name):
    students = logits(0, shape=(3, BATCH, CLASSES))
    found = jax.jit(jax.vmap(TABLE[name], in_axes=(0, None, None)))(students, logits(1), LABELS)
    expected = [compiled(name)(student, logits(1), LABELS) for student in students]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_soft_loss_of_bfloat16_logits_computes_in_float32(name):
    student, teacher = (jnp.asarray(logits(seed), jnp.bfloat16) for seed in (0, 1))
    found = compiled(name)(student, teacher, LABELS)
    # The same values in float32: only the precision of the computation may differ.
    exact = compiled(name)(np.asarray(student, np.float32), np.asarray(teacher, np.float32), LABELS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
@pytest.mark.parametrize("loss", WITH_TEMPERATURE)
def test_soft_loss_raises_at_a_temperature_that_is_not_positive(loss, temperature):
    with pytest.raises(ValueError, match=f"^temperature={temperature}.*must be > 0"):
        losses.soft_loss(loss, temperature=temperature)(logits(0), logits(1), LABELS)


@pytest.mark.parametrize(
    ("teacher_shape", "said"),
    [
        ((BATCH, CLASSES + 1), r"K = 6.*K = 5"),
        ((BATCH - 1, CLASSES), r"B = 3.*B = 4"),
        ((CLASSES,), r"teacher_logits_BxK has shape \(5,\); expected rank 2"),
    ],
)
def test_soft_loss_raises_where_student_and_teacher_disagree(name, teacher_shape, said):
    with pytest.raises(ValueError, match=said):
        TABLE[name](logits(0), logits(1, shape=teacher_shape), LABELS)


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


def test_cross_entropy_gradient_equals_a_finite_difference(x64):
    @jax.jit
    def total(values):
        return jnp.sum(ROW_WEIGHTS * losses.cross_entropy(values, LABELS))

    at = logits(0, np.float64)
    gradient = jax.jit(jax.grad(total))(at)
    assert gradient.dtype == jnp.float64
    expected = central_differences(total, at)
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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Teacher (1/2, 1/3, 1/6), student (1/4, 1/4, 1/2), true class 0. Binary: (1/2, 1/2) against
        # (1/4, 3/4); the others among themselves: (2/3, 1/3) against (1/3, 2/3).
        ({"alpha": 1.0, "beta": 0.0}, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        ({"alpha": 0.0, "beta": 1.0}, math.log(2) / 3),
        ({"alpha": 3.0, "beta": 6.0}, 1.5 * math.log(4 / 3) + 2 * math.log(2)),
        ({}, 0.5 * math.log(4 / 3) + 8 * math.log(2) / 3),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_by_hand(temperature, options, expected):
    teacher, student = (
        temperature * np.log(np.float32([p]))
        for p in ([1 / 2, 1 / 3, 1 / 6], [1 / 4, 1 / 4, 1 / 2])
    )
    found = losses.dkd(student, teacher, np.int32([0]), temperature=temperature, **options)
    np.testing.assert_allclose(found, [temperature**2 * expected], rtol=1e-5)


def numpy_dkd_parts(temperature):
    """TCKD, NCKD and the teacher's probability of the true class, as in the paper's section 3."""
    q, p = (
        scipy.special.softmax(logits(seed, np.float64) / temperature, axis=1) for seed in (0, 1)
    )
    rows, is_true = np.arange(BATCH), np.eye(CLASSES, dtype=bool)[LABELS]
    binary_p, binary_q = (np.stack([v[rows, LABELS], 1 - v[rows, LABELS]]) for v in (p, q))
    others_p, others_q = (v[~is_true].reshape(BATCH, CLASSES - 1) for v in (p, q))
    others_p, others_q = (v / v.sum(1, keepdims=True) for v in (others_p, others_q))
    tckd = scipy.special.rel_entr(binary_p, binary_q).sum(0)
    return tckd, scipy.special.rel_entr(others_p, others_q).sum(1), p[rows, LABELS]


def test_dkd_equals_numpy_at_the_papers_defaults():
    tckd, nckd, _ = numpy_dkd_parts(4.0)
    found = compiled("dkd")(logits(0), logits(1), LABELS)
    np.testing.assert_allclose(found, 16 * (tckd + 8 * nckd), rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_is_what_dkd_decouples_weighted_by_how_unsure_the_teacher_is(temperature):
    inputs = logits(0), logits(1), LABELS
    tckd, nckd = (
        jax.jit(losses.soft_loss("dkd", temperature=temperature, alpha=alpha, beta=1 - alpha))
        for alpha in (1.0, 0.0)
    )
    _, _, sure = numpy_dkd_parts(temperature)
    expected = losses.kl(*inputs[:2], temperature=temperature)
    np.testing.assert_allclose(tckd(*inputs) + (1 - sure) * nckd(*inputs), expected, rtol=1e-4)


def test_dkd_of_a_student_sure_of_the_true_class_keeps_value_and_gradient():
    # 1 - q is 0 in float32, its logarithm log(1 + 1 / e) - 60 is not.
    student, teacher = np.float32([[60, 0, -1]]), np.zeros((1, 3), np.float32)
    function = functools.partial(losses.dkd, temperature=1.0, beta=0.0)
    value, pullback = jax.vjp(lambda z: function(z, teacher, np.int32([0])), student)
    unsure = math.log(1 + math.exp(-1)) - 60
    expected = math.log(1 / 3) / 3 + 2 / 3 * (math.log(2 / 3) - unsure)
    np.testing.assert_allclose(value, [expected], rtol=1e-6)
    ((slope,),) = pullback(jnp.ones(1))
    np.testing.assert_allclose(slope[0], 2 / 3, rtol=1e-6)  # q - p


def test_dkd_raises_on_two_classes_and_says_why():
    two = logits(0, shape=(BATCH, 2))
    said = r"'dkd' with K = 2 classes: it needs more than 2.*other than the true one; use 'kl'"
    with pytest.raises(ValueError, match=said):
        losses.dkd(two, two, np.int32([0, 1, 1, 0]))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_logit_std_equals_the_relative_entropy_of_standardised_logits(options):
    temperature = options.get("temperature", 2.0)
    q, p = (
        scipy.special.softmax(
            scipy.stats.zscore(logits(seed, np.float64), axis=1, ddof=1) / temperature, axis=1
        )
        for seed in (0, 1)
    )
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum(1)
    found = losses.logit_std(logits(0), logits(1), **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 50.0), (0.01, -3.0), (300.0, 0.0)])
def test_logit_std_does_not_see_a_positive_affine_map_of_the_student(scale, shift):
    found = compiled("logit_std")(scale * logits(0) + shift, logits(1), LABELS)
    expected = compiled("logit_std")(logits(0), logits(1), LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["logit_std", "cmkd"])
def test_of_two_classes_a_comparison_of_shapes_sees_only_which_is_higher(name):
    """Standardised, two logits are +-1/sqrt(2) whatever they were: there is nothing to follow."""
    loss = losses.soft_loss(name)
    random = np.random.RandomState(0)
    student, teacher = (np.float32(3 * random.randn(8, 2)) for _ in range(2))
    labels = np.zeros(8, np.int32)
    agree = student.argmax(1) == teacher.argmax(1)
    assert 0 < agree.sum() < 8
    values, pull = jax.vjp(lambda s: loss(s, teacher, labels), student)
    np.testing.assert_allclose(values[agree], 0, atol=1e-5)
    np.testing.assert_allclose(values[~agree], values[~agree][0], rtol=1e-5)
    assert values[~agree][0] > 0.5
    np.testing.assert_allclose(pull(jnp.ones(8))[0], 0, atol=1e-4)


def test_weighted_sum_adds_its_weighted_parts():
    parts = [lambda s, t, y: s[:, 0], lambda s, t, y: t[:, 0], lambda s, t, y: y]
    both = np.float64([[1], [2]]), np.float64([[10], [20]]), np.int32([100, 300])
    found = losses.weighted_sum(parts, (2, 3, 0.5))(*both)
    np.testing.assert_allclose(found, [2 + 30 + 50, 4 + 60 + 150])


@pytest.mark.parametrize(("names", "weights"), [("kl dkd", (1.0,)), ("kl", (1.0, 2.0)), ("", ())])
def test_weighted_sum_raises_without_one_weight_for_each_part(names, weights):
    parts = [TABLE[name] for name in names.split()]
    with pytest.raises(ValueError, match=f"{len(weights)} weights for {len(parts)} losses: give"):
        losses.weighted_sum(parts, weights)


def test_soft_loss_hands_labels_to_a_loss_that_takes_them():
    found = losses.soft_loss("dkd", temperature=2.0)(logits(0), logits(1), LABELS)
    expected = losses.dkd(logits(0), logits(1), LABELS, temperature=2.0)
    np.testing.assert_array_equal(found, expected)
