"""Gradients of an outer loss through inner optimiser steps. Knows nothing of distillation.

With inner parameters p, meta-parameters m and an optimiser whose update is U,

    p' = p + U(grad_p inner(p, m)),      meta-gradient = d outer(p') / d m.

Estimators, exact unless said:
  mixed: v = grad outer(p'); w = U^T v by `vjp` through the optimiser's update alone, so that
    momentum, weight decay, clipping and Adam need no special case; then one forward-mode pass of
    `grad_m inner(., m)` along w, sharing the residuals of the inner gradient.
  reverse: `jax.grad` over the whole step. The definition, and the oracle in tests.
  finite_difference: DARTS's central difference along w, for comparison. It evaluates the inner
    loss at p +- eps w, so it also sees through `stop_gradient`: whatever must stay fixed has to
    be computed outside the inner loss.
`mixed` needs forward-mode derivatives of the inner loss: a function with `jax.custom_vjp` and no
`custom_jvp` in it wants `reverse`.

References: one-step unrolling as in DARTS (arXiv 1806.09055, equations 7 and 8) and
Meta-Weight-Net (arXiv 1902.07379); mixed-mode products as in Pearlmutter 1994.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
ESTIMATORS = ("mixed", "reverse", "finite_difference")
# DARTS's choice: the perturbation eps * w has this norm.
_FINITE_DIFFERENCE_NORM = 0.01


class OneStep(NamedTuple):
    """Result of one bilevel update; `params` and `opt_state` are after the inner step(s)."""

    meta_grads: PyTree
    params: PyTree
    opt_state: PyTree
    inner_value: jax.Array
    outer_value: jax.Array
    inner_aux: Any
    outer_aux: Any


class Forward(NamedTuple):
    """A network's outputs at some parameters, and the linear map from their tangents."""

    outputs: PyTree
    aux: Any
    pushforward: Callable[[PyTree], PyTree]  # parameter tangents -> output tangents


def one_step(
    inner_loss: Callable[[PyTree, PyTree], Any],
    outer_loss: Callable[[PyTree], Any],
    params: PyTree,
    meta_params: PyTree,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree,
    *,
    estimator: str = "mixed",
    has_aux: bool = False,
) -> OneStep:
    """Takes one inner step and differentiates the outer loss through it.

    `meta_grads = d/dm outer(p + U(grad_p inner(p, m)))`. Costs, in forward passes of the inner
    network with equal batches: 8 (mixed, reverse) against 3 for the inner step alone.

    Args:
        inner_loss: (params, meta_params) -> scalar, or (scalar, aux) with `has_aux`.
        outer_loss: params -> scalar, or (scalar, aux) with `has_aux`.
        params: inner parameters before the step.
        meta_params: what the inner loss is parametrised by.
        optimizer: any optax transformation. Adam from a cold state makes the meta-gradient an
            artefact of its epsilon: warm it up, and give it `eps_root > 0`.
        opt_state: its state before the step.
        estimator: `mixed`, `reverse` or `finite_difference`, see the module's docstring.
        has_aux: whether both losses return auxiliary values.

    Returns:
        A `OneStep`; aux fields are None without `has_aux`.

    Raises:
        ValueError: an unknown estimator.

    References:
        TGeo-KD (arXiv 2312.15112), bilevel objective; DARTS (arXiv 1806.09055), equation 7.

    Examples:
        >>> inner = lambda p, m: 0.5 * (p - m) ** 2      # p' = p - 0.1 (p - m)
        >>> outer = lambda p: p                          # d p' / d m = 0.1
        >>> sgd = optax.sgd(0.1)
        >>> result = one_step(inner, outer, 1.0, 3.0, sgd, sgd.init(1.0))
        >>> print(result.meta_grads.round(4), result.params.round(4))
        0.1 1.2
    """
    _check_estimator(estimator)
    inner, outer = _with_aux(inner_loss, has_aux), _with_aux(outer_loss, has_aux)
    if estimator == "reverse":
        return _one_step_reverse(inner, outer, params, meta_params, optimizer, opt_state)

    def value_and_meta_grads(p: PyTree) -> tuple[tuple[jax.Array, PyTree], Any]:
        (value, aux), grads = jax.value_and_grad(inner, argnums=1, has_aux=True)(p, meta_params)
        return (value, grads), aux

    # One linearisation serves twice: transposed it is the inner gradient, applied to w it is the
    # meta-gradient. That is what keeps the price at 8 forward passes without relying on CSE.
    (value, _), pushforward, inner_aux = jax.linearize(value_and_meta_grads, params, has_aux=True)
    (grads,) = jax.linear_transpose(lambda t: pushforward(t)[0], params)(jnp.ones_like(value))
    new_params, pull_back, new_opt_state = jax.vjp(
        lambda g: _apply(optimizer, g, opt_state, params), grads, has_aux=True
    )
    (outer_value, outer_aux), cotangent = jax.value_and_grad(outer, has_aux=True)(new_params)
    (direction,) = pull_back(cotangent)
    if estimator == "mixed":
        meta_grads = pushforward(direction)[1]
    else:
        meta_grads = _central_difference(inner, params, meta_params, direction)
    return OneStep(meta_grads, new_params, new_opt_state, value, outer_value, inner_aux, outer_aux)


