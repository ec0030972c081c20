"""The ratios that are learned: their networks by NumPy, their updates by finite differences."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from tests import methods
from tests.test_fusion import clean, linear, two_teachers, unaugmented
from tests.test_ratios import BATCH, CLASSES, parameters, saturated, situation, softmax
from tgeo_jax import distill, models, ratios, roles


@pytest.mark.parametrize(("initial_ratio", "key"), [(0.5, 0), (0.5, 1), (0.5, 2), (0.2, 0)])
def test_tgeo_starts_near_its_initial_ratio(initial_ratio, key):
    ratio = ratios.tgeo(initial_ratio=initial_ratio)
    _, soft = jax.jit(ratio.weights)(parameters(ratio, key), situation(key))
    np.testing.assert_allclose(soft, np.full(BATCH, initial_ratio), atol=0.05)


def test_tgeo_starts_different_for_different_samples():
    ratio = ratios.tgeo()
    _, soft = jax.jit(ratio.weights)(parameters(ratio), situation())
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


def random_parameters(ratio, scale=0.7):
    """Random biases too, so that a forgotten one shows."""
    random = np.random.RandomState(1)
    shapes = jax.eval_shape(lambda: parameters(ratio))
    return jax.tree.map(lambda leaf: scale * random.randn(*leaf.shape), shapes)


def numpy_features(case, relations):
    """Features of every sample, by NumPy."""
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
    params = random_parameters(ratio)
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
    ratio, case = ratios.tgeo(), situation()
    params = parameters(ratio)

    def total(student_logits):
        return jnp.sum(ratio.weights(params, case._replace(student_logits_BxK=student_logits))[1])

    gradient = jax.jit(jax.grad(total))(case.student_logits_BxK)
    np.testing.assert_array_equal(gradient, np.zeros((BATCH, CLASSES)))


def test_tgeo_passes_a_gradient_to_every_layer_from_the_start():
    ratio = ratios.tgeo()
    total = lambda params: jnp.sum(ratio.weights(params, situation())[1])  # noqa: E731
    gradient = jax.jit(jax.grad(total))(parameters(ratio))
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


@pytest.mark.parametrize("name", ["tgeo", "bikd"])
@pytest.mark.parametrize("hidden", [(0,), (32, -1), (2.5,)])
def test_networks_raise_on_hidden_widths_that_make_no_layers(name, hidden):
    with pytest.raises(ValueError, match=rf"ratio\.{name}\.hidden=\(.*positive integers"):
        ratios.RATIOS[name](hidden=hidden)


def test_fusion_network_returns_a_vector():
    # [B, 1] against [B] losses would broadcast to [B, B].
    network = ratios.FusionNetwork(hidden=(3,))
    alpha, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.ones((BATCH, 8)))
    assert alpha.shape == (BATCH,)


@pytest.mark.parametrize(
    ("hidden", "scale"), [((64, 64), 0.25), ((64,), 0.25), ((5, 3), 0.7), ((), 0.7)]
)
def test_bikd_is_the_forward_pass_of_its_network_on_the_two_losses(hidden, scale):
    ratio = ratios.bikd(hidden=hidden)
    params, case = random_parameters(ratio, scale), situation()
    labels = np.asarray(case.labels_B)[:, None]
    probs = [softmax(z) for z in (case.student_logits_BxK, case.teacher_logits_BxK)]
    x = -np.log(np.concatenate([np.take_along_axis(p, labels, 1) for p in probs], axis=1))
    layers = [params["params"][f"Dense_{index}"] for index in range(len(hidden) + 1)]
    for layer in layers[:-1]:
        x = np.tanh(x @ layer["kernel"] + layer["bias"])
    expected = 1 / (1 + np.exp(-(x @ layers[-1]["kernel"] + layers[-1]["bias"])))
    found = np.transpose(jax.jit(ratio.weights)(params, case))
    assert np.ptp(expected, axis=0).min() > 0.01  # or it would not tell one network from another
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_bikd_has_two_hidden_layers_of_64_unless_said():
    shapes = jax.tree.map(np.shape, jax.eval_shape(lambda: parameters(ratios.bikd())))["params"]
    assert [shapes[f"Dense_{i}"]["kernel"] for i in range(3)] == [(2, 64), (64, 64), (64, 2)]


def test_bikd_weights_are_not_tied():
    """Both can grow at once: each has its own row of the last layer."""
    ratio = ratios.bikd(hidden=(5,))
    params = random_parameters(ratio)
    before = np.stack(jax.jit(ratio.weights)(params, situation()))
    params["params"]["Dense_1"]["bias"] = params["params"]["Dense_1"]["bias"] + np.array([0.5, 0])
    hard, soft = jax.jit(ratio.weights)(params, situation())
    assert (hard > before[0]).all()
    np.testing.assert_array_equal(soft, before[1])


def test_rw_probes_at_zero_weights():
    probe = ratios.rw().per_batch.start(BATCH)
    np.testing.assert_array_equal(ratios.rw().weights(probe, situation()), np.zeros((2, BATCH)))


def test_rw_update_by_hand():
    """u = max(-g, 1e-8): what would raise the outer loss keeps next to nothing."""
    grads = {
        "hard": jnp.float32([-1.0, 1.0, -2.0, 0.5, 0.0, -0.2]),
        "soft": jnp.float32([-3.0, 1.0, 5.0, -1.0, 0.0, -0.2]),
    }
    chosen = ratios.rw().per_batch.update(grads)
    hard, soft = ratios.rw().weights(chosen, saturated())
    # (1, 3), both floors, (2, floor), (floor, 1), both floors, (0.2, 0.2)
    np.testing.assert_allclose(soft, [0.75, 0.5, 5e-9, 1.0, 0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(hard, [0.25, 0.5, 1.0, 0.0, 0.5, 0.5], rtol=1e-5, atol=1e-7)


TRAIN, VAL = methods.examples(5), methods.examples(6, seed=1)


def in_double(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


class ByHand:
    """Virtual step, validation loss and RW-KD's weights, from the formulas; M teachers."""

    def __init__(self, method, teacher, state):
        self.method, self.teacher, self.state = method, teacher, state

    def student(self, params, images):
        variables = {"params": params, "batch_stats": self.state.student.batch_stats}
        return self.method.student.apply(variables, clean(images), train=True, mutable=True)

    def teachers(self, images):
        logits = self.method.role.teach(self.teacher.variables, clean(images))
        return logits.reshape(-1, *logits.shape[-2:])

    def losses(self, params, batch):
        """CE_B and tau^2 KL_MxB."""
        tau, (z_BxK, _) = methods.TEMPERATURE, self.student(params, batch.images_BxHxWxC)
        ce_B = -jnp.sum(jnp.eye(4)[batch.labels_B] * jnp.log(jax.nn.softmax(z_BxK)), axis=1)
        p_MxBxK = jax.nn.softmax(self.teachers(batch.images_BxHxWxC) / tau)
        q_BxK = jax.nn.softmax(z_BxK / tau)
        return ce_B, tau**2 * jnp.sum(p_MxBxK * jnp.log(p_MxBxK / q_BxK[None]), axis=2)

    def inner(self, params, weights_2xMxB):
        """Mean over samples and teachers of eps_ce CE + eps_kd tau^2 KL."""
        ce_B, kl_MxB = self.losses(params, TRAIN)
        return jnp.mean(weights_2xMxB[0] * ce_B[None] + weights_2xMxB[1] * kl_MxB)

    def step(self, weights_2xMxB):
        learner = self.state.student
        grads = jax.grad(self.inner)(learner.params, weights_2xMxB)
        updates, opt_state = self.method.optimizer.update(grads, learner.opt_state, learner.params)
        return optax.apply_updates(learner.params, updates), opt_state

    def outer(self, weights_2xMxB):
        """Validation loss after the virtual step."""
        ce_B, kl_MxB = self.losses(self.step(weights_2xMxB)[0], VAL)
        share = self.method.outer_soft
        return (1 - share) * jnp.mean(ce_B) + share * jnp.mean(kl_MxB)

    def weights(self, h=1e-4):
        """Central differences in every one of the 2 M B coordinates, one at a time, at eps = 0."""
        shape = (2, *self.teachers(TRAIN.images_BxHxWxC).shape[:2])
        steps = h * jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
        slopes = jax.vmap(lambda eps: (self.outer(eps) - self.outer(-eps)) / (2 * h))(steps)
        u_ce, u_kd = jnp.maximum(-slopes.reshape(shape), 1e-8)
        alpha = u_kd / (u_ce + u_kd)
        return jnp.stack([1 - alpha, alpha])


