"""Every ratio runs through one table: a new one in `RATIOS` gets its rows for free.

Below the table: the ratios that learn nothing, against their published formulas.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from tgeo_jax import ratios

BATCH, CLASSES = 6, 4
# Ratios whose two weights need not lie in [0, 1] and add up to 1.
NOT_CONVEX = ("weighted", "wls", "bikd")


def situation(seed=0, scale=2.0, dtype=np.float32):
    random = np.random.RandomState(seed)
    means = random.rand(CLASSES, CLASSES) + 0.1
    return ratios.Situation(
        student_logits_BxK=jnp.asarray(scale * random.randn(BATCH, CLASSES), dtype),
        teacher_logits_BxK=jnp.asarray(scale * random.randn(BATCH, CLASSES), dtype),
        labels_B=jnp.asarray(random.randint(0, CLASSES, BATCH)),
        hard_B=jnp.asarray(random.rand(BATCH) * scale, jnp.float32),
        soft_B=jnp.asarray(random.rand(BATCH) * scale, jnp.float32),
        class_means_KxK=jnp.asarray(means / means.sum(1, keepdims=True), jnp.float32),
        epoch=jnp.int32(2),
        num_epochs=9,
    )


def saturated():
    """Student and teacher right, wrong or undecided, as surely as logits of +-1e4 can say it."""
    labels = np.arange(BATCH) % CLASSES
    right = np.where(np.eye(CLASSES)[labels] > 0, 1e4, -1e4)
    student = right * np.array([1, 1, -1, -1, 1, 0])[:, None]
    teacher = right * np.array([1, -1, 1, -1, 0, 1])[:, None]
    return situation()._replace(
        student_logits_BxK=jnp.float32(student),
        teacher_logits_BxK=jnp.float32(teacher),
        labels_B=jnp.asarray(labels),
        hard_B=jnp.full(BATCH, 2e4),
        soft_B=jnp.full(BATCH, 2e4),
    )


def parameters(ratio, key=0):
    """Meta-parameters; of a ratio that has them for one batch only, those of some hypergradient."""
    if ratio.per_batch is None:
        return ratio.init(jax.random.key(key), CLASSES)
    random = np.random.RandomState(key)
    probe = ratio.per_batch.start(BATCH)
    return ratio.per_batch.update(
        jax.tree.map(lambda x: jnp.float32(random.randn(*x.shape)), probe)
    )


@pytest.fixture(params=ratios.RATIOS, scope="module")
def initialised(request):
    ratio = ratios.RATIOS[request.param]()
    return ratio, parameters(ratio)


def test_ratio_gives_every_sample_two_finite_float32_weights(initialised):
    ratio, params = initialised
    for weight in jax.jit(ratio.weights)(params, situation()):
        assert weight.shape == (BATCH,)
        assert weight.dtype == jnp.float32
        assert np.isfinite(weight).all()


def test_ratio_weights_are_not_negative(initialised):
    ratio, params = initialised
    for case in (situation(), saturated()):
        assert np.min(jax.jit(ratio.weights)(params, case)) >= 0


@pytest.mark.parametrize(
    "initialised", [name for name in ratios.RATIOS if name not in NOT_CONVEX], indirect=True
)
def test_convex_weights_lie_in_the_unit_interval_and_add_up_to_one(initialised):
    ratio, params = initialised
    for case in (situation(), saturated()):
        hard, soft = jax.jit(ratio.weights)(params, case)
        assert (np.minimum(hard, soft) >= 0).all()
        np.testing.assert_allclose(hard + soft, np.ones(BATCH), rtol=1e-6)


def test_ratio_is_finite_at_saturated_logits(initialised):
    ratio, params = initialised
    for case in (situation(scale=1e4), saturated()):
        assert np.isfinite(jax.jit(ratio.weights)(params, case)).all()


def test_ratio_gradient_is_finite_at_saturated_logits(initialised):
    ratio, params = initialised

    def total(meta_params, case):
        # Unequal weights: hard and soft may add up to a constant.
        hard, soft = ratio.weights(meta_params, case)
        return jnp.sum(hard + 3 * soft)

    for case in (situation(scale=1e4), saturated()):
        gradient = jax.jit(jax.grad(total))(params, case)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_ratio_gradient_equals_finite_differences(initialised, x64):
    """Along random directions, each of which moves every meta-parameter."""
    ratio, params = initialised
    random = np.random.RandomState(5)
    start, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params))
    start = start + 0.3 * random.randn(start.size)
    directions = random.randn(6, start.size)
    mixing = random.randn(2, BATCH)

    @jax.jit
    @jax.vmap
    def by_differences(direction):
        def along(step):
            weights = jnp.stack(ratio.weights(unravel(start + step * direction), situation()))
            return jnp.sum(mixing * weights)

        return (along(1e-6) - along(-1e-6)) / 2e-6

    def total(flat):
        return jnp.sum(mixing * jnp.stack(ratio.weights(unravel(flat), situation())))

    gradient = jax.jit(jax.grad(total))(start)
    np.testing.assert_allclose(
        directions @ gradient, by_differences(directions), rtol=1e-6, atol=1e-8
    )


def test_ratio_is_the_same_under_jit(initialised):
    ratio, params = initialised
    found = jax.jit(ratio.weights)(params, situation())
    np.testing.assert_allclose(found, ratio.weights(params, situation()), rtol=1e-5)


def test_ratio_under_vmap_gives_every_seed_its_own_weights(initialised):
    ratio, params = initialised
    cases = [situation(seed) for seed in range(3)]
    learned = [jax.tree.map(lambda leaf, s=s: leaf * (1 + s), params) for s in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *zip(learned, cases, strict=True))
    found = jax.jit(jax.vmap(ratio.weights))(*stacked)
    for seed in range(3):
        alone = jax.jit(ratio.weights)(learned[seed], cases[seed])
        np.testing.assert_allclose([w[seed] for w in found], alone, rtol=1e-5)


def test_ratio_of_bfloat16_logits_computes_in_float32(initialised):
    ratio, params = initialised
    coarse = situation(dtype=jnp.bfloat16)
    # The same values in float32: only the precision of the computation may differ.
    exact = coarse._replace(
        student_logits_BxK=coarse.student_logits_BxK.astype(jnp.float32),
        teacher_logits_BxK=coarse.teacher_logits_BxK.astype(jnp.float32),
    )
    found = jax.jit(ratio.weights)(params, coarse)
    assert all(weight.dtype == jnp.float32 for weight in found)
    np.testing.assert_allclose(found, jax.jit(ratio.weights)(params, exact), rtol=1e-6)


NOTHING_LEARNED = ("constant", "weighted", "annealed", "ada", "wls", "rw")


@pytest.mark.parametrize("name", NOTHING_LEARNED)
def test_ratio_has_nothing_that_outlives_a_batch(name):
    assert ratios.RATIOS[name]().init(jax.random.key(0), CLASSES) == {}


def of(ratio, case):
    return jax.jit(ratio.weights)({}, case)


def at(epoch, num_epochs=240):
    return situation()._replace(epoch=jnp.int32(epoch), num_epochs=num_epochs)


def predictions(student, teacher, labels):
    """A situation from the two networks' probabilities."""
    return situation()._replace(
        student_logits_BxK=jnp.log(jnp.asarray(student, float)),
        teacher_logits_BxK=jnp.log(jnp.asarray(teacher, float)),
        labels_B=jnp.asarray(labels),
    )


