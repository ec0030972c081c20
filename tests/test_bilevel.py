"""Hypergradients against finite differences, closed forms and a second algorithm, in float64."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tgeo_jax import bilevel, losses, models, ratios

pytestmark = pytest.mark.usefixtures("x64")

TEMPERATURE = 4.0
RATE = 0.1


def _double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def _clipped(params):
    # Gradients here have norms near 1: 0.1 makes sure that clipping is active.
    return optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(RATE, momentum=0.9))


OPTIMIZERS = {
    "sgd": lambda params: optax.sgd(RATE),
    "momentum_and_weight_decay": lambda params: optax.chain(
        optax.add_decayed_weights(0.05), optax.sgd(RATE, momentum=0.9)
    ),
    "nesterov": lambda params: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "warmed_adam": lambda params: optax.adam(1e-2, eps_root=1e-16),
    "active_clipping": _clipped,
}


class Problem:
    """A BatchNorm network, a fusion network, two batches, and an optimiser with a past."""

    def __init__(self, make_optimizer, seed: int = 0):
        keys = jax.random.split(jax.random.key(seed), 8)
        self.network = models.build("cnn", 3, widths=(3,))
        self.images = jax.random.normal(keys[0], (6, 5, 5, 1), jnp.float64)
        self.labels = jnp.arange(6) % 3
        self.val_images = jax.random.normal(keys[1], (5, 5, 5, 1), jnp.float64)
        self.val_labels = jnp.arange(5) % 3
        self.teacher = 3 * jax.random.normal(keys[2], (6, 3), jnp.float64)
        variables = _double(jax.jit(self.network.init)(keys[3], self.images))
        self.params, self.stats = variables["params"], variables["batch_stats"]
        self.fusion = ratios.FusionNetwork(hidden=(4,))
        features = self._features(jnp.zeros((6, 3)))
        self.meta_params = _double(jax.jit(self.fusion.init)(keys[4], features))
        self.optimizer = make_optimizer(self.params)
        self.opt_state = self.optimizer.init(self.params)
        for _ in range(5):  # momentum and second moments must not be those of a cold start
            self.params, self.opt_state = self._update(self.params, self.opt_state)

    @functools.partial(jax.jit, static_argnums=0)
    def _update(self, params, opt_state):
        grads = jax.grad(self.inner)(params, self.meta_params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _features(self, logits):
        probs = (jax.nn.softmax(logits), jax.nn.softmax(self.teacher))
        return jax.lax.stop_gradient(jnp.concatenate(probs, axis=-1))

    def logits(self, params, images):
        variables = {"params": params, "batch_stats": self.stats}
        return self.network.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    def inner(self, params, meta_params):
        logits = self.logits(params, self.images)
        alpha = self.fusion.apply(meta_params, self._features(logits))
        hard = losses.cross_entropy(logits, self.labels)
        soft = losses.kl(logits, self.teacher, temperature=TEMPERATURE)
        return jnp.mean((1 - alpha) * hard + alpha * soft)

    def outer(self, params):
        return jnp.mean(losses.cross_entropy(self.logits(params, self.val_images), self.val_labels))

    def step(self, meta_params):
        grads = jax.grad(self.inner)(self.params, meta_params)
        updates, _ = self.optimizer.update(grads, self.opt_state, self.params)
        return optax.apply_updates(self.params, updates)

    def solve(self, estimator, outer=None):
        return jax.jit(
            lambda params, meta_params: bilevel.one_step(
                self.inner,
                outer or self.outer,
                params,
                meta_params,
                self.optimizer,
                self.opt_state,
                estimator=estimator,
            )
        )(self.params, self.meta_params)


@functools.cache
def _problem(name):
    return Problem(OPTIMIZERS[name])


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _numerical(function, point, step=1e-6):
    """Central differences of a function of a pytree, coordinate by coordinate."""
    flat, unravel = jax.flatten_util.ravel_pytree(point)
    value = jax.jit(lambda vector: function(unravel(vector)))
    moves = step * np.eye(flat.size)
    return np.array([(value(flat + m) - value(flat - m)) / (2 * step) for m in moves])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_equals_reverse_and_finite_differences_with_batchnorm(name):
    problem = _problem(name)
    mixed, reverse = problem.solve("mixed"), problem.solve("reverse")
    scale = np.abs(_flat(reverse.meta_grads)).max()
    assert scale > 1e-5  # otherwise the comparisons below would say nothing
    np.testing.assert_allclose(
        _flat(mixed.meta_grads), _flat(reverse.meta_grads), rtol=0, atol=1e-12 * max(scale, 1)
    )
    numerical = _numerical(lambda m: problem.outer(problem.step(m)), problem.meta_params)
    np.testing.assert_allclose(_flat(mixed.meta_grads), numerical, rtol=0, atol=1e-5 * scale)


def test_clipping_in_the_clipping_case_is_active():
    problem = _problem("active_clipping")
    grads = jax.jit(jax.grad(problem.inner))(problem.params, problem.meta_params)
    assert optax.tree.norm(grads) > 0.1


@pytest.mark.parametrize("estimator", bilevel.ESTIMATORS)
def test_inner_step_is_the_optimisers_own(estimator):
    problem = _problem("momentum_and_weight_decay")
    result = problem.solve(estimator)
    params = jax.jit(problem.step)(problem.meta_params)
    np.testing.assert_allclose(_flat(result.params), _flat(params), rtol=1e-12)
    np.testing.assert_allclose(result.outer_value, jax.jit(problem.outer)(params), rtol=1e-12)
    inner_value = jax.jit(problem.inner)(problem.params, problem.meta_params)
    np.testing.assert_allclose(result.inner_value, inner_value, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_closed_form_of_the_paper_for_sgd(nesterov):
    """dL_out/dalpha_i = -(eta/B) <grad L_out(p'), grad(T^2 KL_i - CE_i)>, x (1+mu) by Nesterov."""
    keys = jax.random.split(jax.random.key(1), 4)
    network = models.build("mlp", 4, hidden=(5,))
    images = jax.random.normal(keys[0], (6, 3, 3, 1), jnp.float64)
    labels, teacher = jnp.arange(6) % 4, jax.random.normal(keys[1], (6, 4), jnp.float64)
    params = _double(jax.jit(network.init)(keys[2], images))
    alpha = jax.random.uniform(keys[3], (6,), jnp.float64)
    momentum = 0.9 if nesterov else 0.0

    def difference(params):  # [B]: soft minus hard loss of each sample
        logits = network.apply(params, images)
        return losses.kl(logits, teacher, temperature=TEMPERATURE) - losses.cross_entropy(
            logits, labels
        )

    def inner(params, alpha):
        logits = network.apply(params, images)
        return jnp.mean(losses.cross_entropy(logits, labels) + alpha * difference(params))

    def outer(params):
        return jnp.mean(losses.cross_entropy(network.apply(params, 0.5 * images), labels))

    optimizer = optax.sgd(RATE, momentum or None, nesterov)
    result = jax.jit(
        lambda p, a: bilevel.one_step(inner, outer, p, a, optimizer, optimizer.init(p))
    )(params, alpha)
    outer_grad = _flat(jax.jit(jax.grad(outer))(result.params))
    per_sample = jax.jit(jax.jacrev(difference))(params)
    jacobian = np.concatenate(
        [np.reshape(leaf, (6, -1)) for leaf in jax.tree.leaves(per_sample)], axis=1
    )
    expected = -(RATE / 6) * (1 + momentum) * jacobian @ outer_grad
    np.testing.assert_allclose(result.meta_grads, expected, rtol=1e-10)


def _ridge():
    random = np.random.RandomState(0)
    data = {name: jnp.asarray(random.randn(8, 3)) for name in ("x", "x_val")}
    targets = {name: jnp.asarray(random.randn(8)) for name in ("y", "y_val")}

    def inner(p, log_strength, batch=None):
        residual = data["x"] @ p - targets["y"]
        return 0.5 * residual @ residual + 0.5 * jnp.exp(log_strength) * p @ p

    def outer(p):
        residual = data["x_val"] @ p - targets["y_val"]
        return 0.5 * residual @ residual

    return data["x"], data["x_val"], targets["y"], targets["y_val"], inner, outer


def test_ridge_regression_one_step_by_hand():
    x, x_val, y, y_val, inner, outer = _ridge()
    p, log_strength = jnp.array([0.3, -0.2, 0.5]), jnp.asarray(0.4)
    strength = np.exp(0.4)
    optimizer = optax.sgd(0.01)
    result = bilevel.one_step(inner, outer, p, log_strength, optimizer, optimizer.init(p))
    after = p - 0.01 * (x.T @ (x @ p - y) + strength * p)
    expected = (x_val @ after - y_val) @ x_val @ (-0.01 * strength * p)
    np.testing.assert_allclose(result.meta_grads, expected, rtol=1e-12)


@pytest.mark.parametrize("estimator", ["mixed", "reverse"])
def test_ridge_regression_unrolled_to_convergence_gives_the_implicit_hypergradient(estimator):
    x, x_val, y, y_val, inner, outer = _ridge()
    log_strength = jnp.asarray(0.4)
    optimizer = optax.sgd(0.05)
    start = jnp.zeros(3)
    result = jax.jit(
        lambda m: bilevel.unrolled(
            inner, outer, start, m, optimizer, optimizer.init(start), jnp.zeros(1500),
            estimator=estimator,
        )
    )(log_strength)  # fmt: skip
    strength = np.exp(0.4)
    hessian = x.T @ x + strength * np.eye(3)
    solution = np.linalg.solve(hessian, x.T @ y)
    outer_grad = x_val.T @ (x_val @ solution - y_val)
    expected = -strength * outer_grad @ np.linalg.solve(hessian, solution)
    np.testing.assert_allclose(result.params, solution, rtol=1e-9)
    np.testing.assert_allclose(result.meta_grads, expected, rtol=1e-8)


def test_a_meta_objective_of_the_users_own():
    """The worst class, softly: nothing about it is cross-entropy on average."""
    problem = _problem("nesterov")

    def worst_class(params):
        logits = problem.logits(params, problem.val_images)
        wrong = 1 - jax.nn.softmax(logits)[jnp.arange(5), problem.val_labels]
        by_class = jax.ops.segment_sum(wrong, problem.val_labels, num_segments=3)
        return jax.nn.logsumexp(10 * by_class) / 10

    found = _flat(problem.solve("mixed", worst_class).meta_grads)
    numerical = _numerical(lambda m: worst_class(problem.step(m)), problem.meta_params)
    np.testing.assert_allclose(found, numerical, rtol=0, atol=1e-5 * np.abs(numerical).max())


@pytest.mark.parametrize("estimator", ["mixed", "reverse"])
@pytest.mark.parametrize("name", ["momentum_and_weight_decay", "nesterov", "warmed_adam"])
def test_three_unrolled_steps_equal_grad_over_the_three_steps(name, estimator):
    problem = _problem(name)
    scales = jnp.asarray([1.0, 0.5, 2.0])  # the "batches": each step weighs its inner loss

    def inner(params, meta_params, scale):
        return scale * problem.inner(params, meta_params)

    def by_hand(meta_params):
        params, opt_state = problem.params, problem.opt_state
        for scale in scales:
            grads = jax.grad(inner)(params, meta_params, scale)
            updates, opt_state = problem.optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
        return problem.outer(params)

    result = jax.jit(
        lambda m: bilevel.unrolled(
            inner, problem.outer, problem.params, m, problem.optimizer, problem.opt_state, scales,
            estimator=estimator,
        )
    )(problem.meta_params)  # fmt: skip
    value, expected = jax.jit(jax.value_and_grad(by_hand))(problem.meta_params)
    scale = np.abs(_flat(expected)).max()
    np.testing.assert_allclose(
        _flat(result.meta_grads), _flat(expected), rtol=0, atol=1e-12 * max(scale, 1)
    )
    np.testing.assert_allclose(result.outer_value, value, rtol=1e-12)


def _smooth_inner(p, m):
    return jnp.sum(jnp.sin(p) * m**2) + jnp.sum(jnp.cos(p * m))


def test_finite_difference_estimator_approaches_the_exact_one():
    p, m = jnp.array([0.3, -0.7]), jnp.array([1.1, 0.4])
    sgd = optax.sgd(RATE)
    exact, approximate = (
        bilevel.one_step(
            _smooth_inner, lambda p: jnp.sum(p**3), p, m, sgd, sgd.init(p), estimator=estimator
        ).meta_grads
        for estimator in ("mixed", "finite_difference")
    )
    # Central differences with a perturbation of norm 0.01: an error of order 1e-4, not zero.
    np.testing.assert_allclose(approximate, exact, rtol=1e-3)
    assert np.abs(approximate - exact).max() > 1e-9


def test_unrolled_finite_difference_approaches_the_exact_one():
    p, m = jnp.array([0.3, -0.7]), jnp.array([1.1, 0.4])
    sgd = optax.sgd(RATE, momentum=0.9)
    exact, approximate = (
        bilevel.unrolled(
            lambda p, m, batch: _smooth_inner(p, m), lambda p: jnp.sum(p**3), p, m, sgd,
            sgd.init(p), jnp.zeros(3), estimator=estimator,
        ).meta_grads
        for estimator in ("mixed", "finite_difference")
    )  # fmt: skip
    np.testing.assert_allclose(approximate, exact, rtol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prequential_equals_reverse_through_the_next_batch(name):
    problem = _problem(name)

    def next_apply(params):
        return problem.logits(params, problem.val_images), None

    def inner_of_logits(logits, meta_params):
        alpha = problem.fusion.apply(meta_params, problem._features(logits))
        hard = losses.cross_entropy(logits, problem.labels)
        soft = losses.kl(logits, problem.teacher, temperature=TEMPERATURE)
        return jnp.mean((1 - alpha) * hard + alpha * soft), None

    def outer_of_logits(logits):
        return jnp.mean(losses.cross_entropy(logits, problem.val_labels)), None

    @jax.jit
    def solve(params, meta_params):
        current = bilevel.forward(lambda p: (problem.logits(p, problem.images), None), params)
        return bilevel.prequential(
            inner_of_logits, outer_of_logits, current, next_apply, params, meta_params,
            problem.optimizer, problem.opt_state,
        )  # fmt: skip

    result, following = solve(problem.params, problem.meta_params)
    reverse = problem.solve("reverse")
    scale = np.abs(_flat(reverse.meta_grads)).max()
    np.testing.assert_allclose(
        _flat(result.meta_grads), _flat(reverse.meta_grads), rtol=0, atol=1e-12 * max(scale, 1)
    )
    np.testing.assert_allclose(_flat(result.params), _flat(reverse.params), rtol=1e-12)
    np.testing.assert_allclose(following.outputs, jax.jit(next_apply)(result.params)[0], rtol=1e-12)


def test_mixed_goes_through_a_custom_jvp_kernel():
    @jax.custom_jvp
    def kernel(x):
        return jnp.sin(x)

    @kernel.defjvp
    def _(primals, tangents):
        return jnp.sin(primals[0]), jnp.cos(primals[0]) * tangents[0]

    p, m = jnp.array([0.3, -0.7]), jnp.array([1.1, 0.4])
    sgd = optax.sgd(RATE)

    def solve(function):
        def inner(p, m):
            return jnp.sum(function(p) * m**2)

        return bilevel.one_step(inner, lambda p: jnp.sum(p**3), p, m, sgd, sgd.init(p)).meta_grads

    np.testing.assert_allclose(solve(kernel), solve(jnp.sin), rtol=1e-12)


@pytest.mark.parametrize("estimator", bilevel.ESTIMATORS)
def test_auxiliary_values_come_back(estimator):
    sgd = optax.sgd(RATE)
    result = bilevel.one_step(
        lambda p, m: (p * m, {"seen": p}),
        lambda p: (p**2, p),
        jnp.asarray(2.0),
        jnp.asarray(3.0),
        sgd,
        sgd.init(jnp.asarray(2.0)),
        estimator=estimator,
        has_aux=True,
    )
    # p' = 2 - 0.1 * 3 = 1.7;  d p'^2 / dm = 2 * 1.7 * (-0.1)
    np.testing.assert_allclose(result.meta_grads, -0.34, rtol=1e-9)
    np.testing.assert_allclose([result.inner_aux["seen"], result.outer_aux], [2.0, 1.7])


def test_unknown_estimator_is_named_with_the_known_ones():
    sgd = optax.sgd(RATE)
    with pytest.raises(ValueError, match=r"estimator='backward': use one of mixed, reverse"):
        bilevel.one_step(
            lambda p, m: p, lambda p: p, 1.0, 1.0, sgd, sgd.init(1.0), estimator="backward"
        )


def test_a_network_with_dropout_keys_closed_over_is_differentiated_exactly():
    """The same key in every pass: otherwise gradient and directional derivative would disagree."""
    network = nn.Sequential([nn.Dense(6), nn.Dropout(0.5, deterministic=False), nn.Dense(1)])
    x = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
    params = _double(
        jax.jit(network.init)({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)
    )

    def apply(params):
        return network.apply(params, x, rngs={"dropout": jax.random.key(3)})[:, 0]

    sgd = optax.sgd(RATE)
    weights = jnp.arange(1.0, 5.0)
    mixed, reverse = (
        jax.jit(
            lambda m, estimator=estimator: bilevel.one_step(
                lambda p, m: jnp.mean(m * apply(p) ** 2), lambda p: jnp.sum(apply(p)), params, m,
                sgd, sgd.init(params), estimator=estimator,
            )
        )(weights).meta_grads
        for estimator in ("mixed", "reverse")
    )  # fmt: skip
    np.testing.assert_allclose(mixed, reverse, rtol=1e-12)
