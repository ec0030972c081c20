"""DIST and CMKD against NumPy and SciPy, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

from tests.test_ranking import sequential_rows
from tgeo_jax import bilevel, correlation, losses

pytestmark = pytest.mark.usefixtures("x64")

BATCH, CLASSES = 6, 5
STUDENT, TEACHER = 2 * np.random.RandomState(0).randn(2, BATCH, CLASSES)
LABELS = np.int32([0, 3, 4, 3, 1, 1])
ROW_WEIGHTS = np.float64([1.0, -2.0, 0.5, 3.0, -0.7, 1.3])
softmax = functools.partial(scipy.special.softmax, axis=1)


@functools.cache
def compiled(name, **options):
    return jax.jit(losses.soft_loss(name, **options))


def rows_apart(a_BxK, b_BxK):
    """1 - Pearson's correlation of every row with its partner."""
    return np.float64([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(a_BxK, b_BxK, strict=True)])


def z_scores(logits_BxK):
    return scipy.stats.zscore(logits_BxK, axis=1, ddof=1)


def difficulty(kind, student_BxK, teacher_BxK, labels_B, temperature=4.0):
    s_BxK, t_BxK = softmax(student_BxK), softmax(teacher_BxK)
    if kind == "entropy":
        entropy_B = scipy.stats.entropy(softmax(teacher_BxK / temperature), axis=1)
        return entropy_B / np.log(teacher_BxK.shape[1])
    if kind == "doubt":
        return np.where(np.eye(CLASSES)[labels_B] == 1, 0, t_BxK).sum(1)
    if kind == "disagreement":  # total variation as what one side has more than the other
        return np.maximum(s_BxK - t_BxK, 0).sum(1)
    return np.zeros(len(labels_B))


def numpy_cmkd(
    student_BxK,
    teacher_BxK,
    h_B,
    *,
    temperature=4.0,
    rank_strength=3 / CLASSES,
    direction="hard_to_spearman",
    standardise=True,
    intra=0.0,
    teacher_ranks_BxK=None,
):
    if standardise:
        student_BxK, teacher_BxK = z_scores(student_BxK), z_scores(teacher_BxK)
    if teacher_ranks_BxK is None:
        teacher_ranks_BxK = scipy.stats.rankdata(teacher_BxK, axis=1)
    p_BxK, q_BxK = softmax(student_BxK / temperature), softmax(teacher_BxK / temperature)
    pearson_B = rows_apart(p_BxK, q_BxK)
    spearman_B = rows_apart(sequential_rows(student_BxK, rank_strength), teacher_ranks_BxK)
    weight_B = {"hard_to_spearman": h_B, "hard_to_pearson": 1 - h_B, "none": 0.5}[direction]
    mixed_B = pearson_B + weight_B * (spearman_B - pearson_B)
    if intra:
        mixed_B += intra * rows_apart(p_BxK.T, q_BxK.T).mean()
    return temperature**2 * mixed_B


def central_differences(function, at, step=1e-6):
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        shift = np.zeros_like(at)
        shift[index] = step
        gradient[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "inter": 0.5, "intra": 3.0},
        {"inter": 2.0, "intra": 0.0},
        {"inter": 0.0},
    ],
)
def test_dist_equals_numpys_correlation_of_rows_and_columns(options):
    given = {"temperature": 4.0, "inter": 1.0, "intra": 1.0, **options}
    s_BxK, t_BxK = (softmax(z / given["temperature"]) for z in (STUDENT, TEACHER))
    expected_B = given["inter"] * rows_apart(s_BxK, t_BxK)
    expected_B += given["intra"] * rows_apart(s_BxK.T, t_BxK.T).mean()
    found = compiled("dist", **options)(STUDENT, TEACHER, LABELS)
    # The constant in the denominator is 1e-7 of it here.
    np.testing.assert_allclose(found, given["temperature"] ** 2 * expected_B, rtol=1e-5)


def test_dist_gives_every_sample_the_same_intra_class_term():
    found = np.asarray(compiled("dist", inter=0.0)(STUDENT, TEACHER, LABELS))
    np.testing.assert_array_equal(found, np.full(BATCH, found[0]))
    assert found[0] > 0.1