MLP = models.build("mlp", methods.NUM_CLASSES, hidden=(3,))
CNN = models.build("cnn", methods.NUM_CLASSES, widths=(3,))
NESTEROV = optax.sgd(0.1, momentum=0.9, nesterov=True)
RW_CASES = {
    "plain SGD": (MLP, optax.sgd(0.1), 1),
    "BatchNorm, Nesterov, decay": (CNN, optax.chain(optax.add_decayed_weights(0.1), NESTEROV), 1),
    "two teachers": (MLP, optax.sgd(0.1, momentum=0.9), 2),
}


@functools.cache
def _rw_by_hand(name):
    """(method's fields, teacher, state, found by hand); once for all estimators and orders."""
    student, optimizer, count = RW_CASES[name]
    role, teacher = two_teachers() if count == 2 else (roles.frozen(linear()), methods.teacher())
    fields = {
        "student": student,
        "optimizer": optimizer,
        "ratio": ratios.rw(),
        "role": role,
    }
    method = unaugmented(**fields)
    state, teacher = in_double(methods.start(method)), in_double(teacher)
    # A velocity: momentum moves the virtual student although its gradient is zero.
    random = np.random.RandomState(3)
    moving = jax.tree.map(lambda v: v + 0.1 * random.randn(*v.shape), state.student.opt_state)
    state = state.replace(student=state.student.replace(opt_state=moving))

    @methods.quick_jit
    def by_hand(state, teacher):
        own = ByHand(method, teacher, state)
        weights = own.weights()
        params, opt_state = own.step(weights)
        _, updated = own.student(state.student.params, TRAIN.images_BxHxWxC)
        stats = updated.get("batch_stats", {})
        return weights, (params, stats, opt_state), own.outer(jnp.zeros_like(weights))

    return fields, teacher, state, by_hand(state, teacher)