def unrolled(
    inner_loss: Callable[[PyTree, PyTree, PyTree], Any],
    outer_loss: Callable[[PyTree], Any],
    params: PyTree,
    meta_params: PyTree,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree,
    batches: PyTree,
    *,
    estimator: str = "mixed",
) -> OneStep:
    """Takes K inner steps by `lax.scan` and differentiates the outer loss through all of them.

    `mixed` keeps the trajectory (K copies of parameters and optimiser state) and walks it
    backwards: at each step the optimiser's update is transposed, and one forward-over-reverse
    pass gives both the meta-gradient's share and the Hessian-vector product for the step before.

    Args:
        inner_loss: (params, meta_params, batch) -> scalar.
        outer_loss: params -> scalar.
        params: inner parameters before the first step.
        meta_params: what the inner loss is parametrised by.
        optimizer: any optax transformation.
        opt_state: its state before the first step.
        batches: pytree whose leaves have a leading axis K, one slice a step.
        estimator: `mixed`, `reverse` or `finite_difference`.

    Returns:
        A `OneStep` after K steps; `inner_value` is the mean inner loss, aux fields are None.

    Raises:
        ValueError: an unknown estimator.

    References:
        Truncated backpropagation through the inner optimisation, Shaban et al. 2019
        (arXiv 1810.10667).

    Examples:
        >>> inner = lambda p, m, batch: 0.5 * (p - m) ** 2
        >>> sgd = optax.sgd(0.1)
        >>> result = unrolled(inner, lambda p: p, 1.0, 3.0, sgd, sgd.init(1.0), jnp.zeros(2))
        >>> print(result.meta_grads.round(4))             # 1 - 0.9 ** 2
        0.19
    """
    _check_estimator(estimator)

    def after_steps(m: PyTree) -> tuple[jax.Array, tuple]:
        p, s, history = _trajectory(inner_loss, params, m, optimizer, opt_state, batches)
        return outer_loss(p), (p, s, history[2])

    if estimator == "reverse":
        grad = jax.value_and_grad(after_steps, has_aux=True)
        (outer_value, (p, s, values)), meta_grads = grad(meta_params)
    else:
        p, s, history = _trajectory(inner_loss, params, meta_params, optimizer, opt_state, batches)
        outer_value, cotangent = jax.value_and_grad(outer_loss)(p)
        values = history[2]
        meta_grads = _walk_back(
            inner_loss, cotangent, s, meta_params, optimizer, history, batches, estimator
        )
    return OneStep(meta_grads, p, s, jnp.mean(values), outer_value, None, None)