def test_dist_by_hand():
    # Two classes: a row is (p, 1 - p), so rows correlate by +1 or -1, columns as the samples do.
    student = np.log(np.float64([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]]))
    teacher = np.log(np.float64([[0.1, 0.9], [0.7, 0.3], [0.7, 0.3]]))
    found = losses.dist(student, teacher, temperature=1.0, intra=0.0)
    np.testing.assert_allclose(found, [0, 2, 0], atol=1e-6)
    found = losses.dist(student, teacher, temperature=1.0, inter=0.0)
    # Deviations (-3, -1, 4) / 10 and (-2, 1, 1) / 5: 0.18 / sqrt(0.26 * 0.24).
    np.testing.assert_allclose(found, np.full(3, 1 - 0.18 / np.sqrt(0.26 * 0.24)), rtol=1e-6)


@pytest.mark.parametrize("kind", correlation.DIFFICULTIES)
@pytest.mark.parametrize("direction", correlation.DIRECTIONS)
def test_cmkd_equals_numpy(direction, kind):
    h_B = difficulty(kind, STUDENT, TEACHER, LABELS)
    expected = numpy_cmkd(STUDENT, TEACHER, h_B, direction=direction)
    found = compiled("cmkd", direction=direction, difficulty=kind)(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.5},
        {"rank_strength": 0.2},
        {"rank_strength": 1.7, "standardise": False},
        {"intra": 0.4},
        {"direction": "none", "intra": 2.0, "temperature": 1.0},
    ],
)
def test_cmkd_equals_numpy_with_its_other_options(options):
    h_B = difficulty("entropy", STUDENT, TEACHER, LABELS)
    found = compiled("cmkd", **options)(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(found, numpy_cmkd(STUDENT, TEACHER, h_B, **options), rtol=1e-5)


def test_cmkd_softens_its_difficulty_by_its_own_temperature():
    h_B = difficulty("entropy", STUDENT, TEACHER, LABELS, temperature=1.0)
    found = compiled("cmkd", difficulty_temperature=1.0)(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(found, numpy_cmkd(STUDENT, TEACHER, h_B), rtol=1e-5)


@pytest.mark.parametrize("kind", ["entropy", "disagreement"])
def test_cmkd_stretches_its_difficulty_over_the_batch(kind):
    h_B = difficulty(kind, STUDENT, TEACHER, LABELS)
    stretched_B = np.interp(h_B, [h_B.min(), h_B.max()], [0, 1])
    found = compiled("cmkd", difficulty=kind, normalise_difficulty=True)(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(found, numpy_cmkd(STUDENT, TEACHER, stretched_B), rtol=1e-5)


def test_cmkd_weighs_both_one_half_where_all_are_equally_difficult():
    teacher = np.tile(TEACHER[:1], (BATCH, 1))
    found = compiled("cmkd", normalise_difficulty=True)(STUDENT, teacher, LABELS)
    np.testing.assert_allclose(found, numpy_cmkd(STUDENT, teacher, 0.5), rtol=1e-5)


def test_cmkd_does_not_stretch_what_only_rounding_tells_apart():
    teacher = np.stack([TEACHER[0], np.roll(TEACHER[0], 1)]).astype(np.float32)
    student = STUDENT[:2].astype(np.float32)
    found = compiled("cmkd", normalise_difficulty=True)(student, teacher, LABELS[:2])
    np.testing.assert_allclose(found, numpy_cmkd(student, teacher, 0.5), rtol=1e-4)


def test_cmkd_without_difficulty_has_none_to_stretch():
    found = compiled("cmkd", difficulty="off", normalise_difficulty=True)(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(found, numpy_cmkd(STUDENT, TEACHER, 0.0), rtol=1e-5)


def test_cmkd_without_difficulty_on_raw_logits_is_the_inter_class_term_of_dist():
    loss = compiled("cmkd", temperature=1.0, difficulty="off", standardise=False)
    expected = compiled("dist", temperature=1.0, intra=0.0)(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(loss(STUDENT, TEACHER, LABELS), expected, rtol=1e-13)


def test_cmkd_by_hand():
    # Gaps are far beyond the strength: ranks (3, 1, 2) against (1, 3, 2), (3, 2, 1) and themselves
    # correlate by -1, 1/2 and 1. These teachers are all but uniform, so that h = 1.
    student = np.float64([[3, 1, 2], [3, 1, 2], [3, 1, 2]])
    teacher = 1e-6 * np.float64([[1, 3, 2], [1.5, 1.25, 1], [2, 1, 1.5]])
    found = compiled("cmkd", rank_strength=0.1, temperature=2.0)(student, teacher, LABELS[:3])
    np.testing.assert_allclose(found, 4 * np.float64([2, 0.5, 0]), atol=1e-5)


@pytest.mark.parametrize("kind", correlation.DIFFICULTIES)
def test_cmkd_looks_at_labels_for_doubt_alone(kind):
    loss = compiled("cmkd", direction="hard_to_spearman", difficulty=kind)
    moved = np.asarray(loss(STUDENT, TEACHER, (LABELS + 1) % CLASSES))
    same = moved == loss(STUDENT, TEACHER, LABELS)
    assert not same.any() if kind == "doubt" else same.all()


@pytest.mark.parametrize("kind", ["entropy", "disagreement", "off"])
def test_cmkd_needs_no_labels_for_another_difficulty_than_doubt(kind):
    loss = compiled("cmkd", direction="hard_to_spearman", difficulty=kind)
    expected = loss(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(loss(STUDENT, TEACHER, None), expected, rtol=1e-12)


def test_cmkd_raises_at_doubt_without_labels():
    with pytest.raises(ValueError, match=r"difficulty='doubt' is 1 - T_y: pass labels_B"):
        compiled("cmkd", difficulty="doubt")(STUDENT, TEACHER, None)


@pytest.mark.parametrize("kind", ["entropy", "disagreement"])
def test_cmkd_is_differentiated_as_if_difficulty_and_teacher_ranks_were_constants(kind):
    options = {"intra": 0.4}
    h_B = difficulty(kind, STUDENT, TEACHER, LABELS)
    ranks_BxK = scipy.stats.rankdata(TEACHER, axis=1)
    loss = losses.soft_loss("cmkd", difficulty=kind, **options)
    gradient = jax.jit(jax.grad(lambda s, t: ROW_WEIGHTS @ loss(s, t, LABELS), (0, 1)))

    def held(s_BxK, t_BxK):
        return ROW_WEIGHTS @ numpy_cmkd(s_BxK, t_BxK, h_B, teacher_ranks_BxK=ranks_BxK, **options)

    found = gradient(STUDENT, TEACHER)
    expected = (
        central_differences(lambda s: held(s, TEACHER), STUDENT),
        central_differences(lambda t: held(STUDENT, t), TEACHER),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"direction": "up"},
            r"direction='up': use one of hard_to_spearman, hard_to_pearson, none",
        ),
        ({"difficulty": "age"}, r"difficulty='age': use one of entropy, doubt, disagreement, off"),
        ({"difficulty_temperature": 0}, r"difficulty_temperature=0\.0: must be > 0"),
        ({"difficulty_temperature": float("nan")}, r"difficulty_temperature=nan: must be > 0"),
        ({"direction": "none", "difficulty": "age"}, r"difficulty='age': use one of entropy"),
        ({"rank_strength": 0}, r"rank_strength=0\.0: must be > 0"),
        ({"rank_strength": -0.1}, r"rank_strength=-0.1: must be > 0"),
        ({"rank_strength": float("nan")}, r"rank_strength=nan: must be > 0"),
    ],
)
def test_cmkd_raises_on_options_it_does_not_know(options, said):
    with pytest.raises(ValueError, match=said):
        compiled("cmkd", **options)(STUDENT, TEACHER, LABELS)


def test_z_scores_have_mean_zero_and_unbiased_deviation_one():
    found = jax.jit(correlation.z_scores)(STUDENT + 5)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, z_scores(STUDENT), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (2, 1)])
def test_z_scores_of_equal_logits_are_zero_with_a_finite_gradient(shape):
    values = jnp.full(shape, 7, jnp.bfloat16)
    found, pullback = jax.vjp(correlation.z_scores, values)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.zeros(shape))
    assert np.isfinite(pullback(jnp.ones_like(found))[0].astype(found.dtype)).all()


def test_one_step_through_cmkd_has_the_same_meta_gradient_by_every_route():
    random = np.random.RandomState(1)
    x_BxD, val_BxD = random.randn(2, BATCH, 3)
    params_DxK, meta_B = random.randn(3, CLASSES), random.randn(BATCH)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def inner(params, meta):
        return jnp.mean(jax.nn.sigmoid(meta) * losses.cmkd(x_BxD @ params, TEACHER, LABELS))

    def outer(params):
        return jnp.mean(losses.cross_entropy(val_BxD @ params, LABELS))

    @functools.partial(jax.jit, static_argnums=1)
    def step(meta, estimator):
        state = optimizer.init(params_DxK)
        return bilevel.one_step(
            inner, outer, params_DxK, meta, optimizer, state, estimator=estimator
        )

    mixed, reverse = (step(meta_B, estimator).meta_grads for estimator in ("mixed", "reverse"))
    differences = central_differences(lambda meta: step(meta, "mixed").outer_value, meta_B)
    assert np.abs(differences).min() > 1e-6
    np.testing.assert_allclose(mixed, reverse, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mixed, differences, rtol=1e-5, atol=1e-8)