def same(found, expected, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-12), found, expected)


@pytest.mark.parametrize(
    ("name", "estimator", "order"),
    [
        *((name, "mixed", "student_first") for name in RW_CASES),
        ("BatchNorm, Nesterov, decay", "reverse", "student_first"),
        ("two teachers", "reverse", "student_first"),
        ("BatchNorm, Nesterov, decay", "mixed", "fusion_first"),
    ],
)
def test_rw_step_is_the_real_step_with_weights_by_finite_differences(x64, name, estimator, order):
    fields, teacher, state, (weights, student, outer_value) = _rw_by_hand(name)
    method = unaugmented(**fields, estimator=estimator, order=order)
    after, found = methods.quick_jit(distill.train_step(method, teacher))(state, TRAIN, VAL)

    alpha = weights[1]
    assert ((alpha > 0.01) & (alpha < 0.99)).any()  # not only floors
    assert np.ptp(alpha) > 0.1
    learner = after.student
    same((learner.params, learner.batch_stats, learner.opt_state), student, 1e-7)
    np.testing.assert_allclose(found["ratio"].total / found["ratio"].count, alpha.mean(), 1e-6)
    # Nothing outlives the batch, and the outer loss is that of the virtual student.
    assert jax.tree.leaves(after.fusion) == []
    outer = found["outer_loss"]
    assert outer.count == len(VAL.labels_B)
    np.testing.assert_allclose(outer.total / outer.count, outer_value, rtol=1e-7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"order": "prequential"}, r"ratio\.name='rw' finds its weights by a virtual step"),
        ({"meta_every": 2}, r"meta\.every=2: ratio\.name='rw' has no weights for the steps in"),
    ],
)
def test_rw_refuses_steps_that_would_have_no_weights(changes, said):
    with pytest.raises(ValueError, match=said):
        methods.method(ratio=ratios.rw(), **changes)


