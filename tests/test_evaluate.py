"""Metrics over a split, padded batches included, against NumPy and scikit-learn."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    recall_score,
    roc_auc_score,
)

from tests import methods, several
from tgeo_jax import evaluate, metrics, models, parallel, roles, teachers
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
    accuracy, loss = (found[n].total / found[n].count for n in ("accuracy", "cross_entropy"))
    labels = np.asarray(SPLIT.labels_B)
    assert accuracy == pytest.approx(accuracy_score(labels, probs.argmax(1)))
    assert loss == pytest.approx(log_loss(labels, probs), rel=1e-5)


def test_a_single_network_needs_no_seed_axis(network):
    module, variables = network
    own = jax.tree.map(lambda leaf: leaf[0], variables)
    logits = evaluate.Evaluator(_predict(module), 10, seeds=False).logits(own, SPLIT)
    expected = evaluate.Evaluator(_predict(module), 10, seeds=True).logits(variables, SPLIT)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)


# Two linear students of seven classes, so that there is a top five, and what a teacher says.

RANDOM = np.random.RandomState(0)
LABELS = RANDOM.randint(0, 7, 23).astype(np.int32)
IMAGES = np.asarray(SPLIT.images_BxHxWxC)
WEIGHTS = RANDOM.randn(2, 25, 7).astype(np.float32)
TEACHER = RANDOM.randn(23, 7).astype(np.float32)
NAMES = {
    "accuracy", "top5_accuracy", "cross_entropy", "ece", "macro_f1", "teacher_agreement",
    "teacher_kl", *(f"recall_{label}" for label in range(7)),
}  # fmt: skip


def linear(weights, images):
    return images.reshape(len(images), -1).astype(jnp.float32) / 255 @ weights


@pytest.fixture(scope="module")
def at_once() -> list[dict[str, float]]:
    """What is found of each student in one call, without padding."""
    every = jnp.ones(len(LABELS), bool)
    return [
        metrics.summarise(
            jax.device_get(metrics.of_logits(linear(own, IMAGES), LABELS, every, TEACHER))
        )
        for own in WEIGHTS
    ]


def by_seed(sums) -> list[dict[str, float]]:
    sums = jax.device_get(sums)
    return [
        metrics.summarise(jax.tree.map(lambda leaf, s=seed: leaf[s], sums))
        for seed in range(len(WEIGHTS))
    ]


@pytest.mark.parametrize("batch_size", [1, 8, 22, 23, 100])
def test_every_metric_is_that_of_the_whole_split(at_once, batch_size):
    evaluator = evaluate.Evaluator(linear, batch_size, seeds=True)
    found = by_seed(evaluator.metrics(WEIGHTS, Batch(IMAGES, LABELS), TEACHER))
    assert found[0].keys() == NAMES
    for own, expected in zip(found, at_once, strict=True):
        assert own == pytest.approx(expected, rel=1e-5)


def test_without_a_teacher_the_other_metrics_are_the_same(at_once):
    evaluator = evaluate.Evaluator(linear, 8, seeds=True)
    for own, expected in zip(
        by_seed(evaluator.metrics(WEIGHTS, Batch(IMAGES, LABELS))), at_once, strict=True
    ):
        assert own == pytest.approx(
            {name: value for name, value in expected.items() if "teacher" not in name}, rel=1e-5
        )


def test_one_evaluator_measures_with_and_without_a_teacher(at_once):
    """As in a run, whose validation split the teacher does not see."""
    evaluator = evaluate.Evaluator(linear, 8, seeds=False)
    split = Batch(IMAGES, LABELS)
    found = [evaluator.metrics(WEIGHTS[0], split, told) for told in (None, TEACHER, None)]
    names = [metrics.summarise(jax.device_get(sums)).keys() for sums in found]
    assert names[0] == names[2] == NAMES - {"teacher_agreement", "teacher_kl"}
    assert metrics.summarise(jax.device_get(found[1])) == pytest.approx(at_once[0], rel=1e-5)


class Stream:
    """The split read as it is needed; some examples cannot be read and come as blanks."""

    def __init__(self, unreadable: list[int], labels: np.ndarray = LABELS):
        self.unreadable, self.labels = unreadable, labels

    def __len__(self) -> int:
        return len(LABELS)

    def sweep(self, batch_size, shard=(0, 1)):
        assert shard == (0, 1)
        rows = -(-len(LABELS) // batch_size) * batch_size
        images, labels = np.zeros((rows, *IMAGES.shape[1:]), np.uint8), np.zeros(rows, np.int32)
        real = np.isin(np.arange(rows), np.setdiff1d(np.arange(len(LABELS)), self.unreadable))
        images[real], labels[real] = IMAGES[real[:23]], self.labels[real[:23]]
        for start in range(0, rows, batch_size):
            part = slice(start, start + batch_size)
            yield images[part], labels[part], real[part]


@pytest.mark.parametrize("batch_size", [8, 23])
def test_a_stream_measures_what_can_be_read_against_its_own_teacher_logits(batch_size):
    evaluator = evaluate.Evaluator(linear, batch_size, seeds=True)
    kept = np.setdiff1d(np.arange(23), [0, 9, 22])
    found = by_seed(evaluator.metrics(WEIGHTS, Stream([0, 9, 22]), TEACHER))
    expected = by_seed(evaluator.metrics(WEIGHTS, Batch(IMAGES[kept], LABELS[kept]), TEACHER[kept]))
    for own, other in zip(found, expected, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def test_logits_of_a_stream_keep_the_places_of_what_cannot_be_read():
    evaluator = evaluate.Evaluator(linear, 8, seeds=True)
    logits = evaluator.logits(WEIGHTS, Stream([9]))
    blank = IMAGES * (np.arange(23) != 9)[:, None, None, None]
    expected = np.stack([linear(own, blank) for own in WEIGHTS])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_batches_of_logits_leave_out_padding_and_what_cannot_be_read():
    evaluator = evaluate.Evaluator(linear, 8, seeds=False)
    logits, labels = zip(*evaluator.batches_of_logits(WEIGHTS[0], Stream([9])), strict=True)
    kept = np.delete(np.arange(23), 9)
    assert [len(part) for part in labels] == [8, 7, 7]
    np.testing.assert_array_equal(np.concatenate(labels), LABELS[kept])
    expected = linear(WEIGHTS[0], IMAGES[kept])
    np.testing.assert_allclose(np.concatenate(logits), expected, rtol=1e-4, atol=1e-5)


# Two classes: the area under the ROC curve needs all scores of a split.

IS_ATTACK = (LABELS % 2).astype(np.int32)
# Few brightnesses and round weights, so that scores tie.
COARSE = (IMAGES // 64).astype(np.uint8)
TWO = np.round(RANDOM.randn(2, 25, 2)).astype(np.float32) * (RANDOM.rand(25, 1) < 0.2)


def coarse(weights, images):
    return images.reshape(len(images), -1).astype(jnp.float32) @ weights


def of_coarse(batch_size: int, mesh=None) -> list[dict[str, float]]:
    evaluator = evaluate.Evaluator(coarse, batch_size, seeds=True, mesh=mesh)
    return by_seed(evaluator.metrics(TWO, Batch(COARSE, IS_ATTACK)))


@pytest.mark.parametrize("batch_size", [8, 23, 100])
def test_binary_figures_of_both_seeds_are_those_of_scikit_learn(batch_size):
    """In padded batches too."""
    for own, found in zip(TWO, of_coarse(batch_size), strict=True):
        logits = np.float64(COARSE.reshape(23, 25) @ own)
        odds, said = logits[:, 1] - logits[:, 0], logits.argmax(1)
        assert len(set(odds)) < 20  # there are ties
        assert found["auc"] == pytest.approx(roc_auc_score(IS_ATTACK, odds), abs=1e-12)
        assert found["macro_f1"] == pytest.approx(f1_score(IS_ATTACK, said, average="macro"))
        recalls = [found["recall_0"], found["recall_1"]]
        assert recalls == pytest.approx(recall_score(IS_ATTACK, said, average=None))


def on_meshes(path: pathlib.Path) -> None:
    """With seeds side by side, and with seeds and batches shared by eight devices."""
    found = [of_coarse(8, parallel.make_mesh(seeds)) for seeds in (1, 2)]
    path.write_text(json.dumps(found))


def test_figures_do_not_depend_on_devices(tmp_path):
    found = several.on_eight_devices("test_evaluate.on_meshes", tmp_path / "found.json")
    expected = of_coarse(23)
    for of_mesh in found:
        for own, other in zip(of_mesh, expected, strict=True):
            assert own == pytest.approx(other, rel=1e-5)
            exact = [name for name in own if name in ("auc", "macro_f1", "recall_0", "recall_1")]
            assert len(exact) == 4
            assert all(own[name] == other[name] for name in exact)


@pytest.mark.parametrize("batch_size", [8, 100])
def test_the_confusion_matrix_adds_up_over_padded_batches(batch_size):
    sums = evaluate.Evaluator(linear, batch_size, seeds=True).metrics(
        WEIGHTS, Batch(IMAGES, LABELS)
    )
    for seed, own in enumerate(WEIGHTS):
        said = np.asarray(linear(own, IMAGES)).argmax(1)
        expected = confusion_matrix(LABELS, said, labels=range(7))
        np.testing.assert_array_equal(sums["confusion"].total[seed], expected)
        assert sums["confusion"].count[seed] == 23


def test_what_cannot_be_read_is_not_ranked():
    kept = np.setdiff1d(np.arange(23), [0, 9, 22])
    of_two = lambda weights, images: linear(weights, images)[:, :2]  # noqa: E731
    evaluator = evaluate.Evaluator(of_two, 8, seeds=True)
    found = by_seed(evaluator.metrics(WEIGHTS, Stream([0, 9, 22], IS_ATTACK)))
    for own, seed in zip(found, WEIGHTS, strict=True):
        logits = np.asarray(of_two(seed, IMAGES[kept]), np.float64)
        expected = roc_auc_score(IS_ATTACK[kept], logits[:, 1] - logits[:, 0])
        assert own["auc"] == pytest.approx(expected, abs=1e-12)
