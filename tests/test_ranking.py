"""Soft ranks against a sequential isotonic regression, their derivatives by other routes."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.isotonic

from tgeo_jax import correlation, ranking

pytestmark = pytest.mark.usefixtures("x64")

STRENGTH = 0.5
# 130 needs halves of 64 and 128, beyond where all pairs are compared; 8 needs no padding.
SIZES = (1, 2, 3, 8, 33, 130)


def sequential_soft_rank(values_N, strength):
    """Soft ranks of one row by pooling adjacent violators one after another, and block numbers."""
    values_N = np.asarray(values_N, np.float64)
    n = len(values_N)
    order_N = np.argsort(-values_N, kind="stable")
    scaled_N = values_N[order_N] / strength
    pooled_N = sklearn.isotonic.isotonic_regression(
        scaled_N - np.arange(n, 0, -1), increasing=False
    )
    ranks_N, blocks_N = np.empty(n), np.empty(n, int)
    ranks_N[order_N] = scaled_N - pooled_N
    blocks_N[order_N] = np.cumsum(np.diff(pooled_N, prepend=pooled_N[0]) != 0)
    return ranks_N, blocks_N


def sequential_rows(values_RxN, strength=STRENGTH):
    return np.stack([sequential_soft_rank(row_N, strength)[0] for row_N in values_RxN])


def jacobian(values_N, strength=STRENGTH):
    """(I - block averages) / strength, from the sequential algorithm's blocks."""
    _, blocks_N = sequential_soft_rank(values_N, strength)
    same_NxN = blocks_N[:, None] == blocks_N[None, :]
    return (np.eye(len(blocks_N)) - same_NxN / same_NxN.sum(1, keepdims=True)) / strength


@functools.cache
def compiled(strength):
    return jax.jit(functools.partial(ranking.soft_rank, strength=strength))


soft_rank = compiled(STRENGTH)
soft_rank_jacobian = {mode: jax.jit(mode(soft_rank)) for mode in (jax.jacfwd, jax.jacrev)}


@functools.cache
def compiled_spearman(strength):
    return jax.jit(functools.partial(ranking.soft_spearman, strength=strength))