def forward(apply: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree) -> Forward:
    """Runs a network once and keeps what is needed to differentiate it later, both ways.

    Args:
        apply: params -> (outputs, aux).
        params: where to evaluate and linearise.

    Returns:
        A `Forward`. It is a pytree: it can leave a jitted function or ride in a scan's carry.

    Examples:
        >>> done = forward(lambda p: (p**2, None), 3.0)
        >>> print(done.outputs, done.pushforward(1.0))
        9.0 6.0
    """
    outputs, pushforward, aux = jax.linearize(apply, params, has_aux=True)
    return Forward(outputs, aux, pushforward)


def prequential(
    inner_loss: Callable[[PyTree, PyTree], tuple[jax.Array, Any]],
    outer_loss: Callable[[PyTree], tuple[jax.Array, Any]],
    current: Forward,
    next_apply: Callable[[PyTree], tuple[PyTree, Any]],
    params: PyTree,
    meta_params: PyTree,
    optimizer: optax.GradientTransformation,
    opt_state: PyTree,
    *,
    when: bool | jax.Array = True,
) -> tuple[OneStep, Forward]:
    """One step whose outer batch is the next inner batch, so that its forward pass is reused.

    The same meta-gradient as `one_step(estimator="mixed")` with
    `outer(p') = outer_loss(next_apply(p'))`, at 7 forward passes instead of 8: hand the returned
    `Forward` to the next call as `current`. The objective differs from a held-out one: the
    outer loss is the progressive (prequential) training loss.

    Args:
        inner_loss: (outputs, meta_params) -> (scalar, aux); outputs are the network's.
        outer_loss: outputs on the next batch -> (scalar, aux).
        current: `forward` of this batch at `params`.
        next_apply: params -> (outputs, aux) on the next batch.
        params: inner parameters before the step.
        meta_params: what the inner loss is parametrised by.
        optimizer: any optax transformation.
        opt_state: its state before the step.
        when: whether to compute the meta-gradient; zeros otherwise. May be traced.

    Returns:
        The `OneStep` and the `Forward` of the next batch at the new parameters.

    References:
        Dawid 1984, "Present position and potential developments: the prequential approach", for
        the objective; the reuse of the forward pass is ours.

    Examples:
        >>> sgd = optax.sgd(0.1)
        >>> loss = lambda p, m: (0.5 * (p - m) ** 2, None)
        >>> apply = lambda p: (p, None)
        >>> result, _ = prequential(loss, lambda p: (p, None), forward(apply, 1.0), apply,
        ...                         1.0, 3.0, sgd, sgd.init(1.0))
        >>> print(result.meta_grads.round(4))
        0.1
    """
    (value, inner_aux), output_grads = jax.value_and_grad(inner_loss, has_aux=True)(
        current.outputs, meta_params
    )
    (grads,) = jax.linear_transpose(current.pushforward, params)(output_grads)
    new_params, pull_back, new_opt_state = jax.vjp(
        lambda g: _apply(optimizer, g, opt_state, params), grads, has_aux=True
    )
    following = forward(next_apply, new_params)
    outer_value, outer_aux = outer_loss(following.outputs)

    def meta_gradient() -> PyTree:
        outer_grads = jax.grad(outer_loss, has_aux=True)(following.outputs)[0]
        (cotangent,) = jax.linear_transpose(following.pushforward, params)(outer_grads)
        (direction,) = pull_back(cotangent)
        tangents = current.pushforward(direction)
        meta_grads_at = jax.grad(lambda z, m: inner_loss(z, m)[0], argnums=1)
        return jax.jvp(lambda z: meta_grads_at(z, meta_params), (current.outputs,), (tangents,))[1]

    if when is True:
        meta_grads = meta_gradient()
    else:
        meta_grads = jax.tree.map(jnp.zeros_like, meta_params)
        if when is not False:
            zeros = meta_grads
            meta_grads = jax.lax.cond(when, meta_gradient, lambda: zeros)
    step = OneStep(meta_grads, new_params, new_opt_state, value, outer_value, inner_aux, outer_aux)
    return step, following


