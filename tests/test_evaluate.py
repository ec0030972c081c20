"""Metrics over a split, padded batches included, against NumPy and scikit-learn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.metrics import accuracy_score, log_loss

from tests import methods
from tgeo_jax import evaluate, models, roles, teachers
from tgeo_jax.state import Batch

SPLIT = methods.examples(23)


@pytest.fixture(scope="module")
def network():
    module = models.build("cnn", methods.NUM_CLASSES, widths=(3,))
    init = jax.vmap(lambda key: module.init(key, jnp.zeros((1, 5, 5, 1))))
    return module, jax.jit(init)(jax.random.split(jax.random.key(0), 2))


def _predict(module):
    return evaluate.predictor(module, lambda images: images.astype(jnp.float32) / 255)


@pytest.mark.parametrize("batch_size", [1, 8, 23, 100])
def test_metrics_of_both_seeds_do_not_depend_on_the_batch_size(network, batch_size):
    module, variables = network
    found = evaluate.Evaluator(_predict(module), batch_size, seeds=True).metrics(variables, SPLIT)
    for seed in range(2):
        own = jax.tree.map(lambda leaf, s=seed: leaf[s], variables)
        logits = np.asarray(_predict(module)(own, SPLIT.images_BxHxWxC), np.float64)
        probs = scipy.special.softmax(logits, axis=1)
        labels = np.asarray(SPLIT.labels_B)
        accuracy = found["accuracy"].total[seed] / found["accuracy"].count[seed]
        loss = found["cross_entropy"].total[seed] / found["cross_entropy"].count[seed]
        assert accuracy == pytest.approx(accuracy_score(labels, probs.argmax(1)))
        assert loss == pytest.approx(log_loss(labels, probs), rel=1e-5)


def test_logits_come_back_for_every_example_in_order(network):
    module, variables = network
    evaluator = evaluate.Evaluator(_predict(module), 8, seeds=True)
    logits = evaluator.logits(variables, SPLIT)
    assert logits.shape == (2, 23, methods.NUM_CLASSES)
    last = Batch(SPLIT.images_BxHxWxC[22:], SPLIT.labels_B[22:])
    np.testing.assert_allclose(logits[:, 22:], evaluator.logits(variables, last), rtol=1e-5)


def test_several_teachers_are_evaluated_as_the_mean_of_their_predictions(network):
    """Padded batches included: 23 examples in batches of 8."""
    module, variables = network
    dense = models.build("mlp", methods.NUM_CLASSES, hidden=())
    other = jax.jit(dense.init)(jax.random.key(1), jnp.zeros((1, 5, 5, 1)))
    first = jax.tree.map(lambda leaf: leaf[0], variables)
    together = {
        "params": {"models_0": first["params"], "models_1": other["params"]},
        "batch_stats": {"models_0": first["batch_stats"]},
    }
    view = lambda images: images.astype(jnp.float32) / 255  # noqa: E731
    several = teachers.Trained(roles.Ensemble((module, dense)), together, several=True)
    each = [
        np.asarray(evaluate.predictor(m, view)(own, SPLIT.images_BxHxWxC), np.float64)
        for m, own in ((module, first), (dense, other))
    ]
    evaluator = evaluate.Evaluator(evaluate.predictor(several.module, view), 8, seeds=False)
    np.testing.assert_allclose(evaluator.logits(together, SPLIT), each, rtol=1e-4, atol=1e-5)

    probs = np.mean([scipy.special.softmax(logits, axis=1) for logits in each], axis=0)
    found = evaluate.Evaluator(several.predict(view), 8, seeds=False).metrics(together, SPLIT)
    accuracy, loss = (found[name].total / found[name].count for name in sorted(found))
    labels = np.asarray(SPLIT.labels_B)
    assert accuracy == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert loss == pytest.approx(log_loss(labels, probs), rel=1e-5)


def test_a_single_network_needs_no_seed_axis(network):
    module, variables = network
    own = jax.tree.map(lambda leaf: leaf[0], variables)
    logits = evaluate.Evaluator(_predict(module), 10, seeds=False).logits(own, SPLIT)
    expected = evaluate.Evaluator(_predict(module), 10, seeds=True).logits(variables, SPLIT)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