def rows(n, strength=STRENGTH):
    """Random, tied, constant and sorted rows, and cascades, in an order the sorting has to undo."""
    random = np.random.RandomState(n)
    steps_N = np.arange(n, dtype=float)
    # Gaps just above the strength leave every element a block of its own until a tie at one end
    # draws the nearest in, which makes the next one due, and so on one by one.
    cascade_N = -strength * 1.001 * np.minimum(steps_N, n // 2)
    special = [
        random.permutation(cascade_N),
        random.permutation(-cascade_N),
        0.6 * strength * steps_N,
        -1.5 * strength * steps_N,
        np.full(n, -7.0),
        random.randint(0, 3, n).astype(float),
        random.randint(0, n, n) * strength,  # ties, and gaps exactly at the kink
    ]
    return np.stack([scale * random.randn(n) for scale in (0.01, 0.3, 1, 3, 30)] + special)


def partly_pooled(n):
    """One row with pooled elements and single ones, away from any kink."""
    values_N = np.random.RandomState(1).randn(n) * n / 6
    _, sizes = np.unique(sequential_soft_rank(values_N, STRENGTH)[1], return_counts=True)
    assert sizes.min() == 1
    assert sizes.max() > 1
    return values_N


@pytest.mark.parametrize(("n", "strength"), [*((n, STRENGTH) for n in SIZES), (8, 2.0)])
def test_soft_rank_equals_the_sequential_isotonic_regression(n, strength):
    values_RxN = rows(n, strength)
    found = compiled(strength)(values_RxN)
    np.testing.assert_allclose(found, sequential_rows(values_RxN, strength), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", SIZES)
def test_soft_ranks_lie_between_1_and_n_and_sum_to_that_of_all_ranks(n):
    found = np.asarray(soft_rank(rows(n)))
    np.testing.assert_allclose(found.sum(1), np.full(len(found), n * (n + 1) / 2), rtol=1e-12)
    assert found.min() > 1 - 1e-9
    assert found.max() < n + 1e-9


@pytest.mark.parametrize(("n", "dense"), [(8, 0), (130, 1000)])
def test_soft_rank_is_the_same_by_comparison_and_by_search(monkeypatch, n, dense):
    values_RxN = rows(n)
    monkeypatch.setattr(ranking, "_DENSE", dense)
    # A new function: the compiled one would still be that of the other path.
    found = jax.jit(lambda values: ranking.soft_rank(values, strength=STRENGTH))(values_RxN)
    np.testing.assert_allclose(found, sequential_rows(values_RxN), rtol=0, atol=1e-9)
    np.testing.assert_allclose(found, soft_rank(values_RxN), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], [1.0]),
        ([0.0, 0.2], [1.3, 1.7]),  # closer than the strength: 1.5 -+ 0.2 / 2 / 0.5
        ([0.2, 0.0], [1.7, 1.3]),
        ([0.0, 0.7], [1.0, 2.0]),
        ([3.0, 2.5], [2.0, 1.0]),  # at the kink both formulas agree
        ([1.0, 1.0], [1.5, 1.5]),
    ],
)
def test_soft_rank_of_one_and_of_two_by_hand(values, expected):
    np.testing.assert_allclose(soft_rank(np.float64(values)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], [[0.0]]),
        ([0.0, 0.2], [[1.0, -1.0], [-1.0, 1.0]]),  # 1 / 2 / 0.5
        ([0.0, 0.7], [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_soft_rank_jacobian_of_one_and_of_two_by_hand(values, expected):
    found = soft_rank_jacobian[jax.jacrev](np.float64(values))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_soft_rank_of_large_strength_is_the_values_up_to_scale_and_shift():
    values_RxN = np.random.RandomState(0).randn(12, 8)
    expected = 4.5 + (values_RxN - values_RxN.mean(1, keepdims=True)) / 100
    np.testing.assert_allclose(compiled(100.0)(values_RxN), expected, rtol=1e-12)


def test_soft_rank_of_small_strength_is_the_average_rank():
    random = np.random.RandomState(0)
    values_RxN = np.concatenate([random.randn(6, 8), random.randint(0, 5, (6, 8))])
    expected = scipy.stats.rankdata(values_RxN, method="average", axis=1)
    np.testing.assert_allclose(compiled(1e-6)(values_RxN), expected, rtol=1e-8)


def test_soft_spearman_of_large_strength_is_pearson_with_the_ranks():
    random = np.random.RandomState(1)
    values_RxN, targets_RxN = random.randn(12, 8), random.randint(0, 6, (12, 8)).astype(float)
    ranks_RxN = scipy.stats.rankdata(targets_RxN, axis=1)
    expected = scipy.stats.pearsonr(values_RxN, ranks_RxN, axis=1).statistic
    # The constant in the denominator is not quite nothing against ranks this close together.
    np.testing.assert_allclose(
        compiled_spearman(100.0)(values_RxN, targets_RxN), expected, rtol=1e-6, atol=1e-8
    )


def test_soft_spearman_of_small_strength_is_spearmans_correlation():
    random = np.random.RandomState(2)
    plain = random.randn(2, 6, 8)
    tied = random.randint(0, 5, (2, 6, 8)).astype(float)
    values_RxN, targets_RxN = np.concatenate([plain, tied, [plain[0], tied[1]]], axis=1)
    expected = [
        scipy.stats.spearmanr(value_N, target_N).statistic
        for value_N, target_N in zip(values_RxN, targets_RxN, strict=True)
    ]
    found = compiled_spearman(1e-6)(values_RxN, targets_RxN)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


def test_soft_spearman_of_z_scores_does_not_see_a_positive_affine_map():
    random = np.random.RandomState(3)
    logits_RxN, targets_RxN = random.randn(12, 8), random.randn(12, 8)
    z_RxN = scipy.stats.zscore(logits_RxN, axis=1, ddof=1)
    target_ranks_RxN = scipy.stats.rankdata(targets_RxN, axis=1)
    expected = scipy.stats.pearsonr(sequential_rows(z_RxN, 0.1), target_ranks_RxN, axis=1).statistic
    function = jax.jit(
        lambda logits: ranking.soft_spearman(
            correlation.z_scores(logits), targets_RxN, strength=0.1
        )
    )
    for scale, shift in [(1.0, 0.0), (0.03, 5.0), (1e4, -2e5)]:
        np.testing.assert_allclose(function(scale * logits_RxN + shift), expected, atol=1e-4)


def test_soft_spearman_passes_no_gradient_to_its_targets():
    random = np.random.RandomState(4)
    values_RxN, targets_RxN = random.randn(2, 12, 8)
    total = jax.jit(jax.grad(lambda t: compiled_spearman(100.0)(values_RxN, t).sum()))
    np.testing.assert_array_equal(total(targets_RxN), np.zeros((12, 8)))


@pytest.mark.parametrize(("mode", "n"), [(jax.jacfwd, 7), (jax.jacrev, 7), (jax.jacrev, 33)])
def test_soft_rank_jacobian_is_identity_minus_block_averages(mode, n):
    tied_N = 0.3137 * np.round(partly_pooled(n) / 0.3137)  # commensurate with no kink
    assert len(set(tied_N)) < n
    for values_N in (partly_pooled(n), tied_N):
        found = np.asarray(soft_rank_jacobian[mode](values_N))
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, found.T, atol=1e-12)
        np.testing.assert_allclose(found, jacobian(values_N), atol=1e-12)


@pytest.mark.parametrize("n", [7, 33])
def test_soft_rank_jacobian_equals_finite_differences(n):
    values_N, step = partly_pooled(n), 1e-6
    shifts_NxN = step * np.eye(n)
    above_NxN, below_NxN = (sequential_rows(values_N + sign * shifts_NxN) for sign in (1, -1))
    differences_NxN = (above_NxN - below_NxN).T / (2 * step)
    found = soft_rank_jacobian[jax.jacrev](values_N)
    np.testing.assert_allclose(found, differences_NxN, atol=1e-6)


def quadratic_of_ranks(n, weights_NxN):
    def function(values_N):
        ranks_N = soft_rank(values_N)
        return ranks_N @ weights_NxN @ ranks_N / 2

    return function


def test_soft_rank_can_be_differentiated_forward_over_reverse():
    n, step = 7, 1e-6
    random = np.random.RandomState(5)
    weights_NxN, direction_N = random.randn(n, n), random.randn(n)
    values_N = partly_pooled(n)
    gradient = jax.jit(jax.grad(quadratic_of_ranks(n, weights_NxN)))
    _, found = jax.jit(lambda v, t: jax.jvp(gradient, (v,), (t,)))(values_N, direction_N)
    above_N, below_N = (gradient(values_N + sign * step * direction_N) for sign in (1, -1))
    np.testing.assert_allclose(found, (above_N - below_N) / (2 * step), atol=1e-6)
    jacobian_NxN = jacobian(values_N)
    curvature_NxN = jacobian_NxN.T @ (weights_NxN + weights_NxN.T) / 2 @ jacobian_NxN
    np.testing.assert_allclose(found, curvature_NxN @ direction_N, atol=1e-9)


def test_soft_rank_can_be_linearised_and_transposed():
    n = 7
    values_N, (tangent_N, cotangent_N) = partly_pooled(n), np.random.RandomState(6).randn(2, n)

    @jax.jit
    def both(values_N, tangent_N, cotangent_N):
        ranks_N, pushforward = jax.linearize(soft_rank, values_N)
        (pulled_N,) = jax.linear_transpose(pushforward, values_N)(cotangent_N)
        return ranks_N, pushforward(tangent_N), pulled_N

    ranks_N, pushed_N, pulled_N = both(values_N, tangent_N, cotangent_N)
    np.testing.assert_allclose(ranks_N, sequential_soft_rank(values_N, STRENGTH)[0], atol=1e-9)
    np.testing.assert_allclose(pushed_N, jacobian(values_N) @ tangent_N, atol=1e-9)
    np.testing.assert_allclose(pulled_N, jacobian(values_N).T @ cotangent_N, atol=1e-9)


def test_soft_rank_takes_any_leading_axes():
    values_AxBxN = np.random.RandomState(7).randn(2, 3, 7)
    expected = sequential_rows(values_AxBxN.reshape(6, 7)).reshape(2, 3, 7)
    np.testing.assert_allclose(soft_rank(values_AxBxN), expected, atol=1e-9)


def test_soft_rank_under_vmap_ranks_every_row():
    values_AxBxN = np.random.RandomState(8).randn(2, 3, 7)
    found = jax.jit(jax.vmap(jax.vmap(soft_rank), in_axes=1, out_axes=1))(values_AxBxN)
    expected = sequential_rows(values_AxBxN.reshape(6, 7)).reshape(2, 3, 7)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_soft_rank_is_the_same_without_jit():
    values_N = np.float64([[0.0, 0.7], [0.2, 0.0]])
    found = ranking.soft_rank(values_N, strength=STRENGTH)
    np.testing.assert_allclose(found, soft_rank(values_N), atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_soft_rank_of_small_floats_is_computed_in_float32(dtype):
    values_RxN = jnp.asarray(np.random.RandomState(9).randn(12, 8), dtype)
    found = soft_rank(values_RxN)
    assert found.dtype == jnp.float32
    # Of the very values: rounding them would move ranks by far more.
    np.testing.assert_allclose(found, sequential_rows(values_RxN), atol=1e-4)


def test_soft_rank_in_float32_survives_values_far_beyond_the_strength():
    signs = np.random.RandomState(10).choice([-1.0, 0.0, 1.0], (9, 8))
    values_RxN = 1e6 * np.concatenate([signs, np.full((1, 8), -1), np.eye(8)[:2]])
    expected = scipy.stats.rankdata(values_RxN, axis=1)
    np.testing.assert_allclose(soft_rank(np.float32(values_RxN)), expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [6e4, 1e8])
def test_soft_rank_in_float32_does_not_see_an_offset(offset):
    # 16 apart: float32 holds the sums exactly.
    values_N = np.float32([16, 0, 32, 16, 16, 112, 96, 0])
    found = compiled(8.0)(values_N + np.float32(offset))
    np.testing.assert_allclose(found, sequential_soft_rank(values_N, 8.0)[0], atol=1e-4)


def test_soft_rank_in_float32_holds_for_21_000_classes():
    n = 21_000
    random = np.random.RandomState(11)
    values_RxN = np.stack([random.randn(n), np.round(random.randn(n), 2)]).astype(np.float32)
    strength = 3 / n
    with jax.enable_x64(False):
        found = compiled(strength)(values_RxN)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, sequential_rows(values_RxN, strength), rtol=0, atol=0.01)


def test_soft_spearman_leaves_as_many_classes_without_a_gradient_as_was_measured():
    n, strength = 1000, 0.003
    random = np.random.RandomState(12)
    z_N = scipy.stats.zscore(random.randn(n), ddof=1)
    targets_N = random.randn(n)
    # Values three times as large stand for a strength of 1 / n, tiny ones for a strength of 1.
    values_RxN = np.outer([1, 3, strength], z_N)
    targets_RxN = np.broadcast_to(targets_N, values_RxN.shape)
    gradient = jax.jit(
        jax.grad(lambda v: ranking.soft_spearman(v, targets_RxN, strength=strength).sum())
    )
    weak, weaker, pearson = (np.asarray(gradient(values_RxN)) == 0).mean(1)
    assert 0.05 < weak < 0.25
    assert 0.4 < weaker < 0.7
    assert pearson == 0
    single = [
        (np.unique(sequential_soft_rank(row_N, strength)[1], return_counts=True)[1] == 1).sum()
        for row_N in values_RxN
    ]
    np.testing.assert_array_equal([weak * n, weaker * n, pearson * n], single)


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_soft_rank_raises_at_a_strength_that_is_not_positive(strength):
    with pytest.raises(ValueError, match=rf"strength={strength}: must be > 0"):
        ranking.soft_rank(np.ones(3), strength=strength)


@pytest.mark.parametrize("rank", [ranking.hard_rank, soft_rank])
@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_ranks_raise_where_there_is_nothing_to_rank(rank, shape):
    said = rf"values_XxN has shape {shape}; expected something to rank".replace("(", r"\(")
    with pytest.raises(ValueError, match=said.replace(")", r"\)")):
        rank(np.ones(shape))


def test_hard_rank_is_the_average_rank():
    random = np.random.RandomState(13)
    values_AxBxN = np.concatenate([random.randn(1, 3, 9), random.randint(0, 4, (2, 3, 9))])
    found = ranking.hard_rank(values_AxBxN)
    assert found.dtype == jnp.float64
    np.testing.assert_array_equal(found, scipy.stats.rankdata(values_AxBxN, axis=-1))


def test_hard_rank_of_bfloat16_is_float32():
    # Beyond 256 bfloat16 has no odd integers: ranks in it would be wrong.
    values_N = np.random.RandomState(14).permutation(1000) - 500
    values = jnp.asarray(values_N / 64, jnp.bfloat16)
    found = ranking.hard_rank(values)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, scipy.stats.rankdata(np.float32(values)))