def _one_step_reverse(inner, outer, params, meta_params, optimizer, opt_state) -> OneStep:
    def after_step(m: PyTree) -> tuple[jax.Array, tuple]:
        (value, inner_aux), grads = jax.value_and_grad(inner, has_aux=True)(params, m)
        new_params, new_opt_state = _apply(optimizer, grads, opt_state, params)
        outer_value, outer_aux = outer(new_params)
        return outer_value, (new_params, new_opt_state, value, outer_value, inner_aux, outer_aux)

    meta_grads, rest = jax.grad(after_step, has_aux=True)(meta_params)
    return OneStep(meta_grads, *rest)


def _trajectory(inner_loss, params, meta_params, optimizer, opt_state, batches):
    """K steps: final params and opt_state, and of each step ((params, opt_state), grads, value)."""

    def body(carry: PyTree, batch: PyTree) -> tuple[PyTree, tuple]:
        p, s = carry
        value, grads = jax.value_and_grad(inner_loss)(p, meta_params, batch)
        return _apply(optimizer, grads, s, p), (carry, grads, value)

    (p, s), history = jax.lax.scan(body, (params, opt_state), batches)
    return p, s, history


def _walk_back(
    inner_loss, cotangent, last_state, meta_params, optimizer, history, batches, estimator
) -> PyTree:
    """Pulls the outer gradient back through the steps and adds up their meta-gradients."""

    def backward(adjoint: tuple, step: tuple) -> tuple[tuple, None]:
        cotangent_p, cotangent_s, meta_grads = adjoint
        (p, s), g, batch = step

        # Step counters and keys have no cotangent: only the state's floating leaves travel.
        def update(g: PyTree, s_floats: list, p: PyTree) -> tuple[PyTree, list]:
            new_p, new_s = _apply(optimizer, g, _with_float_leaves(s, s_floats), p)
            return new_p, _float_leaves(new_s)

        _, pull_back = jax.vjp(update, g, _float_leaves(s), p)
        direction, cotangent_s, direct_p = pull_back((cotangent_p, cotangent_s))
        step_loss = _with_aux(lambda p, m: inner_loss(p, m, batch), False)
        hessian_vector, share = _mixed_products(step_loss, p, meta_params, direction)
        if estimator == "finite_difference":
            share = _central_difference(step_loss, p, meta_params, direction)
        return (_add(direct_p, hessian_vector), cotangent_s, _add(meta_grads, share)), None

    zeros = jax.tree.map(jnp.zeros_like, (_float_leaves(last_state), meta_params))
    (_, _, meta_grads), _ = jax.lax.scan(
        backward, (cotangent, *zeros), (*history[:2], batches), reverse=True
    )
    return meta_grads


def _apply(optimizer, grads: PyTree, opt_state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), new_opt_state


def _mixed_products(loss, params, meta_params, direction) -> tuple[PyTree, PyTree]:
    """(d2 loss / dp dp) direction and (d2 loss / dm dp) direction, by forward over reverse."""
    both = jax.grad(lambda p, m: loss(p, m)[0], argnums=(0, 1))
    return jax.jvp(lambda p: both(p, meta_params), (params,), (direction,))[1]


def _central_difference(loss, params, meta_params, direction) -> PyTree:
    norm = optax.tree.norm(direction)
    eps = _FINITE_DIFFERENCE_NORM / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)

    def meta_grads_at(sign: int) -> PyTree:
        moved = jax.tree.map(lambda p, d: p + sign * eps * d, params, direction)
        return jax.grad(lambda m: loss(moved, m)[0])(meta_params)

    return jax.tree.map(lambda a, b: (a - b) / (2 * eps), meta_grads_at(1), meta_grads_at(-1))


def _with_aux(loss: Callable, has_aux: bool) -> Callable:
    return loss if has_aux else lambda *args: (loss(*args), None)


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def _float_leaves(tree: PyTree) -> list:
    return [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]


def _with_float_leaves(tree: PyTree, floats: list) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    replacements = iter(floats)
    merged = [next(replacements) if _is_float(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(treedef, merged)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: use one of {', '.join(ESTIMATORS)}")