def softmax(logits):
    e = np.exp(np.float64(logits) - np.max(np.float64(logits), axis=1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(("alpha", "hard"), [(0.0, 1.0), (0.25, 0.75), (0.9, 0.1), (1.0, 0.0)])
def test_constant_weighs_every_sample_alike(alpha, hard):
    found = of(ratios.constant(alpha=alpha), situation())
    np.testing.assert_allclose(found, [[hard] * BATCH, [alpha] * BATCH], atol=1e-7)


def test_constant_is_ninety_percent_teacher_unless_said():
    np.testing.assert_allclose(of(ratios.constant(), at(1)), [[0.1] * BATCH, [0.9] * BATCH], 1e-6)


@pytest.mark.parametrize(("epoch", "soft"), [(1, 0.04), (5, 0.2), (20, 0.8), (30, 0.8)])
def test_warmup_grows_the_soft_weight_of_constant_and_leaves_the_hard_one(epoch, soft):
    found = of(ratios.constant(alpha=0.8, warmup_epochs=20), at(epoch))
    np.testing.assert_allclose(found, [[0.2] * BATCH, [soft] * BATCH], rtol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_constant_raises_outside_the_unit_interval(alpha):
    said = rf"ratio\.constant\.alpha={alpha}: must lie in \[0, 1\]"
    with pytest.raises(ValueError, match=said):
        ratios.constant(alpha=alpha)


@pytest.mark.parametrize("name", ["constant", "weighted"])
@pytest.mark.parametrize("warmup_epochs", [-1, float("nan")])
def test_fixed_weights_raise_on_a_warmup_that_is_not_a_length(name, warmup_epochs):
    said = rf"ratio\.{name}\.warmup_epochs={warmup_epochs}: must be >= 0"
    with pytest.raises(ValueError, match=said):
        ratios.RATIOS[name](warmup_epochs=warmup_epochs)


@pytest.mark.parametrize(
    ("options", "hard", "soft"),
    [
        ({}, 1.0, 1.0),
        ({"soft": 2.0}, 1.0, 2.0),  # DIST
        ({"hard": 0.1, "soft": 9.0}, 0.1, 9.0),  # logit standardisation
        ({"hard": 0.0, "soft": 0.0}, 0.0, 0.0),
    ],
)
def test_weighted_gives_the_two_weights_it_was_told(options, hard, soft):
    found = of(ratios.weighted(**options), situation())
    np.testing.assert_allclose(found, [[hard] * BATCH, [soft] * BATCH], rtol=1e-6)


@pytest.mark.parametrize(("epoch", "soft"), [(1, 0.45), (5, 2.25), (20, 9.0), (30, 9.0)])
def test_warmup_grows_the_soft_weight_of_weighted_and_leaves_the_hard_one(epoch, soft):
    found = of(ratios.weighted(hard=0.1, soft=9.0, warmup_epochs=20), at(epoch))
    np.testing.assert_allclose(found, [[0.1] * BATCH, [soft] * BATCH], rtol=1e-6)


@pytest.mark.parametrize("which", ["hard", "soft"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weighted_raises_on_a_weight_that_is_negative_or_not_finite(which, value):
    said = rf"ratio\.weighted\.{which}={value}: must be a finite number >= 0"
    with pytest.raises(ValueError, match=said):
        ratios.weighted(**{which: value})


@pytest.mark.parametrize(
    ("shape", "epoch", "num_epochs", "alpha"),
    [
        ("linear", 1, 5, 1.0),
        ("linear", 2, 5, 0.75),
        ("linear", 3, 5, 0.5),
        ("linear", 5, 5, 0.0),
        ("linear", 1, 1, 1.0),
        ("cosine", 1, 5, 1.0),
        ("cosine", 2, 5, (1 + 2**-0.5) / 2),
        ("cosine", 3, 5, 0.5),
        ("cosine", 5, 5, 0.0),
        ("cosine", 1, 1, 1.0),
    ],
)
def test_annealed_goes_from_the_teacher_alone_to_the_label_alone(shape, epoch, num_epochs, alpha):
    found = of(ratios.annealed(shape=shape), at(epoch, num_epochs))
    np.testing.assert_allclose(found, [[1 - alpha] * BATCH, [alpha] * BATCH], atol=1e-6)


def test_annealed_is_linear_unless_said():
    np.testing.assert_allclose(of(ratios.annealed(), at(2, 5))[1], [0.75] * BATCH, rtol=1e-6)


def test_annealed_raises_on_an_unknown_shape_with_the_known_ones():
    said = r"ratio\.annealed\.shape='cosinus': use one of linear, cosine"
    with pytest.raises(ValueError, match=said):
        ratios.annealed(shape="cosinus")


def test_ada_by_hand():
    # K = 4: (4 * 0.7 - 1) / 3 = 0.6; uniform: 0; below uniform: clipped.
    teacher = [[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.1, 0.7, 0.1, 0.1]]
    case = predictions(teacher, teacher, [0, 0, 0])
    np.testing.assert_allclose(of(ratios.ada(), case), [[0.4, 1, 1], [0.6, 0, 0]], atol=1e-6)


def test_ada_of_a_certain_teacher_is_one_where_it_is_right_and_zero_where_it_is_wrong():
    # Student: right, right, wrong, wrong, right, undecided; it has no say.
    _, alpha = of(ratios.ada(), saturated())
    np.testing.assert_allclose(alpha, [1, 0, 1, 0, 0, 1], atol=1e-6)


def test_ada_is_the_true_probability_less_the_mean_of_the_others():
    case = situation()
    probs, labels = softmax(case.teacher_logits_BxK), np.asarray(case.labels_B)
    gaps = [p[y] - np.delete(p, y).mean() for p, y in zip(probs, labels, strict=True)]
    assert min(gaps) < 0 < max(gaps)
    np.testing.assert_allclose(of(ratios.ada(), case)[1], np.maximum(gaps, 0), rtol=1e-5)


# CE of the student over CE of the teacher: 2, 1/2, 1.
STUDENT, TEACHER = [[0.25, 0.75], [0.5, 0.5], [0.3, 0.7]], [[0.5, 0.5], [0.25, 0.75], [0.3, 0.7]]
WLS = 1 - np.exp([-2.0, -0.5, -1.0])


@pytest.mark.parametrize(("options", "beta"), [({}, 2.25), ({"beta": 2.5}, 2.5)])
def test_wls_by_hand(options, beta):
    found = of(ratios.wls(**options), predictions(STUDENT, TEACHER, [0, 0, 0]))
    np.testing.assert_allclose(found, [np.ones(3), beta * WLS], rtol=1e-5)


def test_convex_wls_by_hand():
    # beta is the other form's.
    ratio = ratios.wls(convex=True, beta=7.0)
    found = of(ratio, predictions(STUDENT, TEACHER, [0, 0, 0]))
    np.testing.assert_allclose(found, [1 - WLS, WLS], rtol=1e-5)


def test_wls_of_a_perfect_student_is_zero_else_one_for_a_perfect_teacher():
    # (student, teacher) right: both, first, second, neither; student right, teacher undecided; ...
    _, w = of(ratios.wls(convex=True), saturated())
    neither = 1 - np.exp(-1)
    np.testing.assert_allclose(w, [0, 0, 1, neither, 0, 1], atol=1e-6)


def test_wls_has_an_epsilon_in_the_denominator(x64):
    # A perfect teacher and a student whose loss is of the epsilon's size.
    loss = np.log1p(np.exp(-16.0))
    case = predictions(np.ones((1, 2)), np.ones((1, 2)), [0])._replace(
        student_logits_BxK=jnp.asarray([[16.0, 0.0]], float),
        teacher_logits_BxK=jnp.asarray([[1e4, 0.0]], float),
    )
    _, w = of(ratios.wls(convex=True), case)
    np.testing.assert_allclose(w, [1 - np.exp(-loss / 1e-7)], rtol=1e-6)


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_wls_raises_on_a_beta_that_is_negative_or_not_finite(beta):
    with pytest.raises(ValueError, match=rf"ratio\.wls\.beta={beta}: must be a finite number >= 0"):
        ratios.wls(beta=beta)
