"""Every ratio runs through one table: a new one in `RATIOS` gets its rows for free."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tgeo_jax import ratios

BATCH, CLASSES = 6, 4
NOT_CONVEX = ()  # ratios whose two weights need not lie in [0, 1] and add up to 1


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


def parameters(ratio, key=0):
    return ratio.init(jax.random.key(key), CLASSES)


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


@pytest.mark.parametrize(
    "initialised", [name for name in ratios.RATIOS if name not in NOT_CONVEX], indirect=True
)
def test_convex_weights_lie_in_the_unit_interval_and_add_up_to_one(initialised):
    ratio, params = initialised
    hard, soft = jax.jit(ratio.weights)(params, situation())
    assert (np.minimum(hard, soft) >= 0).all()
    np.testing.assert_allclose(hard + soft, np.ones(BATCH), rtol=1e-6)


def test_ratio_is_finite_at_saturated_logits(initialised):
    ratio, params = initialised
    for weight in jax.jit(ratio.weights)(params, situation(scale=1e4)):
        assert np.isfinite(weight).all()


def test_ratio_gradient_is_finite_at_saturated_logits(initialised):
    ratio, params = initialised
    case = situation(scale=1e4)

    def total(meta_params):
        # Unequal weights: hard and soft may add up to a constant.
        hard, soft = ratio.weights(meta_params, case)
        return jnp.sum(hard + 3 * soft)

    gradient = jax.jit(jax.grad(total))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


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


@pytest.mark.parametrize(("alpha", "hard"), [(0.0, 1.0), (0.25, 0.75), (0.9, 0.1), (1.0, 0.0)])
def test_constant_weighs_every_sample_alike(alpha, hard):
    found = ratios.constant(alpha=alpha).weights({}, situation())
    np.testing.assert_allclose(found, [[hard] * BATCH, [alpha] * BATCH], atol=1e-7)


def test_constant_has_nothing_to_learn():
    assert ratios.constant().init(jax.random.key(0), CLASSES) == {}


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_constant_raises_outside_the_unit_interval(alpha):
    said = rf"ratio\.constant\.alpha={alpha}: must lie in \[0, 1\]"
    with pytest.raises(ValueError, match=said):
        ratios.constant(alpha=alpha)


@pytest.mark.parametrize(("initial_ratio", "key"), [(0.5, 0), (0.5, 1), (0.5, 2), (0.2, 0)])
def test_tgeo_starts_near_its_initial_ratio(initial_ratio, key):
    ratio = ratios.tgeo(initial_ratio=initial_ratio)
    _, soft = jax.jit(ratio.weights)(parameters(ratio, key), situation(key))
    np.testing.assert_allclose(soft, np.full(BATCH, initial_ratio), atol=0.05)


def test_tgeo_starts_different_for_different_samples():
    ratio = ratios.tgeo()
    params = parameters(ratio)
    _, soft = jax.jit(ratio.weights)(params, situation())
    assert len(np.unique(soft)) == BATCH


@pytest.mark.parametrize(
    ("relations", "blocks"),
    [
        ("sg_tg", 2),
        ("intra", 6),
        ("full", 9),
        ("edges", 5),
        ("vertices", 4),
        ("angles", 2),
        ("full+angles", 11),
    ],
)
def test_tgeo_looks_at_k_features_for_each_block(relations, blocks):
    init = ratios.tgeo(relations=relations).init
    params = jax.eval_shape(lambda key: init(key, CLASSES), jax.random.key(0))
    assert params["params"]["Dense_0"]["kernel"].shape == (blocks * CLASSES, 32)


def numpy_features(case, relations):
    """Features of every sample, by NumPy."""

    def softmax(values):
        e = np.exp(np.asarray(values) - np.max(values, axis=1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    s, t = softmax(case.student_logits_BxK), softmax(case.teacher_logits_BxK)
    g = np.eye(CLASSES)[np.asarray(case.labels_B)]
    m = np.asarray(case.class_means_KxK)[np.asarray(case.labels_B)]
    blocks = {
        "full": [s, t, g, m, *(e**2 for e in (m - s, g - s, t - s, t - g, m - g))],
        "sg_tg": [(g - s) ** 2, (t - g) ** 2],
    }
    return np.concatenate(blocks[relations], axis=1)


@pytest.mark.parametrize("relations", ["full", "sg_tg"])
def test_tgeo_is_the_forward_pass_of_its_network(relations):
    ratio = ratios.tgeo(relations=relations, hidden=(5, 3))
    params = jax.eval_shape(lambda: parameters(ratio))
    # Random biases too, so that a forgotten one shows.
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda leaf: 0.7 * random.randn(*leaf.shape), params)
    x = numpy_features(situation(), relations)
    for layer in ("Dense_0", "Dense_1"):
        x = x @ params["params"][layer]["kernel"] + params["params"][layer]["bias"]
        x = np.where(x > 0, x, 0.01 * x)
    x = x @ params["params"]["Dense_2"]["kernel"] + params["params"]["Dense_2"]["bias"]
    alpha = 1 / (1 + np.exp(-x[:, 0]))
    hard, soft = jax.jit(ratio.weights)(params, situation())
    assert np.ptp(alpha) > 0.01  # or it would not tell one network from another
    np.testing.assert_allclose(soft, alpha, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hard, 1 - alpha, rtol=1e-4, atol=1e-6)


def test_tgeo_is_a_constant_to_the_student():
    ratio = ratios.tgeo()
    params = parameters(ratio)
    case = situation()

    def total(student_logits):
        return jnp.sum(ratio.weights(params, case._replace(student_logits_BxK=student_logits))[1])

    gradient = jax.jit(jax.grad(total))(case.student_logits_BxK)
    np.testing.assert_array_equal(gradient, np.zeros((BATCH, CLASSES)))


def test_tgeo_passes_a_gradient_to_every_layer_from_the_start():
    ratio = ratios.tgeo()
    params = parameters(ratio)
    case = situation()
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(ratio.weights(p, case)[1])))(params)
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        assert np.abs(gradient["params"][layer]["kernel"]).max() > 0


def test_tgeo_raises_on_an_unknown_relation_set_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown relation set 'ful'; use one of sg_tg, intra"):
        ratios.tgeo(relations="ful")


@pytest.mark.parametrize("initial_ratio", [0, 1, -0.5, float("nan")])
def test_tgeo_raises_on_an_initial_ratio_that_no_sigmoid_reaches(initial_ratio):
    said = rf"ratio\.tgeo\.initial_ratio={initial_ratio}: must lie strictly in \(0, 1\)"
    with pytest.raises(ValueError, match=said):
        ratios.tgeo(initial_ratio=initial_ratio)


@pytest.mark.parametrize("hidden", [(0,), (32, -1), (2.5,)])
def test_tgeo_raises_on_hidden_widths_that_make_no_layers(hidden):
    with pytest.raises(ValueError, match=r"ratio\.tgeo\.hidden=\(.*positive integers"):
        ratios.tgeo(hidden=hidden)


def test_fusion_network_returns_a_vector():
    # [B, 1] against [B] losses would broadcast to [B, B].
    network = ratios.FusionNetwork(hidden=(3,))
    alpha, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.ones((BATCH, 8)))
    assert alpha.shape == (BATCH,)


@pytest.mark.parametrize(
    ("hard", "soft", "share"), [(1.0, 3.0, 0.75), (0.8, 0.2, 0.2), (0.0, 2.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_teacher_share_is_the_soft_part_of_the_weights(hard, soft, share):
    found = ratios.teacher_share(jnp.float32([hard]), jnp.float32([soft]))
    np.testing.assert_allclose(found, [share], rtol=1e-6)