def test_hard_rank_has_no_gradient():
    found = jax.grad(lambda v: ranking.hard_rank(v) @ np.arange(5.0))(np.float64([3, 1, 1, 2, 0]))
    np.testing.assert_array_equal(found, np.zeros(5))


def test_pearson_equals_scipy():
    a_AxBxN, b_AxBxN = np.random.RandomState(15).randn(2, 2, 3, 9)
    found = ranking.pearson(a_AxBxN + 5, b_AxBxN)
    assert found.shape == (2, 3)
    for at in itertools.product(range(2), range(3)):
        expected = scipy.stats.pearsonr(a_AxBxN[at], b_AxBxN[at]).statistic
        np.testing.assert_allclose(found[at], expected, rtol=1e-8)


def test_pearson_of_hardly_varying_values_shows_the_constant_in_the_denominator():
    values = 1e-4 * np.float64([-1, 0, 1])
    # <v, v> = |v| |v| = 2e-8 against 1e-8.
    np.testing.assert_allclose(ranking.pearson(values, values), 2 / 3, rtol=1e-9)


@pytest.mark.parametrize("constant", ["left", "right", "both"])
def test_pearson_with_a_constant_is_zero_with_a_finite_gradient(constant):
    varying, flat = np.float64([1, 2, 4]), np.full(3, 2.0)
    a = varying if constant == "right" else flat
    b = varying if constant == "left" else flat
    value, gradients = jax.jit(jax.value_and_grad(ranking.pearson, (0, 1)))(a, b)
    assert value == 0
    assert np.isfinite(gradients).all()
