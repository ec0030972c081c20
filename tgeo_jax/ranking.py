"""Ranks: hard ones, differentiable ones, and Spearman's correlation of either.

A soft rank is the projection of `values / strength` onto the permutahedron, which is one isotonic
regression of the sorted values. Where the regression pools neighbours into a block their ranks are
the mean rank of the block plus their deviation from its mean value; elsewhere ranks are integers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tgeo_jax import numeric

Array = jax.Array
_DENSE = 32  # halves up to this size are merged by comparing all pairs


def soft_rank(values_XxN: Array, *, strength: float) -> Array:
    """Differentiable ascending ranks, 1 for the smallest value and n for the largest.

    `ranks = argmin_{mu in P(1..n)} ||mu - values / strength||^2`, P the permutahedron, the convex
    hull of all orders of 1..n. With `strength` small they are the hard ranks, with `strength` large
    `values / strength` plus a constant. Within a block of pooled values,
    `rank_i = mean rank of the block + (value_i - mean value of the block) / strength`.

    Exact, with static shapes, in O(n log^2 n) work and O(log^2 n) depth: the isotonic regression
    pools halves recursively, all of one size at once, where the sequential algorithm would take 2n
    steps one after another. The block structure carries no derivative, so the Jacobian is that of
    the formula above: `(I - block averages) / strength`, symmetric, in either mode and under both.

    Args:
        values_XxN: any leading axes; ranks along the last. At least float32 is used.
        strength: regularisation, > 0, in units of the values. In float32 ties are kept where the
            spread of the values is less than some 10^7 times it.

    Returns:
        ranks_XxN in [1, n], summing up to n (n + 1) / 2.

    Raises:
        ValueError: strength <= 0, or no axis to rank along.

    References:
        Blondel, Teboul, Berthet, Djolonga 2020, "Fast Differentiable Sorting and Ranking"
        (arXiv 2002.08871), propositions 3 and 4, with quadratic regularisation.

    Examples:
        >>> values = jnp.array([0.3, 0.1, 0.9])
        >>> print(soft_rank(values, strength=0.1))
        [2. 1. 3.]
        >>> print(soft_rank(values, strength=10.0).round(3))  # 2 + (values - mean) / 10
        [1.987 1.967 2.047]
    """
    if not strength > 0:
        raise ValueError(f"strength={strength}: must be > 0; about 3/n for z-scored values")
    values_XxN = _rankable(values_XxN)
    # Ranks do not know of an offset, but the rounding of values / strength does.
    values_XxN -= jax.lax.stop_gradient(values_XxN.mean(axis=-1, keepdims=True))
    n = values_XxN.shape[-1]
    order_XxN = jnp.argsort(jax.lax.stop_gradient(values_XxN), axis=-1, descending=True)
    sorted_XxN = jnp.take_along_axis(values_XxN, order_XxN, axis=-1)
    permutahedron_N = jnp.arange(n, 0, -1, dtype=values_XxN.dtype)
    start_XxN, end_XxN = _pooled_blocks(
        jax.lax.stop_gradient(sorted_XxN) / strength
        - jnp.broadcast_to(permutahedron_N, order_XxN.shape)
    )
    deviation_XxN = sorted_XxN - _block_means(sorted_XxN, start_XxN, end_XxN)
    mean_rank_XxN = n - (start_XxN + end_XxN).astype(values_XxN.dtype) / 2
    ranks_XxN = mean_rank_XxN + deviation_XxN / strength
    return jnp.take_along_axis(ranks_XxN, jnp.argsort(order_XxN, axis=-1), axis=-1)


def hard_rank(values_XxN: Array) -> Array:
    """Ascending ranks, ties sharing the mean of theirs; no derivative.

    `rank_i = 1 + #{j: v_j < v_i} + (#{j: v_j = v_i} - 1) / 2`

    Args:
        values_XxN: any leading axes; ranks along the last.

    Returns:
        ranks_XxN in [1, n], at least float32.

    Raises:
        ValueError: no axis to rank along.

    References:
        Kendall 1945, "The treatment of ties in ranking problems".

    Examples:
        >>> print(hard_rank(jnp.array([5., 1., 5., 7.])))
        [2.5 1.  2.5 4. ]
    """
    values_XxN = jax.lax.stop_gradient(_rankable(values_XxN))
    rows = values_XxN.reshape(-1, values_XxN.shape[-1])

    def of_row(row_N: Array) -> Array:
        sorted_N = jnp.sort(row_N)
        below, up_to = (jnp.searchsorted(sorted_N, row_N, side=side) for side in ("left", "right"))
        return (below + up_to + 1).astype(row_N.dtype) / 2

    return jax.vmap(of_row)(rows).reshape(values_XxN.shape)


def pearson(a_XxN: Array, b_XxN: Array) -> Array:
    """Pearson's correlation along the last axis; 0 where either side is constant.

    `rho = <a - mean a, b - mean b> / (|a - mean a| |b - mean b| + 1e-8)`

    Args:
        a_XxN: any leading axes.
        b_XxN: of the same shape.

    Returns:
        rho_X in [-1, 1].

    References:
        Huang et al. 2022 (DIST, arXiv 2205.10536), for the constant in the denominator.

    Examples:
        >>> print(pearson(jnp.array([1., 2., 3.]), jnp.array([1., 2., 4.])).round(4))
        0.982
    """
    a_XxN, b_XxN = (v - v.mean(axis=-1, keepdims=True) for v in (a_XxN, b_XxN))
    norms_X = [numeric.safe_sqrt(jnp.sum(jnp.square(v), axis=-1)) for v in (a_XxN, b_XxN)]
    return jnp.sum(a_XxN * b_XxN, axis=-1) / (norms_X[0] * norms_X[1] + 1e-8)


def soft_spearman(values_XxN: Array, targets_XxN: Array, *, strength: float) -> Array:
    """Spearman's correlation of soft ranks with the hard ranks of the targets.

    `rho = pearson(soft_rank(values), hard_rank(targets))`; differentiable in the values only.

    Args:
        values_XxN: any leading axes.
        targets_XxN: of the same shape.
        strength: of the soft rank. Large: rho is Pearson's correlation of the values with the
            targets' ranks. Small: Spearman's correlation, without a derivative.

    Returns:
        rho_X in [-1, 1].

    Raises:
        ValueError: strength <= 0.

    Examples:
        >>> a, b = jnp.array([0.1, 0.4, 0.2]), jnp.array([5., 7., 9.])
        >>> print(soft_spearman(a, b, strength=0.01).round(4))
        0.5
    """
    return pearson(soft_rank(values_XxN, strength=strength), hard_rank(targets_XxN))


def _rankable(values: Array) -> Array:
    values = jnp.asarray(values)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values_XxN has shape {values.shape}; expected something to rank")
    return numeric.at_least_float32(values)


def _pooled_blocks(targets_XxN: Array) -> tuple[Array, Array]:
    """First and last index of each element's block in the nonincreasing isotonic regression.

    Halves of 1, 2, 4, ... elements are merged. Two nonincreasing halves merge by pooling the left
    elements below some value v with the right ones above it, v being the mean of what is pooled:
    the root of the decreasing function
    `f(v) = sum_left min(x - v, 0) + sum_right max(x - v, 0)`. Whether an element is pooled is
    the sign of f at its own value, so all elements decide at once.
    """
    n = targets_XxN.shape[-1]
    leading = targets_XxN.shape[:-1]
    size = 1 << (n - 1).bit_length()
    # Padding continues downwards, so nothing is ever pooled with it.
    floor_Xx1 = targets_XxN.min(axis=-1, keepdims=True)
    step_Xx1 = 1 + jnp.abs(floor_Xx1) / 1024  # one that float32 can see at that magnitude
    below_P = jnp.arange(1, size - n + 1, dtype=targets_XxN.dtype)
    padding_XxP = floor_Xx1 - step_Xx1 * jnp.broadcast_to(below_P, (*leading, size - n))
    values = jnp.concatenate([targets_XxN, padding_XxP], axis=-1)
    start = end = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), values.shape)
    half = 1
    while half < size:
        halves = [part.reshape(-1, 2, half) for part in (values, start, end)]
        merged = _merge(halves[0], halves[1], halves[2], size)
        values, start, end = (part.reshape(*leading, size) for part in merged)
        half *= 2
    return start[..., :n], end[..., :n]


def _merge(
    values_Rx2xM: Array, start_Rx2xM: Array, end_Rx2xM: Array, size: int
) -> tuple[Array, Array, Array]:
    """One level of `_pooled_blocks`: R pairs of halves of M elements become R blocks of 2M."""
    rows, _, half = values_Rx2xM.shape
    first_Rx1 = (jnp.arange(rows, dtype=jnp.int32) * 2 * half % size)[:, None]
    middle_Rx1 = first_Rx1 + half
    if half <= _DENSE:
        excess = _excess_by_comparison(values_Rx2xM)
    else:
        beyond_Rx2xM = jnp.stack(
            [middle_Rx1 - 1 - end_Rx2xM[:, 0], start_Rx2xM[:, 1] - middle_Rx1], axis=1
        )
        excess = _excess_by_search(values_Rx2xM, beyond_Rx2xM)
    from_left_Rx1 = jnp.sum(excess[0] > 0, axis=-1, keepdims=True, dtype=jnp.int32)
    from_right_Rx1 = jnp.sum(excess[1] < 0, axis=-1, keepdims=True, dtype=jnp.int32)
    low_Rx1, high_Rx1 = middle_Rx1 - from_left_Rx1, middle_Rx1 + from_right_Rx1 - 1
    position_RxL = first_Rx1 + jnp.arange(2 * half, dtype=jnp.int32)[None, :]
    pooled_RxL = (position_RxL >= low_Rx1) & (position_RxL <= high_Rx1)
    values, start, end = (part.reshape(rows, -1) for part in (values_Rx2xM, start_Rx2xM, end_Rx2xM))
    count_Rx1 = jnp.maximum(from_left_Rx1 + from_right_Rx1, 1)
    mean_Rx1 = jnp.sum(jnp.where(pooled_RxL, values, 0), axis=-1, keepdims=True) / count_Rx1
    return (
        jnp.where(pooled_RxL, mean_Rx1, values),
        jnp.where(pooled_RxL, low_Rx1, start),
        jnp.where(pooled_RxL, high_Rx1, end),
    )


def _excess_by_comparison(values_Rx2xM: Array) -> tuple[Array, Array]:
    """f at every element of the left and of the right half, from all pairs: quick for small M."""

    def excess(x_RxM: Array) -> Array:
        left_RxMxM, right_RxMxM = (
            values_Rx2xM[:, side, None, :] - x_RxM[:, :, None] for side in (0, 1)
        )
        return jnp.sum(jnp.minimum(left_RxMxM, 0) + jnp.maximum(right_RxMxM, 0), axis=-1)

    return excess(values_Rx2xM[:, 0]), excess(values_Rx2xM[:, 1])


def _excess_by_search(values_Rx2xM: Array, beyond_Rx2xM: Array) -> tuple[Array, Array]:
    """The same from sums outwards from the boundary and binary search.

    `beyond_Rx2xM` counts the elements between an element's own block and the boundary. Elements of
    one block are given the same numbers, so that rounding cannot split them.
    """
    left, right = values_Rx2xM[:, 0, ::-1], values_Rx2xM[:, 1]  # both beginning at the boundary
    left_sums, right_sums = (
        jnp.pad(jnp.cumsum(part, axis=-1), ((0, 0), (1, 0))) for part in (left, right)
    )
    search = jax.vmap(lambda sorted_M, x: jnp.searchsorted(sorted_M, x, side="left"))

    def excess(x_RxM: Array, below_RxM: Array, above_RxM: Array) -> Array:
        low = jnp.take_along_axis(left_sums, below_RxM, axis=-1) - below_RxM * x_RxM
        high = jnp.take_along_axis(right_sums, above_RxM, axis=-1) - above_RxM * x_RxM
        return low + high

    of_left = values_Rx2xM[:, 0]
    return (
        excess(of_left, beyond_Rx2xM[:, 0], search(-right, -of_left)),
        excess(right, search(left, right), beyond_Rx2xM[:, 1]),
    )


def _block_means(values_XxN: Array, start_XxN: Array, end_XxN: Array) -> Array:
    """Mean over each element's block; linear in the values.

    A segmented scan, not differences of one cumulative sum: those lose the small blocks to the
    rounding of everything before them, and scattered sums are not reproducible on every device.
    """
    position_N = jnp.arange(values_XxN.shape[-1], dtype=start_XxN.dtype)
    is_start_XxN = start_XxN == jnp.broadcast_to(position_N, start_XxN.shape)

    def combine(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], b[1] + jnp.where(b[0], 0, a[1])

    axis = values_XxN.ndim - 1
    _, sums_XxN = jax.lax.associative_scan(combine, (is_start_XxN, values_XxN), axis=axis)
    totals_XxN = jnp.take_along_axis(sums_XxN, end_XxN, axis=-1)
    return totals_XxN / (end_XxN - start_XxN + 1)