def test_rw_is_meta_learned_unless_nobody_teaches():
    assert methods.method(ratio=ratios.rw()).meta_learned
    # And then there is nothing to refuse.
    alone = methods.method(ratio=ratios.rw(), role=roles.alone(None), order="prequential")
    assert not alone.meta_learned


def recorder() -> optax.GradientTransformation:
    """Keeps the last gradient and changes nothing."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(
        zeros, lambda grads, state, params=None: (zeros(grads), grads)
    )


LEARNED = [ratios.bikd(hidden=(3,)), ratios.tgeo(hidden=(3,))]


@pytest.mark.parametrize(("ratio", "share"), [(LEARNED[0], 0.4), (LEARNED[1], 0.0)])
def test_meta_gradient_equals_finite_differences_through_a_step_by_hand(x64, ratio, share):
    fields = {"student": MLP, "fusion_optimizer": recorder(), "outer_soft": share}
    method = unaugmented(ratio=ratio, **fields)
    state, teacher = in_double(methods.start(method)), in_double(methods.teacher())
    flat, unravel = ravel_pytree(state.fusion.params)
    directions = np.random.RandomState(0).randn(4, flat.size)

    @methods.quick_jit
    def by_differences(state, teacher):
        own = ByHand(method, teacher, state)
        shown = situation()._replace(
            student_logits_BxK=own.student(state.student.params, TRAIN.images_BxHxWxC)[0],
            teacher_logits_BxK=own.teachers(TRAIN.images_BxHxWxC)[0],
            labels_B=TRAIN.labels_B,
            class_means_KxK=teacher.class_means_KxK,
        )

        def outer(flat):
            return own.outer(jnp.stack(ratio.weights(unravel(flat), shown))[:, None])

        steps = 1e-4 * directions
        return jax.vmap(lambda h: (outer(flat + h) - outer(flat - h)) / 2e-4)(steps)

    after, _ = methods.quick_jit(distill.train_step(method, teacher))(state, TRAIN, VAL)
    meta_grads, _ = ravel_pytree(after.fusion.opt_state)
    expected = by_differences(state, teacher)
    assert np.abs(expected).min() > 1e-5
    np.testing.assert_allclose(directions @ meta_grads, expected, rtol=1e-5)


@pytest.mark.parametrize("ratio", LEARNED)
def test_accumulating_over_five_steps_is_one_step_by_the_mean_meta_gradient(ratio):
    every_fifth = optax.MultiSteps(optax.sgd(50.0), 5).gradient_transformation()
    method, recording = (
        unaugmented(ratio=ratio, student=MLP, fusion_optimizer=optimizer)
        for optimizer in (every_fifth, recorder())
    )
    teacher = methods.teacher()
    step, record = (
        methods.quick_jit(distill.train_step(each, teacher)) for each in (method, recording)
    )
    state = methods.start(method)
    # Twice: what was accumulated must be forgotten.
    for window in range(2):
        before, meta_grads = state.fusion.params, []
        for index in range(5):
            same(state.fusion.params, before, 0)
            seed = 5 * window + index
            batches = methods.examples(5, seed), methods.examples(6, 50 + seed)
            fusion = state.fusion.replace(opt_state=before)  # of the recorder's structure
            meta_grads.append(record(state.replace(fusion=fusion), *batches)[0].fusion.opt_state)
            state, _ = step(state, *batches)
        change = jax.tree.map(np.subtract, state.fusion.params, before)
        expected = jax.tree.map(lambda *grads: -50 * np.mean(grads, axis=0), *meta_grads)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 0.01
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-6), change, expected)
