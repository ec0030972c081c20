"""The ratio of every sample after training, and the pictures of the extremes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import methods
from tgeo_jax import geometry, models, ratios, roles, samples
from tgeo_jax.state import Teacher

COUNT = 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    method, teacher = methods.method(), methods.teacher()
    train = methods.examples(COUNT)
    random = np.random.RandomState(0)
    student, taught = random.randn(2, COUNT, 4), random.randn(COUNT, 4)
    student, taught = student.astype(np.float32), taught.astype(np.float32)
    states = [methods.start(method, seed) for seed in (0, 1)]
    both = jax.tree.map(lambda a, b: np.stack([a, b]), *states).replace(step=np.int32(5))
    labels = np.asarray(train.labels_B)
    ratio = samples.ratios_of_samples(method, teacher, both, student, taught, labels)
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    samples.save(path, ratio, taught, train)
    return states, student, taught, train, dict(np.load(path))


def test_ratios_are_the_fusion_networks_answers_for_each_seed(saved):
    states, student, taught, train, arrays = saved
    network = ratios.FusionNetwork(hidden=(4,))
    for seed, state in enumerate(states):
        features = geometry.trilateral_features(
            jax.nn.softmax(student[seed]), jax.nn.softmax(taught), train.labels_B,
            methods.teacher().class_means_KxK,
        )  # fmt: skip
        expected = network.apply(state.fusion.params, features)
        np.testing.assert_allclose(arrays["ratio"][seed], expected, rtol=1e-5)


def test_extremes_are_the_ends_of_the_first_seeds_order(saved):
    *_, train, arrays = saved
    ratio = arrays["ratio"][0]
    assert list(ratio[arrays["lowest"]]) == sorted(ratio)[: samples.EXTREMES]
    assert list(ratio[arrays["highest"]]) == sorted(ratio)[::-1][: samples.EXTREMES]
    images = np.asarray(train.images_BxHxWxC)
    np.testing.assert_array_equal(arrays["lowest_images"], images[arrays["lowest"]])


def test_teachers_answers_are_kept(saved):
    _, _, taught, train, arrays = saved
    np.testing.assert_array_equal(arrays["teacher_class"], [taught.argmax(1)])
    right = taught.argmax(1) == np.asarray(train.labels_B)
    np.testing.assert_array_equal(arrays["teacher_right"], [right])


LINEAR = models.build("mlp", methods.NUM_CLASSES, hidden=())
LABELS = np.asarray(methods.examples(COUNT).labels_B)


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return 3 * np.random.RandomState(seed).randn(*shape).astype(np.float32)


def _both(method):
    states = [methods.start(method, seed) for seed in (0, 1)]
    return jax.tree.map(lambda a, b: np.stack([a, b]), *states).replace(step=np.int32(5))


def _network_says(params, student, taught, means):
    features = geometry.trilateral_features(
        jax.nn.softmax(student), jax.nn.softmax(taught), LABELS, means
    )
    return ratios.FusionNetwork(hidden=(4,)).apply(params, features)


def test_a_teacher_that_trained_along_is_asked_seed_by_seed(tmp_path):
    method = methods.method(student=LINEAR, role=roles.dml(LINEAR))
    state = _both(method)
    means = jax.nn.softmax(_random(2, 4, 4, seed=1))
    state = state.replace(teacher=state.teacher.replace(class_means_KxK=means))
    student, taught = _random(2, COUNT, 4, seed=2), _random(2, COUNT, 4, seed=3)
    found = samples.ratios_of_samples(method, Teacher(None, None), state, student, taught, LABELS)
    for seed in (0, 1):
        own = jax.tree.map(lambda leaf, s=seed: leaf[s], state.fusion.params)
        expected = _network_says(own, student[seed], taught[seed], means[seed])
        np.testing.assert_allclose(found[seed], expected, rtol=1e-5)
    samples.save(tmp_path / "samples.npz", found, taught, methods.examples(COUNT))
    arrays = np.load(tmp_path / "samples.npz")
    np.testing.assert_array_equal(arrays["teacher_class"], taught.argmax(-1))
    np.testing.assert_array_equal(arrays["teacher_right"], taught.argmax(-1) == LABELS)


def test_of_several_teachers_the_share_of_all_is_saved():
    """`soft = mean_m alpha_m`, `hard = mean_m (1 - alpha_m)`, so the share is the mean alpha."""
    several = roles.Role(teach=lambda variables, inputs: inputs, num_teachers=3)
    method = methods.method(student=LINEAR, role=several)
    state = _both(method)
    means = jax.nn.softmax(_random(3, 4, 4, seed=1))
    student, taught = _random(2, COUNT, 4, seed=2), _random(3, COUNT, 4, seed=3)
    found = samples.ratios_of_samples(method, Teacher(None, means), state, student, taught, LABELS)
    assert found.shape == (2, COUNT)
    for seed in (0, 1):
        each = [
            _network_says(
                jax.tree.map(lambda leaf, s=seed, m=m: leaf[s, m], state.fusion.params),
                student[seed], taught[m], means[m],
            )
            for m in range(3)
        ]  # fmt: skip
        np.testing.assert_allclose(found[seed], np.mean(each, axis=0), rtol=1e-5)


def test_ratios_that_follow_the_epoch_are_those_of_the_end():
    method = methods.method(
        student=LINEAR, ratio=ratios.weighted(hard=1.0, soft=3.0, warmup_epochs=8)
    )
    student, taught = _random(2, COUNT, 4, seed=2), _random(COUNT, 4, seed=3)
    found = samples.ratios_of_samples(
        method, methods.teacher(), _both(method), student, taught, LABELS
    )
    np.testing.assert_allclose(found, np.full((2, COUNT), 0.75))
